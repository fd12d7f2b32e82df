"""The form that a caller can require of an output. Names are vLLM's.

Pure Python; `grammars/` compiles the form to a grammar.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from json import dumps, loads
from typing import Any

from compiledllm.checks import is_int, strict_fields

MAX_BYTES = 2**17  # of a schema, a regex or a grammar
MAX_NESTING = 64
MAX_CHOICES = 1024

_KINDS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
_JSON_ONLY = ("disable_any_whitespace", "disable_additional_properties", "whitespace_pattern")
_FIELDS = _KINDS + _JSON_ONLY


@strict_fields("reasoning tokens field")
@dataclass(frozen=True, slots=True)
class ReasoningTokens:
    """The token ids that separate an output's reasoning from the form after it.

    end: ends the reasoning. start: may be the output's first token and then begins the reasoning;
        None: the prompt has begun the reasoning.
    form_start: begins the form, and thereby also ends a reasoning without `end`.
    spaces: tokens of white space, of which up to two may stand between `end` and the form.
    """

    end: int
    start: int | None = None
    form_start: int | None = None
    spaces: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for token_id in self.token_ids:
            if not is_int(token_id) or token_id < 0:
                raise ValueError(
                    f"structured_outputs.reasoning must have token ids >= 0, got {token_id!r:.80}"
                )

    @property
    def token_ids(self) -> list[int]:
        """All of the ids."""
        ids = (self.start, self.end, self.form_start, *self.spaces)
        return [token_id for token_id in ids if token_id is not None]


@strict_fields("structured outputs field")
@dataclass(frozen=True, slots=True)
class StructuredOutputsParams:
    """The form of an output: exactly one of the first six fields. It restricts the tokens drawn.

    json: a JSON schema, as a dict or as text. Annotations are ignored; a constraint that cannot be
        enforced is an error.
    regex: a regular expression that the whole output matches (Rust's syntax; no look-around).
    choice: up to 1024 strings, one of which is the output.
    grammar: a context-free grammar in llguidance's Lark dialect, or in llama.cpp's GBNF.
    json_object: True: any JSON object.
    structural_tag: {"structures": [{"begin", "schema", "end"}, ...], "triggers": [...]}: free text
        in which every trigger must begin one of the structures.
    disable_any_whitespace: JSON without white space.
    whitespace_pattern: a regex for the white space between JSON's tokens; by default up to 32
        characters.
    disable_additional_properties: an object has only the properties that its schema lists, unless
        the schema says otherwise.
    reasoning: reasoning may come before the form, and is not restricted. None: the form is the
        whole output.

    Raises ValueError naming the field, the value and the range.
    """

    json: str | Mapping[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | Mapping[str, Any] | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None
    reasoning: ReasoningTokens | None = None

    def __post_init__(self) -> None:
        if self.json_object not in (None, True):
            self._refuse("json_object", self.json_object, "True, or left out")
        given = [name for name in _KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            got = " and ".join(given) or "none"
            raise ValueError(
                f"structured_outputs must have exactly one of {', '.join(_KINDS)}, got {got}"
            )
        self._check_texts()
        self._check_choice()
        if self.json is not None:
            self._check_schema(self.schema)
        if self.structural_tag is not None:
            self._check_structures()
        self._check_json_only(given[0])
        if not isinstance(self.reasoning, ReasoningTokens | None):
            self._refuse("reasoning", self.reasoning, "ReasoningTokens, or left out")

    def fields(self) -> dict[str, Any]:
        """The given fields of the form, without `reasoning`, as JSON values."""
        given = {name: getattr(self, name) for name in _FIELDS}
        return {name: value for name, value in given.items() if value not in (None, False)}

    @property
    def schema(self) -> Any:
        """The JSON schema of `json` or `json_object`, parsed."""
        if self.json is None:
            return {"type": "object"}
        return _parsed(self.json, "json")

    @property
    def structures(self) -> tuple[list[dict[str, Any]], list[str]]:
        """The structures and the triggers of `structural_tag`, parsed."""
        tag = _parsed(self.structural_tag, "structural_tag")
        ok = isinstance(tag, Mapping) and isinstance(tag.get("structures"), list)
        if not (ok and isinstance(tag.get("triggers"), list)):
            self._refuse("structural_tag", tag, "an object with lists 'structures' and 'triggers'")
        return tag["structures"], tag["triggers"]

    def _check_texts(self) -> None:
        for name in ("regex", "grammar", "whitespace_pattern"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str) and value):
                self._refuse(name, value, "a non-empty string")
            _check_bytes(value or "", name)

    def _check_choice(self) -> None:
        choice = self.choice
        if choice is None:
            return
        ok = isinstance(choice, (list, tuple)) and all(isinstance(s, str) and s for s in choice)
        if not ok or not 1 <= len(choice) <= MAX_CHOICES:
            self._refuse("choice", choice, f"1 to {MAX_CHOICES} non-empty strings")
        _check_bytes("".join(choice), "choice")

    def _check_schema(self, schema: Any) -> None:
        if not isinstance(schema, Mapping):
            self._refuse("json", schema, "a JSON schema: an object")
        try:
            _check_bytes(dumps(schema, allow_nan=False), "json")
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"structured_outputs.json is no JSON schema: {error}") from None
        if is_nested_deeper(schema, MAX_NESTING):
            raise ValueError(
                f"structured_outputs.json must be nested at most {MAX_NESTING} deep; use $ref"
            )

    def _check_structures(self) -> None:
        structures, triggers = self.structures
        if not triggers or not all(isinstance(text, str) and text for text in triggers):
            self._refuse("structural_tag.triggers", triggers, "a list of non-empty strings")
        if not 1 <= len(structures) <= MAX_CHOICES:
            self._refuse("structural_tag.structures", structures, f"a list of 1 to {MAX_CHOICES}")
        for structure in structures:
            texts = [isinstance(structure, Mapping) and structure.get(k) for k in ("begin", "end")]
            if not all(isinstance(text, str) for text in texts):
                self._refuse("structural_tag.structures", structure, "objects with begin and end")
            if not str(texts[0]).startswith(tuple(triggers)):
                self._refuse("structural_tag begin", texts[0], f"text after one of {triggers}")
            self._check_schema(structure.get("schema"))
        _check_bytes(dumps(structures), "structural_tag")

    def _check_json_only(self, kind: str) -> None:
        given = [name for name in _JSON_ONLY if getattr(self, name)]
        if given and kind not in ("json", "json_object"):
            raise ValueError(f"{given[0]} goes with json or json_object only, got {kind}")
        if self.disable_any_whitespace and self.whitespace_pattern is not None:
            raise ValueError("give either disable_any_whitespace or whitespace_pattern, not both")
        for name in _JSON_ONLY[:2]:
            if not isinstance(getattr(self, name), bool):
                self._refuse(name, getattr(self, name), "True or False")

    def _refuse(self, name: str, value: object, must: str) -> None:
        raise ValueError(f"structured_outputs.{name} must be {must}, got {value!r:.200}")


def _parsed(value: Any, name: str) -> Any:
    if not isinstance(value, str):
        return value
    _check_bytes(value, name)
    try:
        return loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"structured_outputs.{name} is not JSON: {error}") from None


def _check_bytes(text: str, name: str) -> None:
    size = len(text.encode(errors="replace"))
    if size > MAX_BYTES:
        raise ValueError(f"structured_outputs.{name} must be at most {MAX_BYTES} bytes, got {size}")


def is_nested_deeper(value: Any, max_depth: int) -> bool:
    """Whether lists and objects are nested more than `max_depth` levels deep."""
    level = [value]
    for _ in range(max_depth + 1):
        level = [inner for outer in level for inner in _members(outer)]
        if not level:
            return False
    return True


def _members(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        yield from value.values()
    elif isinstance(value, (list, tuple)):
        yield from value
