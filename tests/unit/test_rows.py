"""Rows and their generations."""

import pytest
from octavo.engine.rows import Rows


def test_rows_are_taken_from_the_first_on() -> None:
    rows = Rows(3)
    assert [rows.take() for _ in range(3)] == [0, 1, 2]
    assert rows.num_free == 0
    with pytest.raises(IndexError):
        rows.take()


def test_a_row_is_taken_in_a_new_generation_each_time() -> None:
    rows = Rows(2)
    assert rows.generation(0) == 0
    row = rows.take()
    assert rows.generation(row) == 1
    rows.release(row)
    assert (rows.num_free, rows.generation(row)) == (2, 1)
    assert rows.take() == row
    assert rows.generation(row) == 2
    assert rows.generation(1) == 0


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
