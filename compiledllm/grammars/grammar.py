"""Compiled grammars, which decide the tokens that may come next in an output.

Grammars(vocabulary).compile(params) -> Grammar. A new grammar goes through the helper process
(`compiler.py`) first. This module knows neither requests nor devices.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np

from compiledllm.grammars.compiler import Compiler
from compiledllm.grammars.library import Vocabulary, make_tokenizer
from compiledllm.grammars.matcher import initial_matcher
from compiledllm.grammars.stack import TRUSTED_BYTES, call_with_stack
from compiledllm.structured_outputs import StructuredOutputsParams

MAX_CACHED = 256  # grammars
MAX_CACHED_BYTES = 2**23  # of the grammars' texts and of the keys


class Grammar:
    """A grammar for an output. text: the grammar in llguidance's syntax, known to compile.

    The grammar is compiled in this process only when its first matcher is needed. The process that
    answers HTTP never needs a matcher.
    """

    def __init__(self, text: str, grammars: Grammars) -> None:
        self.text = text
        self._grammars = grammars
        self._start: Any = None

    @property
    def num_mask_words(self) -> int:
        """Length of a mask with a bit for each token, in words of 32 bits."""
        return -(-int(self._grammars.tokenizer.vocab_size) // 32)

    def matcher(self, output_token_ids: Sequence[int]) -> Any:
        """llguidance's matcher after these first tokens of an output."""
        matcher = self.prepare()._start.deep_copy()
        if output_token_ids:
            matcher.consume_tokens(list(output_token_ids))
        return matcher

    def prepare(self) -> Grammar:
        """Compile now, with more stack than the helper's trial had. Raises ValueError."""
        if self._start is None:
            tokenizer = self._grammars.tokenizer
            self._start = call_with_stack(TRUSTED_BYTES, initial_matcher, self.text, tokenizer)
        return self

    def fix_mask(self, matcher: Any, mask: np.ndarray) -> None:
        """Replace a mask that allows only a token which llguidance would then reject.

        mask: uint32 [words], changed in place, with at least one bit set.

        Where only one text can follow, llguidance tokenizes that text, which may turn "<tool_call>"
        into the special token of the same name; llguidance then rejects the token. The new mask
        allows the first of the ordinary tokens that spell the text.
        """
        word_index = int(mask.argmax())
        bits = int(mask[word_index])
        token_id = 32 * word_index + bits.bit_length() - 1
        if bits & (bits - 1) or matcher.is_stopped() or matcher.validate_tokens([token_id]):
            return
        text = matcher.compute_ff_bytes().decode(errors="ignore")
        spelled = self._grammars.tokenizer.greedy_tokenize(text)
        if spelled:
            mask[:] = 0
            mask[spelled[0] // 32] = 1 << spelled[0] % 32


class Grammars:
    """Compiles and caches grammars of one vocabulary, from any thread."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.compiler = Compiler(vocabulary)
        self._tokenizer: Any = None
        # Key: the params as JSON, or a grammar's text. The least recently used one comes first.
        self._cache: OrderedDict[str, Grammar] = OrderedDict()
        self._cached_bytes = 0
        self._lock = threading.Lock()
        self._making = threading.Lock()

    @property
    def tokenizer(self) -> Any:
        """llguidance's tables of the vocabulary, made on first use."""
        with self._making:
            if self._tokenizer is None:
                self._tokenizer = make_tokenizer(self.vocabulary)
            return self._tokenizer

    def compile(self, params: StructuredOutputsParams) -> Grammar:
        """Compile structured outputs.

        Raises ValueError if they are invalid or take longer than COMPILE_LIMIT_S, and CompilersBusy
        if no worker is free within that time.
        """
        key = json.dumps(params.fields())
        if (known := self._recall(key)) is None:
            known = Grammar(self.compiler.text_of(params), self)
            self._remember(key, known)
        return known

    def remake(self, text: str) -> Grammar:
        """The grammar of a `Grammar.text`. It has compiled before, so there is no time limit."""
        if (known := self._recall(text)) is None:
            known = Grammar(text, self).prepare()
            self._remember(text, known)
        return known

    def _recall(self, key: str) -> Grammar | None:
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
            return self._cache.get(key)

    def _remember(self, key: str, grammar: Grammar) -> None:
        with self._lock:
            if key in self._cache:
                return
            self._cache[key] = grammar
            self._cached_bytes += len(key) + len(grammar.text)
            while len(self._cache) > MAX_CACHED or self._cached_bytes > MAX_CACHED_BYTES:
                old, dropped = self._cache.popitem(last=False)
                self._cached_bytes -= len(old) + len(dropped.text)
