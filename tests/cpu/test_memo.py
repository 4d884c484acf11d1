"""What a step's layers share is computed once, and never outlives the tensors that it came from."""

import torch
from octavo.memo import StepMemo


def test_the_very_same_tensors_are_answered_from_memory() -> None:
    calls: list[torch.Tensor] = []
    double = StepMemo(lambda x: (calls.append(x), x * 2)[1])
    x = torch.arange(3)
    assert torch.equal(double(x), torch.tensor([0, 2, 4]))
    assert double(x) is double(x)
    assert len(calls) == 1


def test_another_view_of_the_same_memory_is_computed_anew() -> None:
    double = StepMemo(lambda x: x * 2)
    buffer = torch.arange(3)
    double(buffer[:2])
    buffer += 10
    assert torch.equal(double(buffer[:2]), torch.tensor([20, 22]))


def test_every_tensor_of_the_call_counts() -> None:
    add = StepMemo(lambda x, y: x + y)
    x, y, z = torch.ones(2), torch.ones(2), torch.zeros(2)
    assert torch.equal(add(x, y), torch.tensor([2.0, 2.0]))
    assert torch.equal(add(x, z), torch.tensor([1.0, 1.0]))


def test_nothing_is_kept_on_another_device() -> None:
    calls: list[torch.Tensor] = []
    remember = StepMemo(lambda x: (calls.append(x), x)[1])
    x = torch.empty(2, device="meta")
    remember(x)
    remember(x)
    assert len(calls) == 2
