"""Batch-size buckets for captured decode steps: pure functions of the largest batch."""

from __future__ import annotations

from bisect import bisect_left

# (up to this size, in steps of): dense where a padded row costs most, sparse where it costs little.
_STEPS = ((8, 1), (16, 2), (32, 4), (128, 8), (256, 16), (512, 32))


def ladder(max_size: int) -> list[int]:
    """Ascending bucket sizes; the last is `max_size` itself (the next is 64 apart past 512)."""
    if max_size < 1:
        raise ValueError(f"the largest bucket must be at least 1, got {max_size}")
    sizes: list[int] = []
    start = 0
    for end, step in (*_STEPS, (max_size, 64)):
        sizes += range(start + step, end + 1, step)
        start = max(start, end)
    return [size for size in sizes if size < max_size] + [max_size]


def bucket_for(size: int, buckets: list[int]) -> int | None:
    """The smallest bucket that holds `size` rows, or None if none does."""
    index = bisect_left(buckets, size)
    return buckets[index] if index < len(buckets) else None
