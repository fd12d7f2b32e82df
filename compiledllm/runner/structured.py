"""Structured output: the grammar state of request rows, and the masks of allowed next tokens.

The host computes a bit mask over the vocabulary per row; the device applies the masks to all rows
with a grammar at once. A row's state follows from the output tokens alone, and is rebuilt from them
when the request enters the table again: after a preemption, a failed step or a restart.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from compiledllm.grammars.matcher import error_of
from compiledllm.runner.device import to_device
from compiledllm.runner.rule import Draw, Rule
from compiledllm.types import Grammar, NewRequest


class GrammarRows(Rule):
    """Bans the tokens that a request's grammar does not allow next. Keeps a matcher per row."""

    follows_output = True

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._matchers: dict[int, tuple[Grammar, Any]] = {}
        self._executor: Any = None
        bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
        self._banned_by = to_device((bits ^ 1).view(np.int64)[:, 0], device)  # [256], 8 bools each

    def fill(self, row: int, request: NewRequest) -> bool:
        if request.grammar is None:
            return False
        output = request.token_ids[request.spec.num_prompt_tokens :]
        self._matchers[row] = request.grammar, request.grammar.matcher(output)
        return True

    def release(self, row: int) -> None:
        del self._matchers[row]

    def record(self, row: int, token_id: int) -> None:
        """Advance the row's matcher by a token; -1, which means no token, is ignored."""
        if token_id >= 0:
            _, matcher = self._matchers[row]
            matcher.consume_token(token_id)

    def apply(self, logits: Tensor, draw: Draw) -> dict[int, str]:
        """Set the logits of tokens that a grammar forbids to -inf. Returns errors by batch index.

        logits: float32 [rows, vocab], edited in place. If a row's output is complete, its logits
        are set to 0 first, so that the end-of-sequence token, then the only one allowed, can be
        drawn even if another rule banned it.
        """
        if not self._matchers or not (with_grammar := draw.among(self._matchers)):
            return {}
        matchers = [self._matchers[row][1] for _, row in with_grammar]
        masks = self._compute([self._matchers[row] for _, row in with_grammar])
        is_all = len(with_grammar) == len(draw.rows)
        index = to_device(np.array([i for i, _ in with_grammar]), self._device)
        chosen = logits if is_all else logits[index]
        complete = np.array([matcher.is_stopped() for matcher in matchers])
        if complete.any():
            chosen.masked_fill_(to_device(complete[:, None], self._device, torch.bool), 0.0)
        chosen.masked_fill_(self._is_banned(masks), -torch.inf)
        if not is_all:
            logits[index] = chosen
        return {
            i: f"structured_outputs: {error_of(matcher)}"
            for (i, _), matcher in zip(with_grammar, matchers, strict=True)
            if matcher.is_error()
        }

    def _compute(self, rows: list[tuple[Grammar, Any]]) -> np.ndarray:
        """Compute masks uint32 [rows, words], a bit per token, lowest first, in several threads."""
        masks = np.zeros((len(rows), rows[0][0].num_mask_words), np.uint32)
        if len(rows) == 1:
            rows[0][1].unsafe_compute_mask_ptr(masks.ctypes.data, masks.nbytes)
        else:
            if self._executor is None:
                from llguidance import LLExecutor

                self._executor = LLExecutor()
            numbered = [(matcher, i) for i, (_, matcher) in enumerate(rows)]
            self._executor.unsafe_compute_mask_ptr(
                numbered, masks.ctypes.data, masks.strides[0], len(rows)
            )
        for i in np.flatnonzero(np.count_nonzero(masks, axis=1) == 1).tolist():
            grammar, matcher = rows[i]
            grammar.fix_mask(matcher, masks[i])
        return masks

    def _is_banned(self, masks: np.ndarray) -> Tensor:
        """Expand masks uint32 [rows, words] to bool [rows, vocab], True for forbidden tokens."""
        packed = to_device(masks.view(np.uint8), self._device, torch.uint8)  # [rows, bytes]
        return self._banned_by[packed.int()].view(torch.bool)[:, : self._vocab_size]
