"""Chooses a replica for each prompt: by what it knows of the prompt, and by what waits there.

The router remembers which replica was given which beginnings of prompts, in pieces of PIECE tokens,
each found by a hash of all tokens up to its end. A replica's own cache may have forgotten some of
them; a wrong guess costs the computation of a prompt and nothing else.
"""

from __future__ import annotations

import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

PIECE = 16  # tokens; a chat is told from others with the same system prompt by its first piece
MAX_PIECES = 2**19  # remembered, over all replicas
MAX_PIECES_OF_A_PROMPT = 2048  # the beginning of a longer prompt tells replicas apart as well
# A prompt that goes on where one earlier prompt ended is a chat's next turn: it goes where that one
# went unless so many more tokens wait there than elsewhere, as all later turns move with it.
MAX_LEAD = 32_768
# Otherwise this many waiting tokens outweigh a known one. A system prompt that a single replica
# knows must not draw all requests there.
KNOWN_TOKEN_WEIGHT = 8


@dataclass(slots=True)
class _Piece:
    replicas: int = 0  # bit set
    num_prompts: int = 0


class PrefixRouter:
    """num_replicas: replicas are numbered from 0."""

    def __init__(self, num_replicas: int) -> None:
        self._num_replicas = num_replicas
        self._pieces: OrderedDict[int, _Piece] = OrderedDict()  # by hash, the latest last

    def choose(
        self, token_ids: Sequence[int], salt: str, outstanding: Sequence[int | None]
    ) -> list[int]:
        """The replicas that take requests, the best for this prompt first.

        outstanding: by replica, the tokens it has yet to compute; None: it takes no requests.
        """
        known, home = self._known(token_ids, salt)
        waiting = {i: tokens for i, tokens in enumerate(outstanding) if tokens is not None}
        ranked = sorted(waiting, key=lambda i: waiting[i] - KNOWN_TOKEN_WEIGHT * known[i])
        if home in waiting and waiting[home] <= min(waiting.values()) + MAX_LEAD:
            ranked.sort(key=lambda i: i != home)
        return ranked

    def note(self, token_ids: Sequence[int], salt: str, replica: int) -> None:
        """Remember that a replica has been given this prompt."""
        self.note_keys(hashes(token_ids, salt), replica)

    def note_keys(self, keys: Iterable[int], replica: int) -> None:
        """Remember a prompt by its `hashes`, which are the same in all processes."""
        for key in keys:
            piece = self._pieces.setdefault(key, _Piece())
            piece.replicas |= 1 << replica
            piece.num_prompts += 1
            self._pieces.move_to_end(key)
        while len(self._pieces) > MAX_PIECES:
            self._pieces.popitem(last=False)

    def forget(self, replica: int | None = None) -> None:
        """Forget what a replica knew, or all replicas: a new engine's cache is empty."""
        if replica is None:
            self._pieces.clear()
        for piece in self._pieces.values():
            piece.replicas &= ~(1 << (replica or 0))

    def _known(self, token_ids: Sequence[int], salt: str) -> tuple[list[int], int | None]:
        """By replica, how many tokens at the prompt's beginning it has been given.

        Also the replica to which the only prompt went that has all of these tokens, or None.
        """
        known, home = [0] * self._num_replicas, None
        still = (1 << self._num_replicas) - 1
        for count, key in enumerate(hashes(token_ids, salt), start=1):
            piece = self._pieces.get(key)
            still &= 0 if piece is None else piece.replicas
            if piece is None or not still:
                break
            for replica in range(self._num_replicas):
                if still >> replica & 1:
                    known[replica] = count * PIECE
            home = still.bit_length() - 1 if piece.num_prompts == 1 else None
        return known, home


def hashes(token_ids: Sequence[int], salt: str) -> Iterator[int]:
    """The hash of each whole piece and all before it."""
    # Of texts, Python's own hash differs between processes; of integers it does not.
    last, limit = (
        zlib.crc32(salt.encode(errors="replace")),
        min(len(token_ids), MAX_PIECES_OF_A_PROMPT * PIECE),
    )
    for start in range(0, limit - PIECE + 1, PIECE):
        last = hash((last, tuple(token_ids[start : start + PIECE])))
        yield last
