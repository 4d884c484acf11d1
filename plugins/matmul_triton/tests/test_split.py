"""Split products: the same bits whoever adds the parts, in graphs too, and counters that end where they began."""

import pytest
import torch
from octavo.weights.canonical import Dense
from octavo.weights.interface import Activation
from octavo_matmul_triton.matmul import FewTokens
from octavo_matmul_triton.tuning import TensorCore

HAVE_GPU = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not HAVE_GPU, reason="there is no GPU")
SPLIT = TensorCore(32, 64, num_stages=3, splits=4)


@pytest.mark.skipif(HAVE_GPU, reason="the kernels are compiled in this process")
def test_counters_return_to_zero() -> None:
    """And what the workspace held before counts for nothing."""
    matmul, weight, x = FewTokens(rule={8: SPLIT}), torch.randn(70, 272), torch.randn(7, 272)
    packed = matmul.pack(Dense(weight))
    (plan,) = matmul.plans.values()
    results = []
    for _ in range(2):
        plan.partials.fill_(torch.nan)
        results.append(matmul.apply(Activation(x), packed, None))
        assert not plan.counters.any()
    assert torch.equal(*results) and not results[0].isnan().any()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("splits", [2, 4])
@pytest.mark.parametrize("swap", [False, True])
def test_a_graph_repeats_bit_for_bit(splits: int, swap: bool) -> None:
    """A chain of products, each the next one's input, on one workspace: as one at a time, replay after replay."""
    torch.manual_seed(0)
    config = TensorCore(64, 64, num_stages=4, splits=splits, swap=swap)
    matmul = FewTokens(rule={32: config})
    weights = [torch.randn(2048, 2048, dtype=torch.bfloat16, device="cuda") / 45 for _ in range(4)]
    x = torch.randn(29, 2048, dtype=torch.bfloat16, device="cuda")
    torch.cuda.synchronize()
    packed = [matmul.pack(Dense(weight)) for weight in weights]

    def chain(pause: bool) -> torch.Tensor:
        y = x
        for _ in range(5):
            for weight in packed:
                y = matmul.apply(Activation(y), weight, None)
                if pause:
                    torch.cuda.synchronize()
        return y

    wanted = chain(True)
    assert wanted.isfinite().all() and torch.equal(chain(True), wanted)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = chain(False)
    for _ in range(5):
        got.fill_(torch.nan)
        graph.replay()
        assert torch.equal(got, wanted)
    assert all(not plan.counters.any() for plan in matmul.plans.values())
