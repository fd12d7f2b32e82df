"""Rules about given tokens: logit bias, allowed tokens, min_tokens, bad words.

Each rule keeps its index tensors on the device as long as the same rows draw.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from compiledllm.runner.device import to_device
from compiledllm.runner.rule import Draw, KeptTensors, Rule, columns
from compiledllm.types import NewRequest

_INT, _FLOAT = torch.int64, torch.float32


class LogitBias(Rule):
    """Adds to each token's logit the amount that the request's `logit_bias` names."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._bias_of: dict[int, Mapping[int, float]] = {}  # row -> token id -> amount
        self._kept = KeptTensors(self._make)

    def fill(self, row: int, request: NewRequest) -> bool:
        if not (bias := request.spec.sampling_params.logit_bias):
            return False
        self._bias_of[row] = bias
        self._kept.clear()
        return True

    def release(self, row: int) -> None:
        del self._bias_of[row]
        self._kept.clear()

    def apply(self, logits: Tensor, draw: Draw) -> dict[int, str]:
        if self._bias_of and (tensors := self._kept.of(draw)):
            index, token, amount = tensors
            logits.index_put_((index, token), amount, accumulate=True)
        return {}

    def _make(self, draw: Draw) -> tuple[Tensor, ...] | None:
        """Batch index, token id and amount of each bias."""
        lines = [
            (index, token, amount)
            for index, row in draw.among(self._bias_of)
            for token, amount in self._bias_of[row].items()
        ]
        return columns(lines, self._device, _INT, _INT, _FLOAT)


class AllowedTokens(Rule):
    """Bans all tokens but those that the request allows."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._allowed_in: dict[int, list[int]] = {}
        self._kept = KeptTensors(self._make)

    def fill(self, row: int, request: NewRequest) -> bool:
        if not (allowed := request.spec.sampling_params.allowed_token_ids):
            return False
        self._allowed_in[row] = allowed
        self._kept.clear()
        return True

    def release(self, row: int) -> None:
        del self._allowed_in[row]
        self._kept.clear()

    def apply(self, logits: Tensor, draw: Draw) -> dict[int, str]:
        if self._allowed_in and (tensors := self._kept.of(draw)):
            limited, index, token = tensors
            values = logits[index, token]
            logits[limited] = -torch.inf
            logits[index, token] = values
        return {}

    def _make(self, draw: Draw) -> tuple[Tensor, ...] | None:
        """The limited batch indices; batch index and token id of each allowed token."""
        limited = draw.among(self._allowed_in)
        lines = [(index, token) for index, row in limited for token in self._allowed_in[row]]
        if not lines:
            return None
        indices = to_device(np.array([index for index, _ in limited]), self._device)
        return indices, *(columns(lines, self._device, _INT, _INT) or ())


class MinTokens(Rule):
    """Bans the stop tokens until the output has `min_tokens` tokens."""

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self._device = device
        self._stops_of: dict[int, frozenset[int]] = {}
        self._first_stop_position = np.zeros(num_rows, np.int64)
        self._kept = KeptTensors(self._make)

    def is_early(self, rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """bool [rows]: whether the output must not end with the token at the row's position."""
        early: np.ndarray = positions < self._first_stop_position[rows]
        return early

    def fill(self, row: int, request: NewRequest) -> bool:
        if not (min_tokens := request.spec.sampling_params.min_tokens):
            return False
        self._first_stop_position[row] = request.spec.num_prompt_tokens + min_tokens
        self._stops_of[row] = request.spec.stop_token_ids
        self._kept.clear()
        return True

    def release(self, row: int) -> None:
        self._first_stop_position[row] = 0
        del self._stops_of[row]
        self._kept.clear()

    def apply(self, logits: Tensor, draw: Draw) -> dict[int, str]:
        if self._stops_of:
            early = self.is_early(draw.rows, draw.positions)
            if early.any() and (banned := self._kept.of(draw, early.tobytes())):
                logits[banned] = -torch.inf
        return {}

    def _make(self, draw: Draw) -> tuple[Tensor, ...] | None:
        """Batch index and token id of each stop token that would come too early."""
        early = self.is_early(draw.rows, draw.positions)
        lines = [
            (index, token)
            for index, row in draw.among(self._stops_of)
            if early[index]
            for token in self._stops_of[row]
        ]
        return columns(lines, self._device, _INT, _INT)


@dataclass(slots=True)
class _Words:
    """The bad words of one request. token_ids: the prompt and output tokens that the host knows."""

    banned_ids: list[int]  # words of one token
    longer: list[tuple[int, ...]]
    num_prompt_tokens: int
    token_ids: list[int]

    def completions(self, position: int) -> list[tuple[int, int]]:
        """The words of several tokens that the token at `position` may complete.

        The host knows the output up to `position` - 2. Returns (last but one token, last token) of
        each word that matches so far: if the token at `position` - 1, which only the device knows,
        is the first of the pair, the device must ban the second.
        """
        known = self.token_ids[self.num_prompt_tokens : position - 1]
        return [
            (word[-2], word[-1])
            for word in self.longer
            if position - self.num_prompt_tokens >= len(word) - 1
            and (len(word) == 2 or known[-(len(word) - 2) :] == list(word[:-2]))
        ]


class BadWords(Rule):
    """Bans tokens that are a bad word or would complete one.

    The host often does not know the last token yet, so the device compares the last but one token
    of a bad word with the row's last token.
    """

    follows_output = True

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self._device = device
        self._words_of: dict[int, _Words] = {}
        self._has_longer = np.zeros(num_rows, bool)
        self._kept = KeptTensors(self._make)

    def need_last_tokens(self, rows: np.ndarray) -> bool:
        """Whether a word of these rows has more than one token."""
        return bool(self._has_longer[rows].any())

    def fill(self, row: int, request: NewRequest) -> bool:
        if not (words := request.spec.bad_words):
            return False
        banned_ids = [word[0] for word in words if len(word) == 1]
        longer = [word for word in words if len(word) > 1]
        split, token_ids = request.spec.num_prompt_tokens, list(request.token_ids)
        self._words_of[row] = _Words(banned_ids, longer, split, token_ids)
        self._has_longer[row] = bool(longer)
        self._kept.clear()
        return True

    def release(self, row: int) -> None:
        self._has_longer[row] = False
        del self._words_of[row]
        self._kept.clear()

    def record(self, row: int, token_id: int) -> None:
        self._words_of[row].token_ids.append(token_id)

    def apply(self, logits: Tensor, draw: Draw) -> dict[int, str]:
        if self._words_of:
            if banned := self._kept.of(draw):
                logits[banned] = -torch.inf
            if draw.last_token_ids is not None:
                self._ban_completions(logits, draw, draw.last_token_ids)
        return {}

    def _make(self, draw: Draw) -> tuple[Tensor, ...] | None:
        """Batch index and token id of each word of one token."""
        lines = [
            (index, token)
            for index, row in draw.among(self._words_of)
            for token in self._words_of[row].banned_ids
        ]
        return columns(lines, self._device, _INT, _INT)

    def _ban_completions(self, logits: Tensor, draw: Draw, last_token_ids: Tensor) -> None:
        lines = [
            (index, *pair)
            for index, row in draw.among(self._words_of)
            for pair in self._words_of[row].completions(int(draw.positions[index]))
        ]
        if lines:
            index, before, banned = to_device(np.array(lines).T, self._device)
            amounts = torch.where(last_token_ids[index] == before, -torch.inf, 0.0)
            logits.index_put_((index, banned), amounts, accumulate=True)
