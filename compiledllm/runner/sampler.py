"""Sampling beyond a step's plain draws: tokens under logits rules, and log probabilities.

A step draws a token for every row. For rows with logits rules, the sampler draws again and
overwrites the token. Log probabilities are computed from the model's logits, before any rule.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from compiledllm.kernels.collectives import broadcast
from compiledllm.kernels.logprobs import MAX_IN_TRITON, token_logprobs
from compiledllm.kernels.sampling import INVALID, draw_tokens
from compiledllm.runner.device import to_device
from compiledllm.runner.input_batch import StepLayout
from compiledllm.runner.pending import Extras, LogprobsBatch
from compiledllm.runner.request_table import RequestTable, num_best
from compiledllm.runner.rule import Draw

_REHEARSED_ROWS, _REHEARSED_BEST = 2, 2
WORKSPACE_BYTES = 256 * 2**20  # maximum for edited copies of logits, or for a prompt's logits


class Sampler:
    """Draws the next tokens of request rows with rules, and computes log probabilities.

    num_ranks: number of processes that draw the same tokens from the same logits.
    """

    def __init__(self, table: RequestTable, vocab_size: int, num_ranks: int = 1) -> None:
        self._table = table
        self._num_ranks = num_ranks
        self._vocab_size = vocab_size
        self._chunk_rows = max(1, WORKSPACE_BYTES // (32 * vocab_size))
        self._every_row = torch.arange(table.padding_row, device=table.device)

    def rows_to_draw(self, rows: np.ndarray, positions: np.ndarray) -> Tensor | None:
        """int64 [rows], the rows whose sampling parameters the step uses; None: `rows` themselves.

        `finish` draws again for a row with rules, so the step's draw is wasted. On a CPU a draw
        with filters takes up to 20 ms at a vocabulary of 152k, so the step uses the parameters of
        the padding row, which is greedy.
        """
        rules = self._table.rules
        if not rules.are_used or not (with_rules := rules.are_edited(rows, positions)).any():
            return None
        chosen = np.where(with_rules, self._table.padding_row, rows)
        return to_device(chosen, self._table.device)

    def finish(
        self,
        drawn: Tensor,
        logits: Tensor,
        rows: np.ndarray,
        positions: np.ndarray,
        last_tokens: Tensor | None,
        request_ids: list[str],
    ) -> Extras | None:
        """Draw again for rows with rules. Returns log probabilities and errors, or None.

        drawn: int64 [rows], the step's draws. The draws of rows with rules are overwritten, and so
        are these rows' last tokens in the request table. logits: [at least rows, vocab]. rows,
        positions: int64 [rows], request rows and the positions of the drawn tokens. last_tokens:
        int64 [rows], each sequence's last token before the draw; None if no rule reads last tokens.
        """
        extras = Extras()
        with_rules = np.flatnonzero(self._table.rules.are_edited(rows, positions))
        if len(with_rules):
            extras.errors = self._draw_for_all_rules(
                drawn, logits, with_rules, rows, positions, last_tokens, request_ids
            )
        if self._num_ranks > 1 and self._table.draws_on_first_rank[rows].any():
            self._take_from_first_rank(drawn, rows)
        with_logprobs = np.flatnonzero(self._table.wants_logprobs[rows])
        if len(with_logprobs):
            extras.logprobs = self._logprobs(drawn, logits, rows, with_logprobs, request_ids)
        return extras if len(with_rules) or len(with_logprobs) else None

    def rehearse(self, logits: Tensor) -> None:
        """Run the kernels for rows with rules and for log probabilities, without waiting for them.

        logits: [rows, vocab]. A few rows are enough, as kernels do not depend on their number.
        """
        logits = logits[:_REHEARSED_ROWS]
        rows = self._every_row[: len(logits)]
        tokens = draw_tokens(logits.float(), rows, rows, self._table.sampling)
        _logprobs_of(logits, rows, tokens, [_REHEARSED_BEST] * len(logits))

    def _take_from_first_rank(self, drawn: Tensor, rows: np.ndarray) -> None:
        """Replace the draws, int64 [rows], and the rows' last tokens by those of rank 0."""
        broadcast(drawn)
        self._table.last_token_ids[to_device(rows, drawn.device)] = drawn.clamp(min=0)

    def _draw_for_all_rules(
        self,
        drawn: Tensor,
        logits: Tensor,
        with_rules: np.ndarray,
        rows: np.ndarray,
        positions: np.ndarray,
        last_tokens: Tensor | None,
        request_ids: list[str],
    ) -> dict[str, str]:
        """Draw at the batch indices `with_rules`, in chunks. Returns errors by request id."""
        errors_by_id: dict[str, str] = {}
        for start in range(0, len(with_rules), self._chunk_rows):
            chunk = with_rules[start : start + self._chunk_rows]
            errors = self._draw_by_rules(
                drawn, logits, last_tokens, chunk, rows[chunk], positions[chunk]
            )
            errors_by_id |= {request_ids[chunk[i]]: error for i, error in errors.items()}
        return errors_by_id

    def _draw_by_rules(
        self,
        drawn: Tensor,
        logits: Tensor,
        last_tokens: Tensor | None,
        index: np.ndarray,
        rows: np.ndarray,
        positions: np.ndarray,
    ) -> dict[int, str]:
        """Draw at the batch indices `index`. Returns errors by position in `index`.

        index, rows, positions: int64 [chunk]; `index` selects from `drawn`, `logits` and
        `last_tokens`. rows, positions: request rows and positions of the drawn tokens.
        """
        table, device = self._table, logits.device
        batch_index, request_rows, device_positions = to_device(
            np.array([index, rows, positions]), device
        )
        edited = logits[batch_index].float()
        last = None if last_tokens is None else last_tokens[batch_index]
        draw = Draw(rows, positions, last)
        errors = table.rules.apply(edited, draw)
        tokens = draw_tokens(edited, request_rows, device_positions, table.sampling)
        if errors:
            tokens[list(errors)] = INVALID
        table.rules.count(draw, tokens)
        drawn[batch_index] = tokens
        table.last_token_ids[request_rows] = tokens.clamp_(min=0)
        return errors

    def _logprobs(
        self,
        drawn: Tensor,
        logits: Tensor,
        rows: np.ndarray,
        with_logprobs: np.ndarray,
        request_ids: list[str],
    ) -> list[tuple[list[str], LogprobsBatch]]:
        """Log probabilities at the batch indices `with_logprobs`.

        Rows with more than MAX_IN_TRITON most likely tokens are computed apart from other rows.
        """
        is_many = self._table.num_logprobs[rows[with_logprobs]] > MAX_IN_TRITON
        results = []
        for group in (with_logprobs[~is_many], with_logprobs[is_many]):
            if len(group):
                batch_index, chosen = self._every_row[: len(group)], drawn
                if len(group) < len(rows):
                    batch_index = to_device(group, logits.device)
                    chosen = drawn[batch_index]
                counts = self._table.num_logprobs[rows[group]].tolist()
                named = [self._table.named_logprobs[row] for row in rows[group].tolist()]
                result = _logprobs_of(logits, batch_index, chosen, counts, named)
                results.append(([request_ids[i] for i in group.tolist()], result))
        return results

    def prompt_logprobs(
        self, layout: StepLayout, hidden: Tensor, compute_logits: Callable[[Tensor], Tensor]
    ) -> list[tuple[str, int, LogprobsBatch]]:
        """Log probabilities of prompt tokens, for requests that want them.

        hidden: [tokens, hidden]. Returns (request id, first position, log probabilities) of each
        chunk of a request's tokens.
        """
        found: list[tuple[str, int, LogprobsBatch]] = []
        row_ends = np.cumsum(layout.counts)
        for index in np.flatnonzero(self._table.wants_prompt_logprobs[layout.rows]):
            tokens = hidden[row_ends[index] - layout.counts[index] : row_ends[index]]
            first, row = int(layout.computed[index]) + 1, int(layout.rows[index])
            found += [
                (layout.request_ids[index], position, logprobs)
                for position, logprobs in self._prompt_logprobs_of(
                    row, tokens, first, compute_logits
                )
            ]
        return found

    def _prompt_logprobs_of(
        self,
        row: int,
        hidden: Tensor,
        first: int,
        compute_logits: Callable[[Tensor], Tensor],
    ) -> list[tuple[int, LogprobsBatch]]:
        """Log probabilities of a request's prompt tokens `first`, `first` + 1, ...

        hidden: [tokens, hidden]; element i predicts prompt token `first` + i. Returns (first
        position, log probabilities) for each chunk of tokens.
        """
        params = self._table.params[row]
        assert params is not None
        tokens = self._table.token_ids[row][first : self._table.num_prompt_tokens[row]]
        hidden = hidden[: len(tokens)]
        chosen = to_device(tokens[: len(hidden)], hidden.device)
        best = num_best(params.prompt_logprobs, self._vocab_size)
        chunks = []
        for start in range(0, len(hidden), self._chunk_rows):
            chunk = hidden[start : start + self._chunk_rows]
            logits = compute_logits(chunk)
            rows = torch.arange(len(chunk), device=hidden.device)
            own = chosen[start : start + len(chunk)]
            chunks.append((first + start, _logprobs_of(logits, rows, own, [best] * len(chunk))))
        return chunks


def _logprobs_of(
    logits: Tensor,
    rows: Tensor,
    chosen: Tensor,
    num_best: list[int],
    named: list[list[int]] | None = None,
) -> LogprobsBatch:
    """Per row, the log probabilities of a chosen token, the most likely tokens and named tokens.

    logits: [at least rows, vocab]. rows, chosen: int64 [rows], row indices of the logits and chosen
    tokens. num_best, named: per row, the number of most likely tokens, and further token ids.
    """
    named = named or [[]] * len(num_best)
    width = max(map(len, named))
    named_ids = rows.new_empty((len(named), 0))
    if width:
        padded = np.array([ids + [0] * (width - len(ids)) for ids in named], np.int64)
        named_ids = to_device(padded, logits.device)
    found = token_logprobs(logits, rows, chosen, max(num_best), named_ids)
    num_returned = [(best, len(ids)) for best, ids in zip(num_best, named, strict=True)]
    return LogprobsBatch(found, max(num_best), num_returned)
