"""Rows of the device tables: each running request has one, with a generation that tells it from its predecessors."""


class Rows:
    """`num_rows` rows. A row is reused with the next generation, so that late outputs of its predecessor are known."""

    def __init__(self, num_rows: int) -> None:
        self._free = list(range(num_rows - 1, -1, -1))
        self._generations = [0] * num_rows
        self._freed: list[int] = []

    @property
    def num_free(self) -> int:
        """Rows that nobody has."""
        return len(self._free)

    def take(self) -> int:
        """A free row, in a new generation."""
        row = self._free.pop()
        self._generations[row] += 1
        return row

    def generation(self, row: int) -> int:
        """The row's current generation."""
        return self._generations[row]

    def release(self, row: int) -> None:
        """Give the row back; the next step tells the device."""
        self._free.append(row)
        self._freed.append(row)

    def drain_freed(self) -> list[int]:
        """Rows given back since the last call that nobody has taken since."""
        if not self._freed:
            return []
        free = set(self._free)
        freed = [row for row in dict.fromkeys(self._freed) if row in free]
        self._freed.clear()
        return freed
