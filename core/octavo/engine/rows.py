"""Rows of the device tables: each running request has one."""


class Rows:
    """`num_rows` rows, the one given back last to be taken first."""

    def __init__(self, num_rows: int) -> None:
        self._free = list(range(num_rows - 1, -1, -1))
        self._freed: list[int] = []

    @property
    def num_free(self) -> int:
        """Rows that nobody has."""
        return len(self._free)

    def take(self) -> int:
        """A free row."""
        return self._free.pop()

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
