"""Counts the tokens of an answer's reasoning."""

from __future__ import annotations

from typing import Any


class ReasoningCount:
    """Counts the tokens of an answer up to the end of its reasoning.

    end_id: the token that ends reasoning; None if the vocabulary has none. The tokens of a piece
    with reasoning and other text are then divided in proportion to the lengths of both texts.
    """

    def __init__(self, end_id: int | None) -> None:
        self._end_id = end_id
        self._count = 0
        self._is_reasoning, self._is_over = False, False

    @property
    def total(self) -> int:
        return self._count if self._is_reasoning else 0

    def add(self, token_ids: list[int], *deltas: dict[str, Any]) -> int:
        """How many of the piece's first tokens are of the reasoning."""
        if self._is_over:
            return 0
        reasoning = "".join(delta.get("reasoning", "") for delta in deltas)
        content = "".join(delta.get("content", "") for delta in deltas)
        self._is_reasoning |= bool(reasoning)
        num = len(token_ids)
        if self._is_reasoning and self._end_id in token_ids:
            num, self._is_over = token_ids.index(self._end_id) + 1, True
        elif content or any("tool_calls" in delta for delta in deltas):
            num = round(num * len(reasoning) / max(1, len(reasoning) + len(content)))
            self._is_over = True
        self._count += num
        return num if self._is_reasoning else 0
