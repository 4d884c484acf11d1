"""Rows of the device tables."""

import pytest
from octavo.engine.rows import Rows


def test_rows_are_taken_from_the_first_on() -> None:
    rows = Rows(3)
    assert [rows.take() for _ in range(3)] == [0, 1, 2]
    assert rows.num_free == 0
    with pytest.raises(IndexError):
        rows.take()


def test_the_row_given_back_last_is_taken_first() -> None:
    rows = Rows(3)
    for _ in range(3):
        rows.take()
    rows.release(0)
    rows.release(1)
    assert (rows.num_free, rows.take(), rows.take()) == (2, 1, 0)


def test_freed_rows_are_told_once_and_in_order() -> None:
    rows = Rows(3)
    for _ in range(3):
        rows.take()
    assert rows.drain_freed() == []
    rows.release(2)
    rows.release(0)
    assert rows.drain_freed() == [2, 0]
    assert rows.drain_freed() == []


def test_a_row_that_was_taken_again_is_not_told_as_freed() -> None:
    rows = Rows(2)
    first = rows.take()
    rows.take()
    rows.release(first)
    assert rows.take() == first
    assert rows.drain_freed() == []


def test_a_row_that_was_freed_twice_is_told_once() -> None:
    rows = Rows(2)
    row = rows.take()
    rows.release(row)
    rows.take()
    rows.release(row)
    assert rows.drain_freed() == [row]
