"""Writes the Lark rules of tool calls with JSON arguments; base class for other syntaxes."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from compiledllm.server.openai.argument_values import properties_of, quoted
from compiledllm.server.openai.format_markers import MARKER
from compiledllm.server.openai.tool_formats import ToolFormat
from compiledllm.structured_outputs import MAX_BYTES

# White space as chat templates and therefore models write it: `{"a": 1, "b": 2}`.
_AS_IN_TEMPLATES = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_REFERENCE = re.compile(r'"\$ref": "([^"]*)"')
_DEFINITION = re.compile(r"#/(\$defs|definitions)/([^/]+)")  # a reference that can be copied


class CallRules:
    """Writes the rules of one format, here with arguments in JSON; subclasses override that."""

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
            raise ValueError(
                f"their grammar is larger than {MAX_BYTES} bytes; give fewer or simpler tools"
            )
        return name

    def new_rule(self, body: str) -> str:
        """The name of a rule with this body; equal rules are one."""
        if body not in self._known:
            self._known[body] = self.rule(f"part_{len(self.rules)}", body)
        return self._known[body]

    def text(self, text: str) -> str:
        """A fixed text, in which markers that are single tokens are written as token ids."""
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
        before, _, after = self.form.head.partition("{name}")
        before, _, number = (before + "{name}" + after).partition("{number}")
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

    def final(self) -> str:
        """The text before a final message: optional reasoning, then the message's header."""
        constraint = f"({self.text(' <|constrain|>json')})?"
        header = f"{self.text('<|channel|>final')} {constraint} {self.text('<|message|>')}"
        return f"{self.analysis()} {header}"


class MemberRules(CallRules, ABC):
    """Writes the rules of arguments member by member, for a syntax other than JSON."""

    @abstractmethod
    def arguments(self) -> str: ...

    def members(self, schema: Mapping[str, Any], separator: str) -> str:
        """A rule for an object's members: in the schema's order, optional ones may be missing."""
        properties, required = properties_of(schema, self._schema)
        properties |= {name: {} for name in sorted(required) if name not in properties}
        properties = {name: one for name, one in self.ordered(properties) if one is not False}
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

    def ordered(self, properties: dict[str, Any]) -> Iterable[tuple[str, Any]]:
        """Names and schemas in the order in which calls have them."""
        return properties.items()

    def _any_members(self, schema: Mapping[str, Any], separator: str) -> str:
        member = self.member(None, schema.get("additionalProperties", {}))
        if not separator:
            return f"{member}*"
        return f"({member} ({quoted(separator)} {member})*)?"

    @abstractmethod
    def member(self, key: str | None, schema: Any) -> str:
        """A rule of a member with this key; None: any key."""


def _references(schema: Any) -> frozenset[str]:
    return frozenset(_REFERENCE.findall(json.dumps(schema)))


def can_be_copied(schema: Any) -> bool:
    """Whether references lead to definitions, which are copied along with the schema."""
    return all(map(_DEFINITION.match, _references(schema)))


def _escaped(text: str) -> str:
    """A regular expression of a text, as it stands between slashes."""
    return re.sub(r"([\\.+*?()|\[\]{}^$/\"])", r"\\\1", text).replace("\n", "\\n")
