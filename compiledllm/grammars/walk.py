"""Looks for dead ends of a grammar by writing random outputs before a request uses the grammar."""

from __future__ import annotations

import random
import time
from typing import Any

from compiledllm.grammars.matcher import checked, error_of

MAX_WALK_S = 0.03
MAX_TOKENS = 64
NUM_WALKS = 4


def find_dead_end(start: Any) -> None:
    """Raise ValueError if a random output leads to a dead end. Other dead ends may remain."""
    end = time.monotonic() + MAX_WALK_S
    for seed in range(NUM_WALKS):
        matcher, draw = start.deep_copy(), random.Random(seed)
        for _ in range(MAX_TOKENS):
            if time.monotonic() > end:
                return
            mask = int.from_bytes(checked(matcher.compute_bitmask), "little")
            if matcher.is_error():
                _refuse(error_of(matcher))
            if matcher.is_stopped():
                break
            if not mask:
                _refuse("no token may follow")
            if not matcher.consume_token(_one_of(mask, draw)):
                break


def _one_of(mask: int, draw: random.Random) -> int:
    """A random token id whose bit is set."""
    skip = draw.randrange(mask.bit_length())
    rest = mask >> skip
    return (rest & -rest).bit_length() - 1 + skip


def _refuse(cause: str) -> None:
    raise ValueError(f"structured_outputs cannot be compiled: {cause}")
