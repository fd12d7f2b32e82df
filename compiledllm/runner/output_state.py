"""Tracks whether an output is still in its reasoning, which is free text, or already in its form.

The form is the part of a structured output that the grammar constrains.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from compiledllm.structured_outputs import ReasoningTokens
from compiledllm.types import Grammar

_MAX_SPACES = 2  # tokens of white space between the reasoning and the form


class OutputState:
    """The state of a structured output, which depends on the output's tokens alone.

    reasoning: None if the form is the whole output. Attributes: `matcher` (llguidance's state of
    the form; None during the reasoning), `others` (tokens that may follow besides those that the
    grammar allows).
    """

    def __init__(
        self, grammar: Grammar, output: Iterable[int] = (), reasoning: ReasoningTokens | None = None
    ) -> None:
        self.grammar = grammar
        self.matcher: Any = None
        self.others: tuple[int, ...] = ()
        self._reasoning = reasoning
        self._num_spaces = 0
        if reasoning is None:
            self.matcher = grammar.matcher(list(output))
            return
        if reasoning.start is not None:
            self.matcher, self.others = grammar.matcher([]), (reasoning.start,)
        for token_id in output:
            self.consume(token_id)

    def consume(self, token_id: int) -> None:
        """Advance by a token of the output."""
        if self.matcher is None:
            self._think(token_id)
        elif token_id not in self.others or not self._leave_out(token_id):
            self.others = ()
            self.matcher.consume_token(token_id)

    def _think(self, token_id: int) -> None:
        """Begin the form if the token ends the reasoning."""
        tokens = self._reasoning
        assert tokens is not None
        if token_id == tokens.end:
            self.matcher, self.others = self.grammar.matcher([]), tokens.spaces
        elif token_id == tokens.form_start:
            self.matcher = self.grammar.matcher([token_id])

    def _leave_out(self, token_id: int) -> bool:
        """Handle a token of `others`. Returns False if the token belongs to the form after all."""
        tokens = self._reasoning
        assert tokens is not None
        if token_id not in tokens.spaces:  # the token that begins the reasoning
            self.matcher, self.others = None, ()
            return True
        if self.matcher.validate_tokens([token_id]):  # a form may begin with white space itself
            return False
        self._num_spaces += 1
        if self._num_spaces == _MAX_SPACES:
            self.others = ()
        return True
