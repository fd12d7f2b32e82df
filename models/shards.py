"""Which part of a dimension a rank of a tensor-parallel model holds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Shard:
    """The ranges of a dimension that a rank holds, one after the other, and then padding.

    ranges: (start, end) of each range. size: size of the whole dimension. held: the rank's size,
    with padding.
    """

    ranges: tuple[tuple[int, int], ...]
    size: int
    held: int

    @property
    def padding(self) -> int:
        return self.held - sum(end - start for start, end in self.ranges)


@dataclass(frozen=True, slots=True)
class Ranks:
    """One of `count` processes that share the weights of a model."""

    index: int = 0
    count: int = 1

    @property
    def are_many(self) -> bool:
        return self.count > 1

    def shard(self, *sections: int, replicas: int = 1) -> Shard:
        """Equal parts of each of several sections of a dimension, in the order of the ranks.

        sections: the sizes that the rank holds. replicas: number of neighbouring ranks that hold
        the same part.
        """
        index, count = self.index // replicas, self.count // replicas
        ranges, start = [], 0
        for size in sections:
            first = start + index * size
            ranges.append((first, first + size))
            start += count * size
        return Shard(tuple(ranges), start, sum(sections))

    def shard_of_rows(self, size: int, held: int) -> Shard:
        """The rank's part of `size` rows. Each rank holds `held` rows, padded at the end."""
        start, end = (min(i * held, size) for i in (self.index, self.index + 1))
        return Shard(((start, end),), size, held)
