"""Chooses a replica for each prompt, by how much of the prompt it knows and how much waits there.

The router remembers prefixes ("beginnings") of the prompts that each replica was given. The
remembered prefixes of a prompt end after every SPACING pieces of PIECE tokens, and after the last
whole piece; each is found by a hash of all its tokens. A replica's own prefix cache may have
evicted a prefix; such a wrong guess only means that the prompt is computed again.
"""

from __future__ import annotations

import zlib
from collections import OrderedDict
from collections.abc import Sequence

PIECE = 16  # tokens; short enough that chats with the same system prompt soon differ in a piece
SPACING = 8  # pieces between remembered beginnings, besides the end of each prompt
MAX_BEGINNINGS = 2**19  # remembered, over all replicas
MAX_PIECES_OF_A_PROMPT = 2048  # for routing, the beginning of a longer prompt suffices
# If a prompt goes on where a single earlier prompt ended, it is a chat's next turn and goes to the
# same replica, unless more than this many more tokens wait there than elsewhere. The lead is large
# because all later turns follow a turn that moves.
MAX_LEAD = 65_536
# For other prompts, one known token counts as much as this many waiting tokens. A system prompt
# that a single replica knows must not draw all requests there.
KNOWN_TOKEN_WEIGHT = 8

_SHARED = 1  # a flag below the bits of replicas: several prompts have this beginning


def hashes(token_ids: Sequence[int], salt: str) -> list[int]:
    """For each whole piece, the hash of all tokens up to its end; equal in all processes."""
    # Python's hash of integers is the same in all processes; its hash of strings is not.
    last, limit = zlib.crc32(salt.encode()), min(len(token_ids), MAX_PIECES_OF_A_PROMPT * PIECE)
    found = []
    for start in range(0, limit - PIECE + 1, PIECE):
        last = hash((last, *token_ids[start : start + PIECE]))
        found.append(last)
    return found


class PrefixRouter:
    """The prefixes that each replica was given. Replicas are numbered from 0."""

    def __init__(self, num_replicas: int) -> None:
        # Hash of a beginning -> the bits of the replicas that were given the beginning, and the
        # flag _SHARED; the latest last. A replica gets a new bit by `forget`.
        self._beginnings: OrderedDict[int, int] = OrderedDict()
        self._bits = [2 << index for index in range(num_replicas)]
        self._replicas = {bit: index for index, bit in enumerate(self._bits)}
        self._next_bit = 2 << num_replicas

    def choose(self, keys: Sequence[int], outstanding: Sequence[int | None]) -> list[int]:
        """The replicas that take requests, the best for this prompt first.

        keys: the prompt's `hashes`. outstanding: per replica, the number of tokens that it has yet
        to compute; None: the replica takes no requests.
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
        # The shortest beginning is noted last, so that long beginnings are evicted first.
        ends = range(len(keys) - len(keys) % SPACING, 0, -SPACING)
        for end in ends if len(keys) % SPACING == 0 else (len(keys), *ends):
            key = keys[end - 1]
            found = beginnings.get(key)
            beginnings[key] = bit if found is None else found | bit | _SHARED
            beginnings.move_to_end(key)
        while len(beginnings) > MAX_BEGINNINGS:
            beginnings.popitem(last=False)

    def forget(self, replica: int | None = None) -> None:
        """Forget the beginnings of a replica, whose engine is new; None: of all replicas."""
        if replica is None:
            self._beginnings.clear()
            return
        del self._replicas[self._bits[replica]]
        self._bits[replica] = self._next_bit
        self._replicas[self._next_bit] = replica
        self._next_bit <<= 1

    def _known(self, keys: Sequence[int]) -> tuple[dict[int, int], int | None]:
        """The number of the prompt's tokens that each replica was given before, and the home.

        The home is the replica that was given the longest known beginning, if exactly one earlier
        prompt had this beginning; otherwise None.
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
