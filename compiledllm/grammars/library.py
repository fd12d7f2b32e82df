"""The interface to llguidance: its tokenizer, its limits, and matchers made of grammar texts."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")

_MAX_LEXER_STATES = 5_000  # of one output, 1 to 2 kB each
_MAX_GRAMMAR_SIZE = 50_000  # symbols; time grows with the square of an object's properties

# The library's names for the failures of an output, explained for users.
_CAUSES = {
    "NoExtension": "the grammar leads to a dead end: nothing may follow what is written so far",
    "ParserTooComplex": "the grammar is too ambiguous to be followed here; make it simpler",
    "LexerTooComplex": "the grammar's expressions are too complex to be followed here; make them "
    "simpler",
    "InternalError": "the grammar cannot be followed here",
}


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """tokenizer_json: in the format of the `tokenizers` library. size: the model's number of
    tokens; tokens beyond the tokenizer's are never allowed. eos_token_ids: tokens that end an
    output.
    """

    tokenizer_json: str
    size: int
    eos_token_ids: tuple[int, ...]


def is_installed() -> bool:
    return importlib.util.find_spec("llguidance") is not None


def require_llguidance() -> Any:
    if not is_installed():
        raise ValueError(
            "structured_outputs needs llguidance; install it with pip install "
            "'compiledllm[structured]'"
        )
    import llguidance

    return llguidance


def make_tokenizer(vocabulary: Vocabulary) -> Any:
    """Takes 0.2 s for 49k tokens and some seconds for 262k, and holds the interpreter lock."""
    make, eos = require_llguidance().LLTokenizer, list(vocabulary.eos_token_ids)
    try:
        return make(vocabulary.tokenizer_json, n_vocab=vocabulary.size, eos_token=eos)
    except ValueError as error:
        if "too small" not in str(error):
            raise ValueError(
                f"structured_outputs: llguidance does not know this kind of tokenizer ({error})"
            ) from None
        return make(vocabulary.tokenizer_json, eos_token=eos)  # the tokenizer is larger


def start_of(text: str, tokenizer: Any) -> Any:
    """The matcher at the beginning of an output. Raises ValueError.

    The first mask is computed as well, since it is already too costly for some grammars.
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
    """Call the library and turn its errors into ValueError, also panics, which are no Exception."""
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
