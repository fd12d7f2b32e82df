"""Reads the arguments of a tool call that are written in tags."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from compiledllm.server.openai.answer_parts import hold_back
from compiledllm.server.openai.argument_values import (
    STRING,
    TYPES,
    json_of,
    properties_of,
    quoted,
    types_of,
)
from compiledllm.server.openai.format_markers import Tags
from compiledllm.server.openai.held_reader import HeldReader

_MAX_KEY = 1024  # characters
_BEFORE_STRINGS = "[{(,:"


class TagReader(HeldReader):
    """Arguments in tags. Values follow the schema; strings are shown as they are written."""

    def __init__(self, tags: Tags, name: str, schema: Any) -> None:
        super().__init__(name)
        self._tags = tags
        self._schema = schema if isinstance(schema, Mapping) else {}
        self._known, _ = properties_of(schema, schema)
        self._read: Callable[[str, int], int] = self._on_head
        self._key = ""
        self._separator = ""
        self._types = TYPES
        self._value: list[str] | None = None  # of another type than string; None: of a string
        # In an array or an object: what ends the present string, and the last character that is
        # neither space nor inside a string.
        self._quote = self._last = ""
        self._first = ""  # the first character of the value that is no space
        self._is_escaped = False

    def _step(self, text: str, position: int) -> int:
        return self._read(text, position)

    def _on_head(self, text: str, position: int) -> int:
        """The end of the head, then a marker: anything else is no call."""
        while position < len(text) and text[position] in ' \t\r\n">':
            self._raw.append(text[position])
            position += 1
        if any(text.startswith(marker, position) for marker in self._tags.markers):
            self._begin()
            self._read = self._between
        elif any(
            marker.startswith(text[position : position + len(marker)])
            for marker in self._tags.markers
        ):
            self._held = text[position:]
            return len(text)
        elif position < len(text):
            self.state = "failed"
        return position

    def _between(self, text: str, position: int) -> int:
        """Between arguments. Text other than an argument or the call's end is dropped."""
        found = self._tags.marker.search(text, position)
        if found is None:
            self._held = hold_back(text[position:], self._tags.markers)[1]
            return len(text)
        if found.group() == self._tags.key_open:
            self._read = self._in_key
        else:
            self._end()
        return found.end()

    def _in_key(self, text: str, position: int) -> int:
        end = text.find(self._tags.key_close, position)
        if end < 0 and len(text) - position <= _MAX_KEY:
            self._held = text[position:]
            return len(text)
        if not 0 <= end - position <= _MAX_KEY:
            self._read = self._between
            return position
        key, _, attributes = text[position:end].partition('"')
        self._key = key.strip()
        self._types = self._types_of(attributes)
        self._read = self._before_value if self._tags.value_open else self._on_value
        return end + len(self._tags.key_close)

    def _types_of(self, attributes: str) -> frozenset[str]:
        """The types of the present value. One that the schema does not know is a string."""
        if "string=" in attributes:
            return STRING if "true" in attributes else TYPES - STRING
        known, others = self._known, self._schema.get("additionalProperties")
        if self._key in known:
            return types_of(known[self._key], self._schema)
        return types_of(others, self._schema) if isinstance(others, Mapping) else STRING

    def _before_value(self, text: str, position: int) -> int:
        """After a key whose value has a tag of its own."""
        found = self._tags.value_start.search(text, position)
        if found is None:
            self._held = hold_back(text[position:], [self._tags.value_open, *self._tags.markers])[1]
            return len(text)
        if found.group() != self._tags.value_open:
            self._read = self._between
            return found.start()
        self._read = self._on_value
        return found.end()

    def _on_value(self, text: str, position: int) -> int:
        is_string = self._types == STRING
        self._fragments.append(
            f"{self._separator}{quoted(self._key)}: " + ('"' if is_string else "")
        )
        self._separator, self._value = ", ", None if is_string else []
        self._first = self._last = self._quote = ""
        self._is_escaped = False
        self._read = self._in_value
        return position + (self._tags.trims and text[position] == "\n")

    def _in_value(self, text: str, position: int) -> int:
        found = self._tags.value_end.search(text, position)
        if found is None:
            piece, self._held = hold_back(text[position:], self._tags.value_ends)
            self._add(piece)
            return len(text)
        self._add(text[position : found.start()])
        if self._quote:  # in an array or an object, what looks like an end may be text
            self._add(text[found.start()])
            return found.start() + 1
        self._end_value()
        self._read = self._between
        is_closed = found.group().endswith(self._tags.value_close)
        return found.end() if is_closed else found.start()

    def _add(self, piece: str) -> None:
        if self._value is None:
            self._fragments.append(quoted(piece)[1:-1])
        elif piece:
            self._value.append(piece)
            self._first = self._first or piece.lstrip()[:1]
            if self._first in ("[", "{"):
                self._follow_quotes(piece)

    def _follow_quotes(self, piece: str) -> None:
        """Track whether the value is inside a string, of JSON or Python.

        A quotation mark begins a string only where a string can begin.
        """
        for char in piece:
            if self._quote:
                is_end = char == self._quote and not self._is_escaped
                self._is_escaped = char == "\\" and not self._is_escaped
                self._quote = "" if is_end else self._quote
            elif char in "\"'" and self._last in _BEFORE_STRINGS:
                self._quote = char
            if not (self._quote or char.isspace()):
                self._last = char

    def _end_value(self) -> None:
        value = self._value
        self._fragments.append('"' if value is None else json_of("".join(value), self._types))

    def finish(self) -> None:
        if self.is_known and self.state == "open":
            if self._read == self._in_value:
                self._add(self._held)
                self._end_value()
            self._end()
