"""by_tokens: who computes what, what the joined matmul says of itself, and what cannot be joined."""

from typing import Any

import pytest
import torch
from octavo.device import DeviceInfo
from octavo.weights.canonical import Dense, GroupedInt
from octavo.weights.combinators import by_tokens
from octavo.weights.interface import Activation, ActivationSpec, MatmulSpec
from octavo.weights.torch_matmul import TorchMatmul

SPEC = MatmulSpec(
    weight=Dense, in_features=8, out_features=4, dtype=torch.float32, device=DeviceInfo("cpu", "CPU"), features={}
)


class Negated(TorchMatmul):
    """Torch's product with the other sign, so that a result says who computed it."""

    features = frozenset({"sparse", "few"})

    def __init__(self, options: object = None) -> None:
        self.options = options

    @staticmethod
    def why_not(spec: MatmulSpec, options: object) -> str | None:
        return None if spec.in_features % 16 == 0 else f"negated needs 16, and {options}"

    def pack(self, weight: Dense) -> torch.Tensor:
        return weight.weight.contiguous()

    def apply(
        self, x: Activation, packed: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        result = super().apply(x, packed, bias)
        return result.neg_() if out is None else torch.neg(result, out=out)


class Sparse(TorchMatmul):
    """A matmul that has a feature."""

    features = frozenset({"sparse"})


def sign(matmul: Any, packed: torch.Tensor, tokens: int) -> int:
    """1 where torch's own product came out, -1 where Negated's did."""
    x = torch.ones(tokens, packed.shape[1])
    out = torch.empty(tokens, packed.shape[0])
    got = matmul.apply(Activation(x), packed, None)
    assert matmul.apply(Activation(x), packed, None, out) is out and torch.equal(out, got)
    assert torch.equal(got.abs(), torch.nn.functional.linear(x, packed))
    return int(got.sign().mean().item())


def test_tokens_decide() -> None:
    matmul = by_tokens(Negated, TorchMatmul, 3)(None)  # type: ignore[call-arg]
    packed = matmul.pack(Dense(torch.ones(8, 4).T))
    assert packed.is_contiguous(), "the small one packs"
    assert [sign(matmul, packed, tokens) for tokens in (1, 3, 4, 9)] == [-1, -1, 1, 1]
    assert matmul.apply(Activation(torch.ones(0, 8)), packed, torch.ones(4)).shape == (0, 4)


def test_the_threshold_may_depend_on_the_weight() -> None:
    matmul = by_tokens(Negated, TorchMatmul, lambda packed: int(packed.shape[0]))()
    assert [sign(matmul, torch.ones(rows, 8), 4) for rows in (3, 4)] == [1, -1]


def test_the_joined_one_is_what_both_are() -> None:
    joined = by_tokens(Negated, Sparse, 1)
    assert (joined.handles, joined.layout, joined.input) == (TorchMatmul.handles, "dense", ActivationSpec())
    assert joined.features == {"sparse"}
    few = type("Few", (TorchMatmul,), {"handles": (GroupedInt, Dense, int)})
    assert by_tokens(few, TorchMatmul, 1).handles == (GroupedInt, Dense)


def test_each_has_its_own_options() -> None:
    joined = by_tokens(Negated, Negated, 1, "one", "two")
    matmul: Any = joined()
    assert (matmul.small.options, matmul.large.options) == ("one", "two")
    reason = joined.why_not(SPEC, None)
    assert reason == "for few tokens: negated needs 16, and one; for many tokens: negated needs 16, and two"
    reason = by_tokens(TorchMatmul, Negated, 1).why_not(SPEC, None)
    assert reason == "for many tokens: negated needs 16, and None"
    assert by_tokens(TorchMatmul, TorchMatmul, 1).why_not(SPEC, None) is None


@pytest.mark.parametrize(
    ("member", "value"), [("handles", (int,)), ("layout", "tiled"), ("input", ActivationSpec("fp8"))]
)
def test_unlike_matmuls_are_refused(member: str, value: Any) -> None:
    other = type("Other", (TorchMatmul,), {member: value})
    with pytest.raises(ValueError, match=f"(?s)({member}|share none).*"):
        by_tokens(TorchMatmul, other, 1)
