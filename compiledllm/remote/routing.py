"""Chooses a replica for each prompt: by what it knows of the prompt, and by what waits there.

The router remembers which replica was given which beginnings of prompts, each found by a hash of
all its tokens: beginnings of a multiple of SPACING pieces of PIECE tokens, and each prompt up to
its last whole piece. A replica's own cache may have forgotten some of them; a wrong guess costs the
computation of a prompt and nothing else.
"""

from __future__ import annotations

import zlib
from collections import OrderedDict
from collections.abc import Sequence

PIECE = 16  # tokens; a chat is told from others with the same system prompt by its first piece
SPACING = 8  # pieces; the others only tell where a prompt ended
MAX_BEGINNINGS = 2**19  # remembered, over all replicas
MAX_PIECES_OF_A_PROMPT = 2048  # the beginning of a longer prompt tells replicas apart as well
# A prompt that goes on where one earlier prompt ended is a chat's next turn: it goes where that one
# went unless so many more tokens wait there than elsewhere, as all later turns move with it.
MAX_LEAD = 65_536
# Otherwise this many waiting tokens outweigh a known one. A system prompt that a single replica
# knows must not draw all requests there.
KNOWN_TOKEN_WEIGHT = 8

_SHARED = 1  # a flag below the bits of replicas: several prompts begin so


def hashes(token_ids: Sequence[int], salt: str) -> list[int]:
    """The hash of each whole piece and all before it, the same in all processes."""
    # Of texts, Python's own hash differs between processes; of integers it does not.
    last, limit = zlib.crc32(salt.encode()), min(len(token_ids), MAX_PIECES_OF_A_PROMPT * PIECE)
    found = []
    for start in range(0, limit - PIECE + 1, PIECE):
        last = hash((last, *token_ids[start : start + PIECE]))
        found.append(last)
    return found


class PrefixRouter:
    """num_replicas: replicas are numbered from 0."""

    def __init__(self, num_replicas: int) -> None:
        # By hash, the latest last: the bits of the replicas that were given the beginning, and the
        # flag. A replica has one bit at a time, and another one after it was forgotten.
        self._beginnings: OrderedDict[int, int] = OrderedDict()
        self._bits = [2 << index for index in range(num_replicas)]
        self._replicas = {bit: index for index, bit in enumerate(self._bits)}
        self._next_bit = 2 << num_replicas

    def choose(self, keys: Sequence[int], outstanding: Sequence[int | None]) -> list[int]:
        """The replicas that take requests, the best for this prompt first.

        keys: the prompt's `hashes`. outstanding: by replica, the tokens it has yet to compute;
        None: it takes no requests.
        """
        known, home = self._known(keys)
        waiting = {i: tokens for i, tokens in enumerate(outstanding) if tokens is not None}
        rank = {i: tokens - KNOWN_TOKEN_WEIGHT * known.get(i, 0) for i, tokens in waiting.items()}
        ranked = sorted(rank, key=rank.__getitem__)
        if home in waiting and waiting[home] <= min(waiting.values()) + MAX_LEAD:
            ranked.remove(home)
            ranked.insert(0, home)
        return ranked

    def note(self, keys: Sequence[int], replica: int) -> None:
        """Remember that a replica has been given a prompt. keys: the prompt's `hashes`."""
        beginnings, bit = self._beginnings, self._bits[replica]
        # The shortest last, since the beginnings of a chat's turns are forgotten from their ends.
        ends = range(len(keys) - len(keys) % SPACING, 0, -SPACING)
        for end in ends if len(keys) % SPACING == 0 else (len(keys), *ends):
            key = keys[end - 1]
            found = beginnings.get(key)
            beginnings[key] = bit if found is None else found | bit | _SHARED
            beginnings.move_to_end(key)
        while len(beginnings) > MAX_BEGINNINGS:
            beginnings.popitem(last=False)

    def forget(self, replica: int | None = None) -> None:
        """Forget what a replica knew, or all replicas: a new engine's cache is empty."""
        if replica is None:
            self._beginnings.clear()
            return
        del self._replicas[self._bits[replica]]
        self._bits[replica] = self._next_bit
        self._replicas[self._next_bit] = replica
        self._next_bit <<= 1

    def _known(self, keys: Sequence[int]) -> tuple[dict[int, int], int | None]:
        """By replica, how many tokens at the prompt's beginning it has been given.

        Also the replica to which the only prompt went that has all of these tokens, or None.
        """
        found = [(n, at) for n, key in enumerate(keys, 1) if (at := self._beginnings.get(key))]
        known: dict[int, int] = {}
        left, home = sum(self._bits), None
        for count, at in reversed(found):
            new = at & left
            left &= ~at
            while new:
                bit = new & -new
                known[self._replicas[bit]] = count * PIECE
                new ^= bit
            if not left:
                break
        if found and not found[-1][1] & _SHARED:
            home = self._replicas.get(found[-1][1])
        return known, home
