"""From a step's logits to its tokens: plain draws for all rows, and more for those that ask.

What a captured step has drawn is overwritten for the rows whose requests have rules for their
logits; the others keep what they have. Log probabilities are the model's own, of logits that no
rule has touched.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from compiledllm.kernels.logprobs import MOST_IN_TRITON, token_logprobs
from compiledllm.kernels.sampling import INVALID, draw_tokens
from compiledllm.runner.device import to_device
from compiledllm.runner.pending import Extras, LogprobsOf
from compiledllm.runner.request_table import RequestTable, num_best

WORKSPACE_BYTES = 256 * 2**20  # for edited copies of logits, or for a prompt's


class Sampler:
    """Draws the next tokens of request rows."""

    def __init__(self, table: RequestTable, vocab_size: int) -> None:
        self._table = table
        self._vocab_size = vocab_size
        self._rows_at_once = max(1, WORKSPACE_BYTES // (32 * vocab_size))
        self._every_row = torch.arange(table.padding_row, device=table.device)

    def draw(self, logits: Tensor, rows: np.ndarray, positions: np.ndarray) -> Tensor:
        """Token ids int64 [rows], of rows without rules; those with rules are left undefined.

        logits: [rows, vocab]. positions: where the drawn tokens will stand.
        """
        plain = np.flatnonzero(~self._table.rules.asks(rows, positions))
        device = logits.device
        if len(plain) == len(rows):
            index = to_device(rows, device), to_device(positions, device)
            return draw_tokens(logits, *index, self._table.asked)
        drawn = torch.zeros(len(rows), dtype=torch.int64, device=device)
        if len(plain):
            chosen = to_device(plain, device)
            index = to_device(rows[plain], device), to_device(positions[plain], device)
            drawn[chosen] = draw_tokens(logits[chosen], *index, self._table.asked)
        return drawn

    def finish(
        self,
        drawn: Tensor,
        logits: Tensor,
        rows: np.ndarray,
        positions: np.ndarray,
        last_tokens: Tensor | None,
        request_ids: list[str],
    ) -> Extras | None:
        """Draw for rows that have rules; and what is to be told of the tokens.

        drawn: int64 [rows], written, and the rows' last tokens with it.
        last_tokens: int64 [rows], of the sequences so far; None if no rule reads them.
        """
        extras = Extras()
        asking = np.flatnonzero(self._table.rules.asks(rows, positions))
        if len(asking):
            extras.errors = self._draw_for_asking(
                drawn, logits, asking, rows, positions, last_tokens, request_ids
            )
        telling = np.flatnonzero(self._table.wants_logprobs[rows])
        if len(telling):
            extras.logprobs = self._logprobs(drawn, logits, rows, telling, request_ids)
        return extras if len(asking) or len(telling) else None

    def _draw_for_asking(
        self,
        drawn: Tensor,
        logits: Tensor,
        asking: np.ndarray,
        rows: np.ndarray,
        positions: np.ndarray,
        last_tokens: Tensor | None,
        request_ids: list[str],
    ) -> dict[str, str]:
        """Those at the indices `asking`, some at a time; what went wrong, by request id."""
        found: dict[str, str] = {}
        for start in range(0, len(asking), self._rows_at_once):
            some = asking[start : start + self._rows_at_once]
            errors = self._draw_by_rules(
                drawn, logits, last_tokens, some, rows[some], positions[some]
            )
            found |= {request_ids[some[i]]: error for i, error in errors.items()}
        return found

    def _draw_by_rules(
        self,
        drawn: Tensor,
        logits: Tensor,
        last_tokens: Tensor | None,
        index: np.ndarray,
        rows: np.ndarray,
        positions: np.ndarray,
    ) -> dict[int, str]:
        table, device = self._table, logits.device
        at, sampled, where = to_device(np.array([index, rows, positions]), device)
        edited = logits[at].float()
        last = None if last_tokens is None else last_tokens[at]
        errors = table.rules.apply(edited, rows, positions, last)
        tokens = draw_tokens(edited, sampled, where, table.asked)
        if errors:
            tokens[list(errors)] = INVALID
        table.rules.count(rows, positions, tokens)
        drawn[at] = tokens
        table.last_token_ids[sampled] = tokens.clamp_(min=0)
        return errors

    def _logprobs(
        self,
        drawn: Tensor,
        logits: Tensor,
        rows: np.ndarray,
        telling: np.ndarray,
        request_ids: list[str],
    ) -> list[tuple[list[str], LogprobsOf]]:
        """Of the drawn tokens; those that want very many apart from the rest."""
        is_many = self._table.num_logprobs[rows[telling]] > MOST_IN_TRITON
        found = []
        for group in (telling[~is_many], telling[is_many]):
            if len(group):
                at, chosen = self._every_row[: len(group)], drawn
                if len(group) < len(rows):
                    at = to_device(group, logits.device)
                    chosen = drawn[at]
                counts = self._table.num_logprobs[rows[group]].tolist()
                named = [self._table.named_logprobs[row] for row in rows[group].tolist()]
                result = _logprobs_of(logits, at, chosen, counts, named)
                found.append(([request_ids[i] for i in group.tolist()], result))
        return found

    def prompt_logprobs(
        self,
        row: int,
        hidden: Tensor,
        first: int,
        compute_logits: Callable[[Tensor], Tensor],
    ) -> list[tuple[int, LogprobsOf]]:
        """Of a request's prompt tokens `first`, `first` + 1, ..., which `hidden` predicts.

        hidden: [tokens, hidden]. Returns (position, log probabilities from it on) for each chunk.
        """
        params = self._table.params[row]
        assert params is not None
        tokens = self._table.token_ids[row][first : self._table.num_prompt_tokens[row]]
        hidden = hidden[: len(tokens)]
        chosen = to_device(tokens[: len(hidden)], hidden.device)
        best = num_best(params.prompt_logprobs, self._vocab_size)
        chunks = []
        for start in range(0, len(hidden), self._rows_at_once):
            some = hidden[start : start + self._rows_at_once]
            logits = compute_logits(some)
            rows = torch.arange(len(some), device=hidden.device)
            own = chosen[start : start + len(some)]
            chunks.append((first + start, _logprobs_of(logits, rows, own, [best] * len(some))))
        return chunks


def _logprobs_of(
    logits: Tensor,
    rows: Tensor,
    chosen: Tensor,
    num_best: list[int],
    named: list[list[int]] | None = None,
) -> LogprobsOf:
    """num_best, named: of each row."""
    named = named or [[]] * len(num_best)
    width = max(map(len, named))
    asked_for = rows.new_empty((len(named), 0))
    if width:
        padded = np.array([ids + [0] * (width - len(ids)) for ids in named], np.int64)
        asked_for = to_device(padded, logits.device)
    found = token_logprobs(logits, rows, chosen, max(num_best), asked_for)
    shares = [(best, len(ids)) for best, ids in zip(num_best, named, strict=True)]
    return LogprobsOf(found, max(num_best), shares)
