"""Makes llguidance's matchers from grammar texts, with limits, and explains their errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from compiledllm.grammars.library import require_llguidance

T = TypeVar("T")

_MAX_LEXER_STATES = 5_000  # for one output; each takes 1 to 2 kB
_MAX_GRAMMAR_SIZE = 50_000  # symbols; time grows with the square of an object's properties

# The library's names for the failures of an output, explained for users.
_CAUSES = {
    "NoExtension": "the grammar leads to a dead end: nothing may follow what is written so far",
    "ParserTooComplex": "the grammar is too ambiguous to be followed here; make it simpler",
    "LexerTooComplex": "the grammar's expressions are too complex to be followed here; make them "
    "simpler",
    "InternalError": "the grammar cannot be followed here",
}


def initial_matcher(text: str, tokenizer: Any) -> Any:
    """The matcher at the beginning of an output. Raises ValueError.

    The first mask is computed as a trial, because even this mask exceeds the limits of some
    grammars.
    """
    library = require_llguidance()
    limits = library.LLParserLimits(
        max_lexer_states=_MAX_LEXER_STATES,
        max_grammar_size=_MAX_GRAMMAR_SIZE,
        verbose_errors=False,
    )
    start = checked(library.LLMatcher, tokenizer, text, log_level=0, limits=limits)
    first = start.deep_copy()
    checked(first.compute_bitmask)
    if first.is_error():
        raise ValueError(f"structured_outputs cannot be compiled: {error_of(first)}")
    if first.is_stopped() and not first.is_accepting():
        raise ValueError("structured_outputs cannot be compiled: no output fits the grammar")
    return start


def checked(call: Callable[..., T], *arguments: Any, **options: Any) -> T:
    """Call the library and turn its errors into ValueError, including panics (BaseException)."""
    try:
        return call(*arguments, **options)
    except BaseException as error:
        cause = " ".join(str(error).split())[:300]
        raise ValueError(f"structured_outputs cannot be compiled: {cause}") from None


def error_of(matcher: Any) -> str:
    """The error of a matcher, in one line."""
    text = " ".join(str(matcher.get_error()).split())
    for name, cause in _CAUSES.items():
        if name in text:
            return cause
    return text.replace("<non-verbose/>", "").strip()[:300]
