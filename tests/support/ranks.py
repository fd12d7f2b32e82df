"""Processes of ranks that outlive engines, since a process takes seconds to import torch."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from compiledllm.engine import executor
from compiledllm.engine.rank_processes import RankGroup

GREEDY = {"temperature": 0, "max_tokens": 6, "ignore_eos": True}
PROMPTS = [[random.Random(n).randrange(3, 128) for _ in range(n)] for n in (1, 40, 90)]
FIXED: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "skip_tokenizer_init": True,
    "enforce_eager": True,
    "num_kv_blocks": 64,
}


class LastingRanks(RankGroup):
    """Ranks that build the model of one engine after the other, and that no engine ends."""

    def end(self) -> None:
        pass

    def close(self) -> None:
        super().end()


@contextmanager
def lasting_ranks(num_ranks: int, kind: str = "cpu") -> Iterator[LastingRanks]:
    """Inside the block, engines with tensor_parallel_size=num_ranks share the ranks.

    kind: where the ranks run, all on the CPU or each on a GPU ("cuda").
    """
    ranks = LastingRanks(num_ranks, lambda rank: kind if kind == "cpu" else f"{kind}:{rank}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executor, "start_ranks", lambda _: ranks)
        try:
            yield ranks
        finally:
            ranks.close()
