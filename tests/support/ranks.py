"""Rank processes that outlive an engine, since each process takes seconds to import torch."""

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
    """Ranks that serve one engine after another. An engine cannot end them; `close` does."""

    def end(self) -> None:
        pass

    def close(self) -> None:
        super().end()


@contextmanager
def lasting_ranks(num_ranks: int, kind: str = "cpu") -> Iterator[LastingRanks]:
    """Inside the block, engines with tensor_parallel_size=num_ranks share the ranks.

    kind: "cpu": all ranks run on the CPU; "cuda": each rank has a GPU.
    """
    ranks = LastingRanks(num_ranks, lambda rank: kind if kind == "cpu" else f"{kind}:{rank}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executor, "start_ranks", lambda _: ranks)
        try:
            yield ranks
        finally:
            ranks.close()
