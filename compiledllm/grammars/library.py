"""Loads llguidance, and makes llguidance's tokenizer from a model's vocabulary."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A model's tokens, as JSON can carry them.

    tokenizer_json: in the format of the `tokenizers` library. size: the model's number of tokens;
    tokens beyond the tokenizer's are never allowed. eos_token_ids: tokens that end an output.
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
    """llguidance's tokenizer. Raises ValueError if llguidance does not support the vocabulary.

    The call takes 0.2 s for 49k tokens and some seconds for 262k, and holds the GIL.
    """
    make, eos = require_llguidance().LLTokenizer, list(vocabulary.eos_token_ids)
    try:
        return make(vocabulary.tokenizer_json, n_vocab=vocabulary.size, eos_token=eos)
    except ValueError as error:
        if "too small" not in str(error):
            raise ValueError(
                f"structured_outputs: llguidance does not know this kind of tokenizer ({error})"
            ) from None
        return make(vocabulary.tokenizer_json, eos_token=eos)  # the tokenizer is larger
