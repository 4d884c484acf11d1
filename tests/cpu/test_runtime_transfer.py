"""Copies between host and device: what is sent arrives, at addresses that follow from the sizes alone."""

import numpy as np
import pytest
import torch
from octavo.engine.step import StepOutput
from octavo.runtime.pending import PendingOutput
from octavo.runtime.transfer import Arrival, Packet, ints_to_device, padded_bytes, to_device

CPU = torch.device("cpu")


def arrays(*sizes: int) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    kinds = (np.int64, np.int32)
    return [generator.integers(-5, 1000, size).astype(kinds[i % 2]) for i, size in enumerate(sizes)]


def send(packet: Packet, arrays: list[np.ndarray]) -> list[torch.Tensor]:
    for array, place in zip(arrays, packet.open(tuple((len(a), a.itemsize) for a in arrays)), strict=True):
        place[:] = array
    return packet.send()


def test_a_packet_holds_its_arrays_side_by_side() -> None:
    sent = arrays(3, 5, 0, 7, 1)
    views = send(Packet(1024, CPU), sent)
    assert [view.tolist() for view in views] == [array.tolist() for array in sent]
    assert [view.dtype for view in views] == [torch.from_numpy(array).dtype for array in sent]


def test_arrays_of_the_same_sizes_lie_at_the_same_addresses() -> None:
    packet = Packet(1024, CPU)
    first = [view.data_ptr() for view in send(packet, arrays(3, 5, 7))]
    second = [view.data_ptr() for view in send(packet, [array + 1 for array in arrays(3, 5, 7)])]
    with_more_behind = [view.data_ptr() for view in send(packet, arrays(3, 5, 7, 20))]
    assert first == second == with_more_behind[:3]
    assert all(address % 16 == first[0] % 16 for address in first)


def test_a_packet_can_be_filled_to_its_end_and_no_further() -> None:
    packet = Packet(padded_bytes(8 * 3) + padded_bytes(4 * 5), CPU)
    assert [len(view) for view in send(packet, arrays(3, 5))] == [3, 5]
    with pytest.raises(AssertionError, match="a packet of"):
        send(packet, arrays(30, 50))


def test_arrays_arrive_with_shape_and_dtype() -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3).T
    assert torch.equal(to_device(values, CPU), torch.from_numpy(values.copy()))
    assert ints_to_device([3, 1], CPU).dtype is torch.int64
    (arrived,) = Arrival(torch.tensor([4, 2])).tensors()
    assert arrived.tolist() == [4, 2]


def test_an_output_is_made_once_and_by_who_asks() -> None:
    calls: list[int] = []

    def finish() -> StepOutput:
        calls.append(1)
        return StepOutput(7)

    pending = PendingOutput(finish)
    assert not pending.done() and not calls
    assert pending.result() is pending.result()
    assert (pending.result().step_id, calls) == (7, [1])


def test_an_output_that_fails_says_so_each_time() -> None:
    def finish() -> StepOutput:
        raise ValueError("spoilt")

    pending = PendingOutput(finish)
    for _ in range(2):
        with pytest.raises(ValueError, match="spoilt"):
            pending.result()
