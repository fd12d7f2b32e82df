"""The door to llguidance: from the form of an output to a grammar that knows its next tokens.

Grammars(vocabulary).compile(params) -> Grammar. Compiling happens in threads of its own, for a
limited time. Knows no requests and no device.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from compiledllm.structured_outputs import StructuredOutputsParams

COMPILE_SECONDS = 2.0
WHITESPACE = r"[\x20\x0A\x0D\x09]{1,32}"  # between JSON's tokens: indented, but not for ever
MAX_CACHED = 256  # grammars
MAX_CACHED_BYTES = 2**23  # of their texts
_MAX_LEXER_STATES = 5_000  # of one output, 1 to 2 kB each
_MAX_GRAMMAR_SIZE = 50_000  # symbols; time grows with the square of an object's properties
_NUM_THREADS = 2


class CompilersBusy(RuntimeError):
    """Others' grammars are being compiled; one more may be a little later."""


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


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """tokenizer_json: in the format of the `tokenizers` library. size: of the model; tokens that
    only it has are never allowed. eos_token_ids: what ends an output.
    """

    tokenizer_json: str
    size: int
    eos_token_ids: tuple[int, ...]


class Grammar:
    """A compiled form of output. text: llguidance's own, from which it can be made again."""

    def __init__(self, text: str, start: Any, tokenizer: Any) -> None:
        self.text = text
        self.num_mask_words = -(-tokenizer.vocab_size // 32)
        self._start = start
        self._tokenizer = tokenizer

    def matcher(self, output_token_ids: Sequence[int]) -> Any:
        """llguidance's state behind these tokens of an output."""
        matcher = self._start.deep_copy()
        if output_token_ids:
            matcher.consume_tokens(list(output_token_ids))
        return matcher

    def fix_mask(self, matcher: Any, mask: np.ndarray) -> None:
        """Spell out forced text that looks like a special token.

        mask: uint32 [words], edited; one of them is not 0.

        Where only one text can follow, llguidance lets the tokenizer split it, which may make
        "<tool_call>" the special token of that name; and then does not take that for the text.
        """
        place = int(mask.argmax())
        bits = int(mask[place])
        token_id = 32 * place + bits.bit_length() - 1
        if bits & (bits - 1) or matcher.is_stopped() or matcher.validate_tokens([token_id]):
            return
        text = matcher.compute_ff_bytes().decode(errors="ignore")
        spelled = self._tokenizer.greedy_tokenize(text)
        if spelled:
            mask[:] = 0
            mask[spelled[0] // 32] = 1 << spelled[0] % 32


class Grammars:
    """Compiles for one vocabulary, and remembers. From any thread.

    Making one takes 0.2 s for 49k tokens and some seconds for 262k, and holds the interpreter lock.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._library = require_llguidance()
        self.vocabulary = vocabulary
        self._tokenizer = self._make_tokenizer(vocabulary)
        self._limits = self._library.LLParserLimits(
            max_lexer_states=_MAX_LEXER_STATES,
            max_grammar_size=_MAX_GRAMMAR_SIZE,
            verbose_errors=False,
        )
        self._pool = ThreadPoolExecutor(_NUM_THREADS, "grammar")
        self._free_threads = threading.Semaphore(_NUM_THREADS)
        self._cache: OrderedDict[str, Grammar] = OrderedDict()
        self._cached_bytes = 0
        self._lock = threading.Lock()

    def _make_tokenizer(self, vocabulary: Vocabulary) -> Any:
        make, eos = self._library.LLTokenizer, list(vocabulary.eos_token_ids)
        try:
            return make(vocabulary.tokenizer_json, n_vocab=vocabulary.size, eos_token=eos)
        except ValueError as error:
            if "too small" not in str(error):
                raise ValueError(
                    f"structured_outputs: llguidance does not know this kind of tokenizer ({error})"
                ) from None
            return make(vocabulary.tokenizer_json, eos_token=eos)  # has more tokens than the model

    def compile(self, form: StructuredOutputsParams) -> Grammar:
        """Raises ValueError for what is no grammar, or takes longer than COMPILE_SECONDS.

        And CompilersBusy if no thread becomes free for so long.
        """
        text = self._text_of(form)
        if (known := self._recall(text)) is not None:
            return known
        if not self._free_threads.acquire(timeout=COMPILE_SECONDS):
            raise CompilersBusy("other requests' structured_outputs are being compiled; try again")
        future = self._pool.submit(self._compile, text)
        future.add_done_callback(lambda _: self._free_threads.release())  # perhaps long after
        try:
            return future.result(COMPILE_SECONDS)
        except TimeoutError:
            raise ValueError(
                f"structured_outputs did not compile within {COMPILE_SECONDS:g} s; make it simpler"
            ) from None

    def remake(self, text: str) -> Grammar:
        """Of a `Grammar.text`, which has been compiled before: for as long as it takes."""
        return self._recall(text) or self._compile(text)

    def _compile(self, text: str) -> Grammar:
        options = {"limits": self._limits, "log_level": 0}
        start = self._checked(self._library.LLMatcher, self._tokenizer, text, **options)
        first = start.deep_copy()
        self._checked(first.compute_bitmask)  # some are too costly for their first token already
        if first.is_error():
            raise ValueError(f"structured_outputs cannot be compiled: {error_of(first)}")
        self._remember(grammar := Grammar(text, start, self._tokenizer))
        return grammar

    @staticmethod
    def _checked(call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """The library's own kinds of errors as ValueError; its panics are no Exception."""
        try:
            return call(*arguments, **options)
        except BaseException as error:
            cause = " ".join(str(error).split())[:300]
            raise ValueError(f"structured_outputs cannot be compiled: {cause}") from None

    def _recall(self, text: str) -> Grammar | None:
        with self._lock:
            if text in self._cache:
                self._cache.move_to_end(text)
            return self._cache.get(text)

    def _remember(self, grammar: Grammar) -> None:
        with self._lock:
            if grammar.text in self._cache:
                return
            self._cache[grammar.text] = grammar
            self._cached_bytes += len(grammar.text)
            while len(self._cache) > MAX_CACHED or self._cached_bytes > MAX_CACHED_BYTES:
                text, _ = self._cache.popitem(last=False)
                self._cached_bytes -= len(text)

    def _text_of(self, params: StructuredOutputsParams) -> str:
        text: str = self._checked(self._make_text, params)
        return text

    def _make_text(self, params: StructuredOutputsParams) -> Any:
        make = self._library.LLMatcher
        if params.regex is not None:
            return make.grammar_from_regex(params.regex)
        if params.choice is not None:
            literals = (json.dumps(choice, ensure_ascii=False) for choice in params.choice)
            return make.grammar_from_lark("start: " + " | ".join(literals))
        if params.grammar is not None:
            return self._library.grammar_from("grammar", params.grammar)
        if params.structural_tag is not None:
            return make.grammar_from_lark(self._structural_tag(params))
        return make.grammar_from_json_schema(json.dumps(json_schema_of(params)))

    def _structural_tag(self, params: StructuredOutputsParams) -> str:
        structures, triggers = params.structures
        make = self._library.StructTag
        tags = [
            make(
                trigger=next(trigger for trigger in triggers if tag["begin"].startswith(trigger)),
                begin=tag["begin"],
                grammar=json.dumps(tag["schema"]),
                end=tag["end"],
            )
            for tag in structures
        ]
        text: str = make.to_grammar(tags, assume_special=any(map(self._is_special, triggers)))
        return text

    def _is_special(self, text: str) -> bool:
        token_ids = self._tokenizer.tokenize_str(text, parse_special=True)
        return len(token_ids) == 1 and self._tokenizer.is_special_token(token_ids[0])


def error_of(matcher: Any) -> str:
    """What is wrong with a matcher, in one line."""
    return " ".join(str(matcher.get_error()).split())[:300]


def _options(params: StructuredOutputsParams) -> dict[str, Any]:
    """How JSON may be written."""
    if params.disable_any_whitespace:
        return {"whitespace_flexible": False}
    if params.whitespace_pattern is not None:
        return {"whitespace_pattern": params.whitespace_pattern}
    return {"whitespace_pattern": WHITESPACE}


def json_schema_of(params: StructuredOutputsParams) -> dict[str, Any]:
    """The schema, with how its JSON may be written under llguidance's own key."""
    schema = dict(params.schema)
    if params.disable_additional_properties:
        schema = copy.deepcopy(schema)
        _close_objects(schema)
    return schema | {"x-guidance": _options(params)}


_MAPS = ("properties", "patternProperties", "$defs", "definitions")  # name -> schema
_SCHEMAS = ("items", "additionalProperties", "prefixItems", "anyOf", "oneOf")


def _close_objects(schema: Any) -> None:
    """Objects with properties have no others, unless they say so. Edits in place.

    Not inside allOf, where each part would forbid the others' properties.
    """
    if isinstance(schema, list):
        for inner in schema:
            _close_objects(inner)
    if not isinstance(schema, dict):
        return
    if isinstance(schema.get("properties"), Mapping) and "allOf" not in schema:
        schema.setdefault("additionalProperties", False)
    for name in _MAPS:
        if isinstance(schema.get(name), dict):
            _close_objects(list(schema[name].values()))
    for name in _SCHEMAS:
        _close_objects(schema.get(name))
