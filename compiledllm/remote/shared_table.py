"""A table of integers in shared memory, with a row for each process.

A process writes only its own row, and each number with a single store, so no lock is needed.
"""

from __future__ import annotations

import mmap
import os

_NUM_BYTES = 8  # size of a number


class SharedTable:
    """[num_rows, num_columns] integers, all 0 at first. fd: file descriptor of the memory."""

    def __init__(self, fd: int, num_rows: int, num_columns: int) -> None:
        self.fd = fd
        self._num_rows, self._num_columns = num_rows, num_columns
        memory = mmap.mmap(fd, num_rows * num_columns * _NUM_BYTES)
        self._numbers = memoryview(memory).cast("q")

    @classmethod
    def create(cls, num_rows: int, num_columns: int) -> SharedTable:
        """A new table, in memory without a name, which processes inherit by `fd`. Needs Linux."""
        fd = os.memfd_create("numbers")
        os.ftruncate(fd, num_rows * num_columns * _NUM_BYTES)
        return cls(fd, num_rows, num_columns)

    def write(self, row: int, column: int, number: int) -> None:
        self._numbers[row * self._num_columns + column] = number

    def clear(self, row: int) -> None:
        """Write zeros to the row of a process that has ended."""
        for column in range(self._num_columns):
            self.write(row, column, 0)

    def column(self, column: int) -> list[int]:
        """The numbers of all processes in a column."""
        return self._numbers[column :: self._num_columns].tolist()

    def total(self, column: int) -> int:
        return sum(self.column(column))
