"""Log probabilities as callers get them: the dictionary of a position is built on access.

A position's dictionary has one object per token; building the dictionaries of thousands of
positions that the caller never reads would waste time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, overload

from compiledllm.outputs import Logprob, PositionLogprobs
from compiledllm.types import TokenLogprobs


class LogprobList(Sequence[Any]):
    """A sequence with a dictionary of log probabilities, or None, for each position.

    positions: must not change any more. text_of: the text of a token id; None without a tokenizer.
    """

    def __init__(
        self,
        positions: Sequence[TokenLogprobs | None],
        text_of: Callable[[int], str] | None,
    ) -> None:
        self._positions = positions
        self._text_of = text_of

    def __len__(self) -> int:
        return len(self._positions)

    @overload
    def __getitem__(self, index: int) -> PositionLogprobs | None: ...
    @overload
    def __getitem__(self, index: slice) -> LogprobList: ...
    def __getitem__(self, index: int | slice) -> PositionLogprobs | None | LogprobList:
        if isinstance(index, slice):
            return LogprobList(self._positions[index], self._text_of)
        return self._made(self._positions[index])

    def __iter__(self) -> Iterator[PositionLogprobs | None]:
        return map(self._made, self._positions)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(list(self))

    def _made(self, position: TokenLogprobs | None) -> PositionLogprobs | None:
        return None if position is None else position_logprobs(position, self._text_of)


def position_logprobs(
    position: TokenLogprobs, text_of: Callable[[int], str] | None
) -> PositionLogprobs:
    """A position's log probabilities by token id; the position's own token comes first."""
    token_ids, logprobs, own_rank, num_best = position
    ranks = [own_rank, *range(1, 1 + num_best), *[None] * (len(token_ids) - 1 - num_best)]
    found: PositionLogprobs = {}
    for token_id, logprob, rank in zip(token_ids, logprobs, ranks, strict=True):
        if token_id not in found or (found[token_id].rank is None and rank is not None):
            text = None if text_of is None else text_of(token_id)
            found[token_id] = Logprob(logprob, rank, text)
    return found
