"""Lark grammars of tool calls in the formats of `tool_formats`, for llguidance.

In every format, the grammar fixes the functions' names, the parameters' names and which parameters
are required. Values in JSON and Python literals follow their schemas completely. In tags, strings
follow `enum` and length only, and a value that may be a string or of another type is free text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from compiledllm.server.openai.argument_values import (
    STRING,
    json_of,
    list_of,
    quoted,
    resolved,
    types_of,
    values_of,
)
from compiledllm.server.openai.call_rules import CallRules, MemberRules, can_be_copied
from compiledllm.server.openai.format_markers import tags_of
from compiledllm.server.openai.literal_readers import GEMMA_QUOTE, GEMMA_WORD
from compiledllm.server.openai.tool_formats import FORMATS, ToolFormat

_ANY_KEY = "/[a-zA-Z_][a-zA-Z0-9_]{0,63}/"


def call_grammar(
    form: ToolFormat,
    tools: Sequence[dict[str, Any]],
    token_id: Callable[[str], int | None],
    max_calls: int | None,
) -> str:
    """Rules of a grammar in which the rule `calls` is one or more calls of OpenAI's tool objects.

    With channels, the rule `final` is the text before an answer without calls.

    token_id: the id of a marker that is a single token, else None. Raises ValueError if the rules
    are too long, and for a parameter that the format cannot write.
    """
    make = {"tags": _TagGrammar, "python": _PythonGrammar, "gemma": _GemmaGrammar}
    grammar = make.get(form.syntax, CallRules)(form, token_id)
    calls = [grammar.call(tool) for tool in tools]
    grammar.rule("call", " | ".join(calls))
    # In gpt-oss's channels, the end of a call also ends the answer, so no second call follows.
    has_more = max_calls != 1 and form.syntax != "channels"
    more = f"({grammar.text(form.separator)} call)*" if has_more else ""
    before = grammar.text(form.begin)
    if form.syntax == "channels":
        before = grammar.analysis()
        grammar.rule("final", grammar.final())
    calls_rule = f"calls: {before} call {more} {grammar.text(form.end)}"
    return "\n".join([calls_rule, *grammar.rules])


def json_in_channels(schema: Mapping[str, Any], token_id: Callable[[str], int | None]) -> str:
    """A grammar of gpt-oss's answers in JSON of a schema, which may begin with reasoning."""
    grammar = CallRules(FORMATS["openai"], token_id)
    start = f"start: {grammar.final()} answer\n{answer_rule(schema)}"
    return "\n".join([start, *grammar.rules])


def answer_rule(schema: Mapping[str, Any]) -> str:
    """The rule `answer`, JSON of a schema."""
    return f"answer: %json {json.dumps(schema)}"


class _TagGrammar(MemberRules):
    def arguments(self) -> str:
        return self.members(resolved(self._schema, self._schema), "")

    def member(self, key: str | None, schema: Any) -> str:
        _check_name(key, '<>"')
        return self.new_rule(" | ".join(self._forms(key, schema)))

    def _forms(self, key: str | None, schema: Any) -> list[str]:
        """A parameter with each of the forms that its value may have."""
        types = types_of(schema, self._schema)
        ends = self.form.parameter.partition("{value}")[2]
        if values := self._values(schema, types):
            return [self._form(key, is_string, self.text(v + ends)) for v, is_string in values]
        if "string" not in types and can_be_copied(schema):
            return [self._form(key, False, f"{self.json(schema)} {self.text(ends)}")]
        length = _length(resolved(schema, self._schema)) if types == STRING else "*"
        tags = tags_of(self.form)
        before, _, after = ends.partition(tags.value_close)
        value = self.free_text(before, tags.value_close, tags.value_ends, length)
        forms = [self._form(key, True, f"{value} {self.text(after)}")]
        if "{is_string}" in self.form.parameter and types != STRING and can_be_copied(schema):
            forms.append(self._form(key, False, f"{self.json(schema)} {self.text(ends)}"))
        return forms

    def _form(self, key: str | None, is_string: bool, value: str) -> str:
        start = self.form.parameter.partition("{value}")[0]
        start = start.replace("{is_string}", "true" if is_string else "false")
        before, _, after = start.partition("{key}")
        if key is None:
            return f"{self.text(before)} {_ANY_KEY} {self.text(after)} {value}"
        return f"{self.text(before + key + after)} {value}"

    def _values(self, schema: Any, types: frozenset[str]) -> list[tuple[str, bool]]:
        """The texts of an enumeration's values, and whether each is a string.

        A value is left out if its text would be read as another value.
        """
        texts = []
        for value in self._enumerated(schema):
            is_string = isinstance(value, str)
            text = value if is_string else json.dumps(value)
            read = json_of(
                text, STRING if is_string and "{is_string}" in self.form.parameter else types
            )
            ends = tags_of(self.form).value_ends
            if json.loads(read) == value and not any(end.strip() in text for end in ends):
                texts.append((text, is_string))
        return texts

    def _enumerated(self, schema: Any) -> list[Any]:
        """The values of an enumeration, or of a choice between enumerations and null."""
        schema = resolved(schema, self._schema) if isinstance(schema, Mapping) else {}
        values: list[Any] = []
        for one in list_of(schema, "anyOf") or [schema]:
            option = resolved(one, self._schema) if isinstance(one, Mapping) else {}
            found = [None] if option.get("type") == "null" else values_of(option)
            if not found:
                return []
            values += found
        return values


class _PythonGrammar(MemberRules):
    def arguments(self) -> str:
        return f'"(" {self.members(resolved(self._schema, self._schema), ", ")} ")"'

    def member(self, key: str | None, schema: Any) -> str:
        _check_name(key, "\"'=,()[]{}")
        start = f'{_ANY_KEY} "="' if key is None else quoted(f"{key}=")
        return self.new_rule(f"{start} {self.json(schema)}")


def _check_name(name: str | None, forbidden: str) -> None:
    """Raise ValueError for a parameter's name that cannot be told from a format's own signs."""
    if name and set(name) & {*forbidden, "\n"}:
        raise ValueError(
            f"this model's calls cannot name the parameter {quoted(name)}; take a name without "
            + " ".join(forbidden)
        )


class _GemmaGrammar(MemberRules):
    def arguments(self) -> str:
        return self._object(resolved(self._schema, self._schema))

    def ordered(self, properties: dict[str, Any]) -> Iterable[tuple[str, Any]]:
        """In the order in which chat templates show parameters and calls."""
        return sorted(properties.items(), key=lambda item: item[0].lower())

    def member(self, key: str | None, schema: Any) -> str:
        start = f'{_ANY_KEY} ":"' if key is None else self.text(_gemma_key(key) + ":")
        return self.new_rule(f"{start} {self._value(schema)}")

    def _object(self, schema: Mapping[str, Any]) -> str:
        return f'"{{" {self.members(schema, ",")} "}}"'

    def _value(self, schema: Any) -> str:
        """The name of a rule of a value. Schemas may contain themselves, and so may rules."""
        if not isinstance(schema, Mapping) or not schema:
            return self._any()
        schema = resolved(schema, self._schema)
        if id(schema) not in self._known:
            self._known[id(schema)] = name = f"value_{len(self._known)}"
            self.rule(name, self._value_body(schema))
        return self._known[id(schema)]

    def _value_body(self, schema: Mapping[str, Any]) -> str:
        types, names = types_of(schema, self._schema), list_of(schema, "type")
        if schema.get("nullable") is True and "type" in schema:
            names = [*(names or [schema["type"]]), "null"]
        if names:
            kinds = ({**schema, "type": name, "nullable": False} for name in names)
            return " | ".join(map(self._value_body, kinds))
        if values := values_of(schema):
            return " | ".join(self.text(_in_gemma(value)) for value in values)
        if types == STRING:
            return self._string(_length(schema))
        if types == {"object"}:
            return self._object(schema)
        if types == {"array"}:
            return self._array(schema)
        if not types & {"string", "object", "array"} and can_be_copied(schema):
            return self.json(schema)
        options = [self._value(one) for name in ("anyOf", "oneOf") for one in list_of(schema, name)]
        return " | ".join(options) or self._any()

    def _array(self, schema: Mapping[str, Any]) -> str:
        item = self._value(schema.get("items"))
        least, most = _size(schema, "minItems") or 0, _size(schema, "maxItems")
        if most == 0:
            return '"[" "]"'
        count = f"{{{max(least - 1, 0)},{'' if most is None else most - 1}}}"
        items = item if most == 1 else f'{item} ("," {item}){count}'
        items = items if least else f"({items})?"
        return f'"[" {items} "]"'

    def _string(self, length: str = "*") -> str:
        text = self.free_text("", GEMMA_QUOTE, [GEMMA_QUOTE], length)
        return f"{self.text(GEMMA_QUOTE)} {text}"

    def _any(self) -> str:
        """The name of a rule of any value."""
        if "any" not in self._known:
            plain, text = self.json({"type": ["number", "boolean", "null"]}), self._string()
            member = f'{_ANY_KEY} ":" any'
            objects = f'"{{" ({member} ("," {member})*)? "}}" | "[" (any ("," any)*)? "]"'
            self._known["any"] = self.rule("any", f"{plain} | {text} | {objects}")
        return "any"


def _gemma_key(key: str) -> str:
    return key if GEMMA_WORD.fullmatch(key) else _in_gemma(key)


def _in_gemma(value: Any) -> str:
    if isinstance(value, str):
        return GEMMA_QUOTE + value + GEMMA_QUOTE
    if isinstance(value, Mapping):
        members = (f"{_gemma_key(key)}:{_in_gemma(inner)}" for key, inner in value.items())
        return "{" + ",".join(members) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_in_gemma, value)) + "]"
    return json.dumps(value)


def _length(schema: Mapping[str, Any]) -> str:
    """The quantifier of a string's characters."""
    least, most = _size(schema, "minLength"), _size(schema, "maxLength")
    if not least and most is None:
        return "*"
    return f"{{{least or 0},{'' if most is None else most}}}"


def _size(schema: Mapping[str, Any], keyword: str) -> int | None:
    """The value of a keyword that takes a number of things; None if the schema has none."""
    value = schema.get(keyword)
    if value is None or (isinstance(value, int | float) and value >= 0 and value == int(value)):
        return None if value is None else int(value)
    raise ValueError(f"{keyword} {json.dumps(value)} must be an integer of at least 0")
