"""Structured output: the grammar state of request rows, and the masks of allowed next tokens.

The host computes a bit mask over the vocabulary per row, and the device applies all masks at once.
Rows whose outputs are still in their reasoning have no mask. A row's state depends on the output
tokens alone, and is rebuilt from them when the request enters the table again: after a preemption,
a failed step or a restart.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from compiledllm.grammars.matcher import error_of
from compiledllm.runner.device import to_device
from compiledllm.runner.output_state import OutputState
from compiledllm.runner.rule import Draw, Rule
from compiledllm.types import NewRequest


class GrammarRows(Rule):
    """Bans the tokens that a request's grammar does not allow next."""

    follows_output = True

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._states: dict[int, OutputState] = {}  # by request row
        self._executor: Any = None
        bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
        self._banned_by = to_device((bits ^ 1).view(np.int64)[:, 0], device)  # [256], 8 bools each

    def fill(self, row: int, request: NewRequest) -> bool:
        if request.grammar is None:
            return False
        output = request.token_ids[request.spec.num_prompt_tokens :]
        self._states[row] = OutputState(request.grammar, output, request.spec.reasoning)
        return True

    def release(self, row: int) -> None:
        del self._states[row]

    def record(self, row: int, token_id: int) -> None:
        """Advance the row's state by a token; -1, which means no token, is ignored."""
        if token_id >= 0:
            self._states[row].consume(token_id)

    def apply(self, logits: Tensor, draw: Draw) -> dict[int, str]:
        """Set the logits of tokens that a grammar forbids to -inf. Returns errors by batch index.

        logits: float32 [rows, vocab], edited in place. If a row's output is complete, its logits
        are set to 0 first, so that the end-of-sequence token, then the only one allowed, can be
        drawn even if another rule banned it. NaN and +inf stay, as no token may be drawn from them.
        """
        if not self._states:
            return {}
        found = ((i, self._states[row]) for i, row in draw.among(self._states))
        masked = [(i, state) for i, state in found if state.matcher is not None]
        if not masked:
            return {}
        masks = self._compute([state for _, state in masked])
        is_all = len(masked) == len(draw.rows)
        index = to_device(np.array([i for i, _ in masked]), self._device)
        chosen = logits if is_all else logits[index]
        complete = np.array([state.matcher.is_stopped() for _, state in masked])
        if complete.any():
            is_complete = to_device(complete[:, None], self._device, torch.bool)
            chosen.masked_fill_(is_complete & (chosen < torch.inf), 0.0)
        chosen.masked_fill_(self._is_banned(masks), -torch.inf)
        if not is_all:
            logits[index] = chosen
        return {
            i: f"structured_outputs: {error_of(state.matcher)}"
            for i, state in masked
            if state.matcher.is_error()
        }

    def _compute(self, states: list[OutputState]) -> np.ndarray:
        """Compute masks uint32 [rows, words], a bit per token, lowest first, in several threads."""
        masks = np.zeros((len(states), states[0].grammar.num_mask_words), np.uint32)
        if len(states) == 1:
            states[0].matcher.unsafe_compute_mask_ptr(masks.ctypes.data, masks.nbytes)
        else:
            if self._executor is None:
                from llguidance import LLExecutor

                self._executor = LLExecutor()
            numbered = [(state.matcher, i) for i, state in enumerate(states)]
            self._executor.unsafe_compute_mask_ptr(
                numbered, masks.ctypes.data, masks.strides[0], len(states)
            )
        for i in np.flatnonzero(np.count_nonzero(masks, axis=1) == 1).tolist():
            states[i].grammar.fix_mask(states[i].matcher, masks[i])
        for i, state in enumerate(states):
            for token_id in state.others:
                masks[i, token_id // 32] |= np.uint32(1 << token_id % 32)
        return masks

    def _is_banned(self, masks: np.ndarray) -> Tensor:
        """Expand masks uint32 [rows, words] to bool [rows, vocab], True for forbidden tokens."""
        packed = to_device(masks.view(np.uint8), self._device, torch.uint8)  # [rows, bytes]
        return self._banned_by[packed.int()].view(torch.bool)[:, : self._vocab_size]
