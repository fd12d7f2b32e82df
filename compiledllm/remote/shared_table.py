"""Numbers that several processes see: a table in shared memory, with a row for each process.

A process writes its own row only, and each number by one store, so that there is no lock.
"""

from __future__ import annotations

import mmap
import os

_NUM_BYTES = 8  # of a number


class SharedTable:
    """num_rows processes with num_columns integers each, all 0 at first. fd: of the memory."""

    def __init__(self, fd: int, num_rows: int, num_columns: int) -> None:
        self.fd = fd
        self._num_rows, self._num_columns = num_rows, num_columns
        memory = mmap.mmap(fd, num_rows * num_columns * _NUM_BYTES)
        self._numbers = memoryview(memory).cast("q")

    @classmethod
    def create(cls, num_rows: int, num_columns: int) -> SharedTable:
        """Needs Linux, for memory that has a descriptor and no name."""
        fd = os.memfd_create("numbers")
        os.ftruncate(fd, num_rows * num_columns * _NUM_BYTES)
        return cls(fd, num_rows, num_columns)

    def write(self, row: int, column: int, number: int) -> None:
        self._numbers[row * self._num_columns + column] = number

    def clear(self, row: int) -> None:
        """Write zeros for a process that has ended."""
        for column in range(self._num_columns):
            self.write(row, column, 0)

    def column(self, column: int) -> list[int]:
        """A number of all processes."""
        return self._numbers[column :: self._num_columns].tolist()

    def total(self, column: int) -> int:
        return sum(self.column(column))
