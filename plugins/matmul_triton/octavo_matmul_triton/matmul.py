"""The provider: few tokens by the kernels here, more by torch's linear, which is cuBLAS."""

import os
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch
from octavo.device import DeviceInfo
from octavo.weights.canonical import Dense
from octavo.weights.combinators import by_tokens
from octavo.weights.interface import Activation, ActivationSpec, MatmulSpec
from octavo.weights.torch_matmul import TorchMatmul

from octavo_matmul_triton.tuning import Rule, TensorCore, Vector, rule_for

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MIN_CAPABILITY = (8, 0)
K_MULTIPLE = 16
MIN_BLOCK_M = 16
VECTOR_BYTES = 16  # of a thread's load


@dataclass(frozen=True, slots=True)
class Plan:
    """What serves one weight shape: its rule, and the split products' sums and counters, which are 0 between calls."""

    rule: Rule
    partials: torch.Tensor
    counters: torch.Tensor


class FewTokens:
    """Dense weights [out, in] with as many tokens as the shape's rule has, by `rule` where given.

    `apply` allocates nothing but its result. Weights are read before the kernels before have ended (PDL), so a kernel
    that writes a weight must not be the one right before its product; a model's never is.
    """

    handles: tuple[type, ...] = (Dense,)
    layout = "dense"
    input = ActivationSpec()
    features: frozenset[str] = frozenset()

    @staticmethod
    def why_not(spec: MatmulSpec, options: object) -> str | None:
        """Serves dense weights on GPUs from sm_80 on and in Triton's interpreter."""
        if spec.weight is not Dense or spec.dtype not in DTYPES:
            return f"triton multiplies dense weights of 16 or 32 bits, not {spec.weight.__name__} in {spec.dtype}"
        if spec.in_features % K_MULTIPLE:
            return f"triton needs input features in multiples of {K_MULTIPLE}, not {spec.in_features}"
        return why_not_device(spec.device)

    def __init__(self, options: object = None, rule: Rule | None = None) -> None:
        from octavo_matmul_triton import kernels  # not above: why_not answers where there is no triton

        del options
        self.kernels = kernels
        self.rule = rule
        self.launch = launch_arguments(kernels.vector_product)
        self.plans: dict[tuple[int, ...], Plan] = {}

    def pack(self, weight: Dense) -> torch.Tensor:
        """The tensor, contiguous and aligned. The first weight of a shape also allocates and compiles what it needs."""
        packed = weight.weight.contiguous()
        if packed.data_ptr() % VECTOR_BYTES:
            packed = packed.clone()
        if packed.shape not in self.plans:
            rule = self.rule or rule_for(_major(packed.device), *packed.shape, packed.dtype)
            self.plans[packed.shape] = _plan(rule, packed)
            if packed.is_cuda:
                for tokens in rule:
                    self.apply(Activation(packed.new_zeros(tokens, packed.shape[1])), packed, None)
        return packed

    def apply(
        self, x: Activation, packed: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x W^T + b with float32 sums, rounded once; x [T, in], T within the rule; out's last stride is 1."""
        values = x.values.contiguous()
        num_tokens, num_outputs = values.shape[0], packed.shape[0]
        if out is None:
            out = torch.empty(num_tokens, num_outputs, dtype=values.dtype, device=values.device)
        if num_tokens:
            plan, tokens = self.plans[packed.shape], 1 << (num_tokens - 1).bit_length()
            config = plan.rule[tokens]
            if isinstance(config, Vector):
                self._on_cuda_cores(config, tokens, values, packed, bias, out)
            else:
                self._on_tensor_cores(config, plan, tokens, values, packed, bias, out)
        return out

    # Out stands in for an absent bias, so that `tokens` alone picks a kernel's variant.

    def _on_cuda_cores(
        self,
        config: Vector,
        tokens: int,
        values: torch.Tensor,
        packed: torch.Tensor,
        bias: torch.Tensor | None,
        out: torch.Tensor,
    ) -> None:
        num_outputs, width = packed.shape
        lane = VECTOR_BYTES // packed.element_size()
        self.kernels.vector_product[(-(-num_outputs // config.block_n),)](
            values,
            packed,
            out if bias is None else bias,
            out,
            values.shape[0],
            num_outputs,
            int(bias is not None),
            out.stride(0),
            width,
            tokens,
            config.block_n,
            32 * config.num_warps * lane,
            lane,
            config.unroll,
            min(config.prefetch, width),
            num_warps=config.num_warps,
            **self.launch,
        )

    def _on_tensor_cores(
        self,
        config: TensorCore,
        plan: Plan,
        tokens: int,
        values: torch.Tensor,
        packed: torch.Tensor,
        bias: torch.Tensor | None,
        out: torch.Tensor,
    ) -> None:
        num_outputs, width = packed.shape
        self.kernels.tensor_core_product[(-(-num_outputs // config.block_n), config.splits)](
            values,
            packed,
            out if bias is None else bias,
            out,
            plan.partials,
            plan.counters,
            values.shape[0],
            num_outputs,
            int(bias is not None),
            out.stride(0),
            width,
            max(tokens, MIN_BLOCK_M),
            config.block_n,
            config.block_k,
            config.splits,
            config.swap,
            min(config.prefetch, width),
            32 * config.num_warps,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            **self.launch,
        )


def _plan(rule: Rule, packed: torch.Tensor) -> Plan:
    """The rule with the workspace of its split products: one for all, since they run one after the other."""
    num_outputs = packed.shape[0]
    split = [(tokens, one) for tokens, one in rule.items() if isinstance(one, TensorCore) and one.splits > 1]
    sums = max((one.splits * max(tokens, MIN_BLOCK_M) * num_outputs for tokens, one in split), default=1)
    counters = max((-(-num_outputs // one.block_n) for _, one in split), default=1)
    return Plan(
        rule,
        torch.empty(sums, dtype=torch.float32, device=packed.device),
        torch.zeros(counters, dtype=torch.int32, device=packed.device),
    )


def why_not_device(device: DeviceInfo) -> str | None:
    """One sentence when Triton cannot run on the device, else None."""
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "triton needs a GPU; on a CPU it runs only in its interpreter (TRITON_INTERPRET=1), for tests"
    if device.type not in ("cpu", "cuda"):
        return f"triton runs on NVIDIA GPUs, not on {device.type}"
    if device.type == "cuda" and device.capability < MIN_CAPABILITY:
        have = ".".join(map(str, device.capability))
        return f"triton needs compute capability 8.0, but {device.name} has {have}"
    return None if find_spec("triton") else "the package triton is not installed"


def launch_arguments(kernel: object) -> dict[str, bool]:
    """PDL and the launch option that it needs, where kernels are compiled (not interpreted) for sm_90 or later."""
    from triton.runtime import JITFunction

    compiled = isinstance(kernel, JITFunction) and torch.cuda.is_available()
    if compiled and torch.cuda.get_device_capability() >= (9, 0):
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


@cache
def _major(device: torch.device) -> int:
    """The major compute capability, 0 for a CPU."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0


def _most_tokens(packed: torch.Tensor) -> int:
    """The most tokens that the rule of the weight's shape has."""
    return max(rule_for(_major(packed.device), *packed.shape, packed.dtype))


TritonMatmul = by_tokens(FewTokens, TorchMatmul, _most_tokens)
