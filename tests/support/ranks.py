"""Processes of ranks that outlive engines, since a process takes seconds to import torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from compiledllm.engine import executor
from compiledllm.engine.rank_processes import RankGroup


class LastingRanks(RankGroup):
    """Ranks that build the model of one engine after the other, and that no engine ends."""

    def end(self) -> None:
        pass

    def close(self) -> None:
        super().end()


@contextmanager
def lasting_ranks(num_ranks: int) -> Iterator[LastingRanks]:
    """Inside the block, engines with tensor_parallel_size=num_ranks share the ranks on the CPU."""
    ranks = LastingRanks(num_ranks, lambda _: "cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executor, "start_ranks", lambda _: ranks)
        try:
            yield ranks
        finally:
            ranks.close()
