"""Per-request changes to the logits before a token is drawn.

Each kind of change is a `Rule`, which keeps state for the rows of requests that ask for the change.
Rows without rules cost nothing.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from compiledllm.runner.penalties import Penalties
from compiledllm.runner.processors import Processors
from compiledllm.runner.rule import Draw, Rule
from compiledllm.runner.structured import GrammarRows
from compiledllm.runner.token_rules import AllowedTokens, BadWords, LogitBias, MinTokens
from compiledllm.types import NewRequest


class LogitsRules:
    """The rules of all request rows, in the order in which they edit logits."""

    def __init__(self, num_rows: int, vocab_size: int, device: torch.device) -> None:
        self._penalties = Penalties(num_rows, vocab_size, device)
        self._min_tokens = MinTokens(num_rows, device)
        self._bad_words = BadWords(num_rows, device)
        self._in_order: tuple[Rule, ...] = (
            LogitBias(device),
            Processors(),
            self._penalties,
            AllowedTokens(device),
            self._min_tokens,
            self._bad_words,
            GrammarRows(vocab_size, device),
        )
        self._rules_of: dict[int, list[Rule]] = {}  # request row -> its rules, in order
        self._followers_of: dict[int, list[Rule]] = {}  # of these, rules that follow the output
        self._edits_every_draw = np.zeros(num_rows, bool)

    @property
    def are_used(self) -> bool:
        """Whether any row has rules."""
        return bool(self._rules_of)

    def are_edited(self, rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """bool [rows]: whether rules edit the logits for the token at each row's position."""
        is_early = self._min_tokens.is_early(rows, positions)
        edited: np.ndarray = self._edits_every_draw[rows] | is_early
        return edited

    def need_last_tokens(self, rows: np.ndarray) -> bool:
        """Whether any rule of these rows depends on the token before the one to be drawn."""
        return self._bad_words.need_last_tokens(rows)

    def fill(self, row: int, request: NewRequest) -> None:
        """Take a request, with the tokens that it has so far, into a row."""
        rules: list[Rule] = []
        for rule in self._in_order:
            if rule.fill(row, request):
                rules.append(rule)
                self._rules_of[row] = rules  # here, so that `release` works if the next rule raises
        self._edits_every_draw[row] = any(rule is not self._min_tokens for rule in rules)
        if followers := [rule for rule in rules if rule.follows_output]:
            self._followers_of[row] = followers

    def release(self, row: int) -> None:
        """Drop the rules of a row whose request has left the table."""
        for rule in self._rules_of.pop(row, ()):
            rule.release(row)
        self._followers_of.pop(row, None)

    def record(self, row: int, token_id: int) -> None:
        """Tell the row's rules of a drawn token, once the token has reached the host."""
        for rule in self._followers_of.get(row, ()):
            rule.record(row, token_id)

    def apply(self, logits: Tensor, draw: Draw) -> dict[int, str]:
        """Edit the logits, float32 [rows, vocab], in place. Returns error messages by batch index.

        `draw` must have the rows' last tokens if `need_last_tokens` is true.
        """
        errors: dict[int, str] = {}
        for rule in self._in_order:
            errors |= rule.apply(logits, draw)
        return errors

    def count(self, draw: Draw, token_ids: Tensor) -> None:
        """Count the tokens, int64 [rows], that were drawn after `apply` for the same rows."""
        self._penalties.count(draw, token_ids)
