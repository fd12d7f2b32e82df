"""Lark grammars of tool calls in the formats of `tool_formats`, for llguidance.

Names, the arguments' names and required arguments are bound in every format, and values by their
schemas: JSON and Python literals wholly. In tags, a string is bound by its `enum` or its length,
and a value that may be a string or something else is free text, as are free strings.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from compiledllm.server.openai.argument_values import (
    STRING,
    json_of,
    quoted,
    resolved,
    types_of,
)
from compiledllm.server.openai.format_markers import MARKER, tags_of
from compiledllm.server.openai.tool_formats import ToolFormat
from compiledllm.structured_outputs import MAX_BYTES

# White space as chat templates and therefore models write it: `{"a": 1, "b": 2}`.
_AS_IN_TEMPLATES = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_ANY_KEY = "/[a-zA-Z_][a-zA-Z0-9_]{0,63}/"
_REFERENCE = re.compile(r'"\$ref": "([^"]*)"')
_DEFINITION = re.compile(r"#/(\$defs|definitions)/([^/]+)")  # a reference that can be copied
_GEMMA_QUOTE = '<|"|>'


def call_grammar(
    form: ToolFormat,
    tools: Sequence[dict[str, Any]],
    token_id: Callable[[str], int | None],
    max_calls: int | None,
) -> str:
    """Rules of a grammar in which `calls` is one or more calls of OpenAI's tool objects.

    token_id: the id of a marker that is a single token, else None. Raises ValueError if the rules
    are too long.
    """
    make = {"tags": _TagGrammar, "python": _PythonGrammar, "gemma": _GemmaGrammar}
    grammar = make.get(form.syntax, _Grammar)(form, token_id)
    calls = [grammar.call(tool) for tool in tools]
    grammar.rule("call", " | ".join(calls))
    # The end of a call in gpt-oss's channels ends the answer, which may begin with reasoning.
    has_more = max_calls != 1 and form.syntax != "channels"
    more = f"({grammar.text(form.separator)} call)*" if has_more else ""
    before = grammar.analysis() if form.syntax == "channels" else grammar.text(form.begin)
    calls_rule = f"calls: {before} call {more} {grammar.text(form.end)}"
    return "\n".join([calls_rule, *grammar.rules])


class _Grammar:
    """Writes the rules of a format. This class is for arguments in JSON."""

    def __init__(self, form: ToolFormat, token_id: Callable[[str], int | None]) -> None:
        self.form = form
        self.rules: list[str] = []
        self._token_id = token_id
        self._schema: Mapping[str, Any] = {}  # of the present tool, where references lead
        self._known: dict[Any, str] = {}  # bodies of rules, and arguments of texts -> their names
        self._used: dict[tuple[int, frozenset[str]], dict[str, Any]] = {}
        self._size = 0

    # -- pieces of rules -------------------------------------------------------------------------

    def rule(self, name: str, body: str) -> str:
        self.rules.append(f"{name}: {body}")
        self._size += len(self.rules[-1])
        if self._size > MAX_BYTES:
            raise ValueError(f"they make a grammar of more than {MAX_BYTES} bytes; give fewer")
        return name

    def new_rule(self, body: str) -> str:
        """The name of a rule with this body; equal rules are one."""
        if body not in self._known:
            self._known[body] = self.rule(f"part_{len(self.rules)}", body)
        return self._known[body]

    def text(self, text: str) -> str:
        """A fixed text, in which markers that are tokens are these tokens."""
        pieces, start = [], 0
        for match in MARKER.finditer(text):
            if (token_id := self._token_id(match.group())) is not None:
                pieces += [quoted(text[start : match.start()]), f"<[{token_id}]>"]
                start = match.end()
        pieces.append(quoted(text[start:]))
        return " ".join(piece for piece in pieces if piece != '""')

    def free_text(self, before: str, marker: str, without: Iterable[str], length: str = "*") -> str:
        """Any text that contains none of `without`, then `before` and a marker.

        length: a regular expression's quantifier.
        """
        key = (before, marker, length)
        if key in self._known:
            return self._known[key]
        texts, token_id = "|".join(map(_escaped, without)), self._token_id(marker)
        body = f"(?s:.{length})" + ("" if token_id is None else _escaped(before))
        name = self.rule(f"TEXT_{len(self.rules)}", f"/{body}/ & ~/(?s:.*)({texts})(?s:.*)/")
        if token_id is None:
            end = self.rule(f"{name.lower()}[suffix={quoted(before + marker)}]", name)
            self._known[key] = end.partition("[")[0]
        else:
            self._known[key] = f"{name} <[{token_id}]>"
        return self._known[key]

    def json(self, schema: Any) -> str:
        schema = schema if isinstance(schema, Mapping) else {}
        key = (id(self._schema), json.dumps(schema))
        if key not in self._known:
            if schema is not self._schema:
                schema = self._definitions(_references(schema)) | schema
            text = json.dumps({**schema, "x-guidance": _AS_IN_TEMPLATES})
            self._known[key] = self.new_rule(f"%json {text}")
        return self._known[key]

    def _definitions(self, references: frozenset[str]) -> dict[str, Any]:
        """The present schema's definitions that references lead to, directly or not."""
        key = (id(self._schema), references)
        if key not in self._used:
            used: dict[str, dict[str, Any]] = {}
            todo = sorted(references)
            while todo:
                if (match := _DEFINITION.match(todo.pop())) is None:
                    continue
                place, name = match.groups()
                found = self._schema.get(place)
                if isinstance(found, Mapping) and name in found and name not in used.get(place, ()):
                    used.setdefault(place, {})[name] = found[name]
                    todo += _references(found[name])
            self._used[key] = used
        return dict(self._used[key])

    # -- calls -----------------------------------------------------------------------------------

    def call(self, tool: dict[str, Any]) -> str:
        """The name of a rule of a call of this tool."""
        self._schema = tool.get("parameters") or {"type": "object"}
        before, _, behind = self.form.head.partition("{name}")
        before, _, number = (before + "{name}" + behind).partition("{number}")
        name = json.dumps(tool["name"])[1:-1]
        head = self.text(self.form.open + before.replace("{name}", name))
        if number:
            head += f" /[0-9]{{1,3}}/ {self.text(number)}"
        close = "" if self.form.syntax == "channels" else self.text(self.form.close)
        return self.new_rule(f"{head} {self.arguments()} {close}")

    def arguments(self) -> str:
        return self.json(self._schema)

    def analysis(self) -> str:
        """Reasoning in a channel of its own, or nothing."""
        start = self.text("<|channel|>analysis<|message|>")
        thought = self.free_text("", "<|end|>", ["<|end|>"])
        return f"({start} {thought} {self.text('<|start|>assistant')})?"

    # -- objects ---------------------------------------------------------------------------------

    def members(self, schema: Mapping[str, Any], separator: str) -> str:
        """An object's members in the schema's order, with those that are required."""
        properties, required = _properties(schema, self._schema)
        if not properties:
            is_closed = schema.get("additionalProperties") is False or "properties" in schema
            return "" if is_closed else self._any_members(schema, separator)
        members = [(self.member(n, s), n in required) for n, s in properties.items()]
        if not separator:
            return " ".join(name if is_needed else f"{name}?" for name, is_needed in members)
        first = rest = '""'
        for name, is_needed in reversed(members):
            first = f"{name} {rest}" + ("" if is_needed else f" | {first}")
            rest = f"{quoted(separator)} {name} {rest}" + ("" if is_needed else f" | {rest}")
            first, rest = self.new_rule(first), self.new_rule(rest)
        return first

    def _any_members(self, schema: Mapping[str, Any], separator: str) -> str:
        member = self.member(None, schema.get("additionalProperties", {}))
        if not separator:
            return f"{member}*"
        return f"({member} ({quoted(separator)} {member})*)?"

    def member(self, key: str | None, schema: Any) -> str:
        """A rule of a member with this key; None: any key."""
        raise NotImplementedError


class _TagGrammar(_Grammar):
    def arguments(self) -> str:
        return self.members(resolved(self._schema, self._schema), "")

    def member(self, key: str | None, schema: Any) -> str:
        return self.new_rule(" | ".join(self._forms(key, schema)))

    def _forms(self, key: str | None, schema: Any) -> list[str]:
        """A parameter with each of the forms that its value may have."""
        types = types_of(schema, self._schema)
        ends = self.form.parameter.partition("{value}")[2]
        if values := self._values(schema, types):
            return [self._form(key, is_string, self.text(v + ends)) for v, is_string in values]
        if "string" not in types and _can_be_copied(schema):
            return [self._form(key, False, f"{self.json(schema)} {self.text(ends)}")]
        length = _length(resolved(schema, self._schema)) if types == STRING else "*"
        tags = tags_of(self.form)
        before, _, behind = ends.partition(tags.value_close)
        value = self.free_text(before, tags.value_close, tags.value_ends, length)
        return [self._form(key, True, f"{value} {self.text(behind)}")]

    def _form(self, key: str | None, is_string: bool, value: str) -> str:
        start = self.form.parameter.partition("{value}")[0]
        start = start.replace("{is_string}", "true" if is_string else "false")
        before, _, behind = start.partition("{key}")
        if key is None:
            return f"{self.text(before)} {_ANY_KEY} {self.text(behind)} {value}"
        return f"{self.text(before + key + behind)} {value}"

    def _values(self, schema: Any, types: frozenset[str]) -> list[tuple[str, bool]]:
        """The texts of an enumeration's values that are read as these values, and if strings."""
        schema = resolved(schema, self._schema) if isinstance(schema, Mapping) else {}
        values = [schema["const"]] if "const" in schema else schema.get("enum")
        texts = []
        for value in values if isinstance(values, list) else ():
            is_string = isinstance(value, str)
            text = value if is_string else json.dumps(value)
            read = json_of(
                text, STRING if is_string and "{is_string}" in self.form.parameter else types
            )
            ends = tags_of(self.form).value_ends
            if json.loads(read) == value and not any(end.strip() in text for end in ends):
                texts.append((text, is_string))
        return texts


class _PythonGrammar(_Grammar):
    def arguments(self) -> str:
        return f'"(" {self.members(resolved(self._schema, self._schema), ", ")} ")"'

    def member(self, key: str | None, schema: Any) -> str:
        start = f'{_ANY_KEY} "="' if key is None else quoted(f"{key}=")
        return self.new_rule(f"{start} {self.json(schema)}")


class _GemmaGrammar(_Grammar):
    def arguments(self) -> str:
        return self._object(resolved(self._schema, self._schema))

    def member(self, key: str | None, schema: Any) -> str:
        start = f'{_ANY_KEY} ":"' if key is None else quoted(f"{key}:")
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
        types = types_of(schema, self._schema)
        values = [schema["const"]] if "const" in schema else schema.get("enum")
        if isinstance(values, list):
            return " | ".join(self.text(_in_gemma(value)) for value in values)
        if types == STRING:
            return self._string(_length(schema))
        if types == {"object"}:
            return self._object(schema)
        if types == {"array"}:
            return self._array(schema)
        if not types & {"string", "object", "array"} and _can_be_copied(schema):
            return self.json(schema)
        options = [self._value(one) for name in ("anyOf", "oneOf") for one in schema.get(name, ())]
        return " | ".join(options) or self._any()

    def _array(self, schema: Mapping[str, Any]) -> str:
        item = self._value(schema.get("items"))
        least, most = schema.get("minItems", 0), schema.get("maxItems", "")
        if most == 0:
            return '"[" "]"'
        count = f"{{{max(least - 1, 0)},{most and most - 1}}}"
        items = item if most == 1 else f'{item} ("," {item}){count}'
        items = items if least else f"({items})?"
        return f'"[" {items} "]"'

    def _string(self, length: str = "*") -> str:
        text = self.free_text("", _GEMMA_QUOTE, [_GEMMA_QUOTE], length)
        return f"{self.text(_GEMMA_QUOTE)} {text}"

    def _any(self) -> str:
        """The name of a rule of any value."""
        if "any" not in self._known:
            plain, text = self.json({"type": ["number", "boolean", "null"]}), self._string()
            member = f'{_ANY_KEY} ":" any'
            objects = f'"{{" ({member} ("," {member})*)? "}}" | "[" (any ("," any)*)? "]"'
            self._known["any"] = self.rule("any", f"{plain} | {text} | {objects}")
        return "any"


def _in_gemma(value: Any) -> str:
    if isinstance(value, str):
        return _GEMMA_QUOTE + value + _GEMMA_QUOTE
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_in_gemma(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_in_gemma, value)) + "]"
    return json.dumps(value)


def _properties(schema: Mapping[str, Any], root: Any) -> tuple[dict[str, Any], set[str]]:
    """An object's properties and the names of those that it must have."""
    properties, required = dict(schema.get("properties") or {}), set(schema.get("required") or ())
    for one in schema.get("allOf") or ():
        part = resolved(one, root) if isinstance(one, Mapping) else {}
        properties = dict(part.get("properties") or {}) | properties
        required |= set(part.get("required") or ())
    properties |= {name: {} for name in sorted(required) if name not in properties}
    return {name: one for name, one in properties.items() if one is not False}, required


def _length(schema: Mapping[str, Any]) -> str:
    """The quantifier of a string's characters."""
    least, most = schema.get("minLength", 0), schema.get("maxLength")
    if not least and most is None:
        return "*"
    return f"{{{least},{'' if most is None else most}}}"


def _references(schema: Any) -> frozenset[str]:
    return frozenset(_REFERENCE.findall(json.dumps(schema)))


def _can_be_copied(schema: Any) -> bool:
    """Whether references lead to definitions, which are copied along with the schema."""
    return all(map(_DEFINITION.match, _references(schema)))


def _escaped(text: str) -> str:
    """A regular expression of a text, as it stands between slashes."""
    return re.sub(r"([\\.+*?()|\[\]{}^$/\"])", r"\\\1", text).replace("\n", "\\n")
