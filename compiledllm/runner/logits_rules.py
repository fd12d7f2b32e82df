"""Per-request changes to the logits before a token is drawn.

Rules apply in this order: logit bias, logits processors, penalties, allowed and banned tokens, bad
words, grammar. Rows without rules cost nothing. Token counts live on the device, since the host
often does not know the last token yet. For the same reason the device compares the last but one
token of a bad word with the row's last token.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compiledllm.runner.device import to_device
from compiledllm.runner.structured import GrammarRows
from compiledllm.sampling_params import LogitsProcessor, SamplingParams
from compiledllm.types import NewRequest, RequestSpec

_IN_PROMPT = 1 << 30  # flag bit next to a token's count in the output: the prompt has the token


@dataclass(slots=True)
class RowRules:
    """The rules of one request. token_ids: the prompt and output tokens that the host knows."""

    params: SamplingParams
    num_prompt_tokens: int
    stop_token_ids: list[int]
    bad_words: tuple[tuple[int, ...], ...]  # words of at least two tokens
    bad_token_ids: list[int]
    token_ids: list[int]
    slot: int = -1  # row of the token counts; -1: the request has no penalties

    @classmethod
    def of(cls, request: NewRequest) -> RowRules:
        spec = request.spec
        return cls(
            params=spec.sampling_params,
            num_prompt_tokens=spec.num_prompt_tokens,
            stop_token_ids=list(spec.stop_token_ids),
            bad_words=tuple(word for word in spec.bad_words if len(word) > 1),
            bad_token_ids=[word[0] for word in spec.bad_words if len(word) == 1],
            token_ids=list(request.token_ids),
        )

    def completions(self, position: int) -> list[tuple[int, int]]:
        """(last token, token to ban after it) of each bad word that may lack one token only."""
        known = self.token_ids[self.num_prompt_tokens : position - 1]
        return [
            (word[-2], word[-1])
            for word in self.bad_words
            if position - self.num_prompt_tokens >= len(word) - 1
            and (len(word) == 2 or known[-(len(word) - 2) :] == list(word[:-2]))
        ]


@dataclass(frozen=True, slots=True)
class _Edits:
    """Device index tensors that stay valid while the same rows have rules; None: no such rule."""

    bias: tuple[Tensor, Tensor, Tensor] | None  # batch index, token, amount
    allowed: tuple[Tensor, Tensor, Tensor] | None  # limited batch indices; batch index, token
    banned: tuple[Tensor, Tensor] | None  # batch index, token
    penalties: tuple[Tensor, Tensor, Tensor] | None  # batch index, slot, amounts [3, rows]


class LogitsRules:
    """The rules of all request rows."""

    def __init__(self, num_rows: int, vocab_size: int, device: torch.device) -> None:
        self._device = device
        self._num_rows = num_rows
        self._rules: dict[int, RowRules] = {}
        self._always = np.zeros(num_rows, bool)
        # Before this position, min_tokens bans the stop tokens.
        self._first_stop_position = np.zeros(num_rows, np.int64)
        self._has_bad_words = np.zeros(num_rows, bool)  # words of at least two tokens
        self._counts = torch.zeros((0, vocab_size), dtype=torch.int32, device=device)
        self._free_slots: list[int] = []
        self._last_edits: tuple[bytes, _Edits] | None = None
        self._grammars = GrammarRows(vocab_size, device)

    @staticmethod
    def max_bytes(num_rows: int, vocab_size: int) -> int:
        """Bytes of the token counts if every row has penalties."""
        return num_rows * vocab_size * 4

    @property
    def are_used(self) -> bool:
        """Whether any row has rules."""
        return bool(self._rules)

    def asks(self, rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """bool [rows]: whether each row has rules for the token at its position."""
        asking: np.ndarray = self._always[rows] | (positions < self._first_stop_position[rows])
        return asking

    def read_last_tokens(self, rows: np.ndarray) -> bool:
        """Whether any rule of these rows depends on the token before the one to be drawn."""
        return bool(self._has_bad_words[rows].any())

    def fill(self, row: int, request: NewRequest) -> None:
        spec, params = request.spec, request.spec.sampling_params
        self._always[row] = _are_always_on(spec) or request.grammar is not None
        self._first_stop_position[row] = spec.num_prompt_tokens + params.min_tokens
        if self._always[row] or params.min_tokens:
            self._rules[row] = rules = RowRules.of(request)
            self._has_bad_words[row] = bool(rules.bad_words)
            self._last_edits = None
            if params.has_penalties:
                rules.slot = self._count(rules)
            self._grammars.fill(row, request)

    def release(self, row: int) -> None:
        self._grammars.release(row)
        rules = self._rules.pop(row, None)
        self._has_bad_words[row] = False
        if rules is not None and rules.slot >= 0:
            self._free_slots.append(rules.slot)

    def record(self, row: int, token_id: int) -> None:
        """Store a drawn token of the row that has reached the host."""
        if row in self._rules:
            self._rules[row].token_ids.append(token_id)
            self._grammars.record(row, token_id)

    def apply(
        self, logits: Tensor, rows: np.ndarray, positions: np.ndarray, last_token_ids: Tensor | None
    ) -> dict[int, str]:
        """Edit the logits in place. Returns error messages by batch index.

        logits: float32 [rows, vocab]. rows, positions: int64 [rows], request rows and the positions
        of the tokens to be drawn. last_token_ids: int64 [rows], on the device; may be None unless
        `read_last_tokens` is true.
        """
        edits = self._edits_of(rows, positions)
        if edits.bias is not None:
            row, token, amount = edits.bias
            logits.index_put_((row, token), amount, accumulate=True)
        errors = self._run_processors(logits, rows, positions)
        if edits.penalties is not None:
            self._penalize(logits, *edits.penalties)
        if edits.allowed is not None:
            limited, row, token = edits.allowed
            values = logits[row, token]
            logits[limited] = -torch.inf
            logits[row, token] = values
        if edits.banned is not None:
            logits[edits.banned] = -torch.inf
        if last_token_ids is not None:
            self._ban_bad_words(logits, rows, positions, last_token_ids)
        return errors | self._grammars.apply(logits, rows)

    def count(self, rows: np.ndarray, positions: np.ndarray, drawn: Tensor) -> None:
        """Count the tokens, int64 [rows], that were drawn after `apply` of the same rows."""
        edits = self._edits_of(rows, positions)
        if edits.penalties is None:
            return
        index, slots, _ = edits.penalties
        if drawn.is_cuda:
            from compiledllm.kernels.penalties_triton import count_tokens

            count_tokens(drawn, index, slots, self._counts)
        else:
            self._counts[slots, drawn[index].clamp(min=0)] += 1  # no two rows share a slot

    # -- penalties -----------------------------------------------------------------------------

    def _count(self, rules: RowRules) -> int:
        """Allocate a slot, count the request's tokens in it, and return its index."""
        if not self._free_slots:
            size = len(self._counts)
            more = min(max(size, 4), self._num_rows - size)
            self._free_slots += range(size, size + more)
            self._counts = torch.cat((self._counts, self._counts.new_zeros((more, self._vocab))))
        slot = self._free_slots.pop()
        split = rules.num_prompt_tokens
        counts = np.zeros(self._vocab, np.int32)
        np.add.at(counts, rules.token_ids[split:], 1)
        counts[rules.token_ids[:split]] |= _IN_PROMPT
        self._counts[slot] = to_device(counts, self._device, torch.int32)
        return slot

    @property
    def _vocab(self) -> int:
        return self._counts.shape[1]

    def _penalize(self, logits: Tensor, index: Tensor, slots: Tensor, amounts: Tensor) -> None:
        if logits.is_cuda:
            from compiledllm.kernels.penalties_triton import penalize

            penalize(logits, index, slots, amounts, self._counts, _IN_PROMPT)
            return
        for place, slot, (repetition, frequency, presence) in zip(
            index.tolist(), slots.tolist(), amounts.t().tolist(), strict=True
        ):
            seen = self._counts[slot].numpy()
            tokens = np.flatnonzero(seen)  # usually few of the vocabulary's tokens
            counts, row = seen[tokens] & (_IN_PROMPT - 1), logits[place].numpy()
            x = row[tokens]
            x = np.where(x > 0, x / np.float32(repetition), x * np.float32(repetition))
            row[tokens] = x - frequency * counts - presence * (counts > 0)

    # -- processors and bad words --------------------------------------------------------------

    def _run_processors(
        self, logits: Tensor, rows: np.ndarray, positions: np.ndarray
    ) -> dict[int, str]:
        errors = {}
        for index, rules in enumerate(self._rules[row] for row in rows.tolist()):
            if not rules.params.logits_processors:
                continue
            tokens = rules.token_ids[: positions[index]]
            prompt, output = tokens[: rules.num_prompt_tokens], tokens[rules.num_prompt_tokens :]
            try:
                for processor in rules.params.logits_processors:
                    logits[index] = _process(processor, prompt, output, logits[index])
            except Exception as error:  # the processor is the caller's code
                errors[index] = f"logits processor: {type(error).__name__}: {error}"
        return errors

    def _ban_bad_words(
        self, logits: Tensor, rows: np.ndarray, positions: np.ndarray, last_token_ids: Tensor
    ) -> None:
        pairs = [
            (index, *pair)
            for index, row in enumerate(rows.tolist())
            for pair in self._rules[row].completions(int(positions[index]))
        ]
        if pairs:
            index, before, banned = to_device(np.array(pairs).T, self._device)
            amounts = torch.where(last_token_ids[index] == before, -torch.inf, 0.0)
            logits.index_put_((index, banned), amounts, accumulate=True)

    # -- edits that stay the same --------------------------------------------------------------

    def _edits_of(self, rows: np.ndarray, positions: np.ndarray) -> _Edits:
        early = positions < self._first_stop_position[rows]
        key = rows.tobytes() + early.tobytes()
        if self._last_edits is None or self._last_edits[0] != key:
            self._last_edits = key, self._make_edits(rows, early)
        return self._last_edits[1]

    def _make_edits(self, rows: np.ndarray, early: np.ndarray) -> _Edits:
        rules = [self._rules[row] for row in rows.tolist()]
        bias = [
            (i, token, amount)
            for i, r in enumerate(rules)
            for token, amount in (r.params.logit_bias or {}).items()
        ]
        allowed = [
            (i, token) for i, r in enumerate(rules) for token in r.params.allowed_token_ids or ()
        ]
        banned = [
            (i, token)
            for i, r in enumerate(rules)
            for token in r.bad_token_ids + (r.stop_token_ids if early[i] else [])
        ]
        penalized = [i for i, r in enumerate(rules) if r.slot >= 0]
        return _Edits(
            bias=self._columns(bias, torch.int64, torch.int64, torch.float32),
            allowed=self._with_rows(allowed),
            banned=self._columns(banned, torch.int64, torch.int64),
            penalties=self._penalties([(i, rules[i]) for i in penalized]),
        )

    def _columns(self, lines: list[Any], *dtypes: torch.dtype) -> Any:
        """The columns of a list of tuples, one device tensor each; None for an empty list."""
        if not lines:
            return None
        columns = zip(*lines, strict=True)
        return tuple(
            to_device(np.array(column), self._device, dtype)
            for column, dtype in zip(columns, dtypes, strict=True)
        )

    def _with_rows(self, lines: list[tuple[int, int]]) -> Any:
        columns = self._columns(lines, torch.int64, torch.int64)
        limited = self._columns([(i,) for i in sorted({i for i, _ in lines})], torch.int64)
        return limited and (*limited, *columns)

    def _penalties(self, lines: list[tuple[int, RowRules]]) -> Any:
        if not lines:
            return None
        params = [rules.params for _, rules in lines]
        amounts = [
            [max(p.repetition_penalty, 1e-6) for p in params],  # against overflow
            [p.frequency_penalty for p in params],
            [p.presence_penalty for p in params],
        ]
        return (
            to_device(np.array([index for index, _ in lines]), self._device),
            to_device(np.array([rules.slot for _, rules in lines]), self._device),
            to_device(np.array(amounts), self._device, torch.float32),
        )


def _are_always_on(spec: RequestSpec) -> bool:
    params = spec.sampling_params
    return bool(
        params.has_penalties
        or params.logit_bias
        or params.allowed_token_ids
        or spec.bad_words
        or params.logits_processors
    )


def _process(
    processor: LogitsProcessor, prompt: list[int], output: list[int], logits: Tensor
) -> Tensor:
    """Call a processor and return the logits [vocab]. A result of None means edited in place."""
    arguments: tuple[Any, ...] = (prompt, output, logits)
    result = processor(*arguments[-num_arguments(processor) :])
    if result is None:
        return logits
    if not isinstance(result, Tensor) or result.shape != logits.shape:
        got = list(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise ValueError(f"it must return logits {list(logits.shape)}, got {got}")
    return result.to(logits)


def num_arguments(processor: LogitsProcessor) -> int:
    """How many of (prompt, output, logits) the processor takes, counted from the end: 1, 2 or 3."""
    try:
        parameters = inspect.signature(processor).parameters.values()
    except (TypeError, ValueError):  # some built-in functions have no signature
        return 2
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return 3
    positional = [
        p
        for p in parameters
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty
    ]
    return min(max(len(positional), 1), 3)
