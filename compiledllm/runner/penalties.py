"""Penalties on tokens that a request's prompt or output contains.

Token counts live on the device, since the host often does not know the last token yet.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from compiledllm.runner.device import to_device
from compiledllm.runner.rule import Draw, KeptTensors, Rule
from compiledllm.sampling_params import SamplingParams
from compiledllm.types import NewRequest

_IN_PROMPT = 1 << 30  # flag bit next to a token's count in the output: the prompt has the token


class Penalties(Rule):
    """Repetition, frequency and presence penalties.

    Each request with penalties has a slot: a row of the token counts, int32 [slots, vocab]. Slots
    are added as requests need them, up to `num_rows`.
    """

    def __init__(self, num_rows: int, vocab_size: int, device: torch.device) -> None:
        self._device = device
        self._num_rows = num_rows
        self._counts = torch.zeros((0, vocab_size), dtype=torch.int32, device=device)
        self._free_slots: list[int] = []
        self._slot_of: dict[int, int] = {}
        self._params_of: dict[int, SamplingParams] = {}
        self._kept = KeptTensors(self._make)

    @staticmethod
    def max_bytes(num_rows: int, vocab_size: int) -> int:
        """Bytes of the token counts if every row has penalties."""
        return num_rows * vocab_size * 4

    def fill(self, row: int, request: NewRequest) -> bool:
        params = request.spec.sampling_params
        if not params.has_penalties:
            return False
        self._slot_of[row] = self._fill_slot(request.token_ids, request.spec.num_prompt_tokens)
        self._params_of[row] = params
        self._kept.clear()
        return True

    def release(self, row: int) -> None:
        del self._params_of[row]
        self._free_slots.append(self._slot_of.pop(row))
        self._kept.clear()

    def apply(self, logits: Tensor, draw: Draw) -> dict[int, str]:
        if self._slot_of and (tensors := self._kept.of(draw)):
            index, slots, amounts = tensors
            if logits.is_cuda:
                from compiledllm.kernels.penalties_triton import penalize

                penalize(logits, index, slots, amounts, self._counts, _IN_PROMPT)
            else:
                self._penalize(logits, index, slots, amounts)
        return {}

    def count(self, draw: Draw, token_ids: Tensor) -> None:
        """Count the tokens, int64 [rows], that these rows drew after `apply`."""
        if not self._slot_of or not (tensors := self._kept.of(draw)):
            return
        index, slots, _ = tensors
        if token_ids.is_cuda:
            from compiledllm.kernels.penalties_triton import count_tokens

            count_tokens(token_ids, index, slots, self._counts)
        else:
            self._counts[slots, token_ids[index].clamp(min=0)] += 1  # no two rows share a slot

    def _fill_slot(self, token_ids: list[int], num_prompt_tokens: int) -> int:
        """Allocate a slot, count the request's tokens in it, and return its index."""
        vocab_size = self._counts.shape[1]
        if not self._free_slots:
            size = len(self._counts)
            more = min(max(size, 4), self._num_rows - size)
            self._free_slots += range(size, size + more)
            self._counts = torch.cat((self._counts, self._counts.new_zeros((more, vocab_size))))
        slot = self._free_slots.pop()
        counts = np.zeros(vocab_size, np.int32)
        np.add.at(counts, token_ids[num_prompt_tokens:], 1)
        counts[token_ids[:num_prompt_tokens]] |= _IN_PROMPT
        self._counts[slot] = to_device(counts, self._device, torch.int32)
        return slot

    def _penalize(self, logits: Tensor, index: Tensor, slots: Tensor, amounts: Tensor) -> None:
        for row_index, slot, (repetition, frequency, presence) in zip(
            index.tolist(), slots.tolist(), amounts.t().tolist(), strict=True
        ):
            seen = self._counts[slot].numpy()
            tokens = np.flatnonzero(seen)  # usually few of the vocabulary's tokens
            counts, row = seen[tokens] & (_IN_PROMPT - 1), logits[row_index].numpy()
            x = row[tokens]
            x = np.where(x > 0, x / np.float32(repetition), x * np.float32(repetition))
            row[tokens] = x - frequency * counts - presence * (counts > 0)

    def _make(self, draw: Draw) -> tuple[Tensor, Tensor, Tensor] | None:
        """Batch index and slot of each row with penalties; amounts float32 [3, rows]."""
        penalized = draw.among(self._slot_of)
        if not penalized:
            return None
        params = [self._params_of[row] for _, row in penalized]
        amounts = [
            [max(p.repetition_penalty, 1e-6) for p in params],  # bounded, as logits are divided
            [p.frequency_penalty for p in params],
            [p.presence_penalty for p in params],
        ]
        return (
            to_device(np.array([index for index, _ in penalized]), self._device),
            to_device(np.array([self._slot_of[row] for _, row in penalized]), self._device),
            to_device(np.array(amounts), self._device, torch.float32),
        )
