"""Reads one tool call as the model writes it, a JSON object, character by character.

Name and arguments are reported as early as possible, so that arguments can be streamed. The scanner
does not validate: the arguments are the model's own text between matching brackets, in which only
control characters in strings are escaped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Container
from typing import Literal

from compiledllm.server.openai.argument_values import quoted

MAX_BUFFERED = 2**16  # characters of a call whose name is not known yet
MAX_NESTING = 64
_SPACE = " \t\n\r"
_ARGUMENTS = ("arguments", "parameters")
_BARE_KEYS = {*_ARGUMENTS, "name", "type", "id"}
_CLOSES = {"{": "}", "[": "]"}
_MARKER = "<"  # begins every marker, and occurs nowhere in JSON outside strings


class CallScanner:
    """Reads a call from the object's "{" on.

    state: "open" while the call continues, "done" after its end, "failed" if the text is not a
    call. is_known: the name and the beginning of the arguments have been read; after that, "failed"
    means that the call breaks off. is_tentative: whether the text may turn out to be no call.
    """

    def __init__(
        self, names: Container[str], name: str | None = None, is_bare: bool = False
    ) -> None:
        """name: the function's name if the object holds only the arguments. is_bare: the call has
        no marker, so its first key must tell it from other JSON.
        """
        self._names = names
        self._keys = _BARE_KEYS if is_bare else None
        self.name = name
        self.state: Literal["open", "done", "failed"] = "open"
        self.is_known = False
        self.is_tentative = is_bare
        self._raw: list[str] = []  # all characters read before the call is known
        self._fragments: list[str] = []  # the text of the arguments that has not been taken yet
        self._has_arguments = False
        self._is_arguments = name is not None
        self._key = "arguments" if self._is_arguments else ""
        self._value: list[str] | None = None  # characters of the present value; None: ignored
        self._brackets: list[str] = []  # closing brackets that the present value still needs
        self._is_escaped = False
        self._step: Callable[[str], None] = self._on_value if self._is_arguments else self._on_start

    def feed(self, text: str, position: int) -> int:
        """Read on from `position`, and return the position of the first character not read."""
        while position < len(text) and self.state == "open":
            self._feed(text[position])
            if self.is_known and self._is_broken():
                break  # this character, at which the call breaks off, does not belong to the call
            position += 1
        return position

    def _is_broken(self) -> bool:
        return self.state == "failed"

    def _feed(self, char: str) -> None:
        if not self.is_known:
            self._raw.append(char)
            if len(self._raw) > MAX_BUFFERED:
                self.state = "failed"
                return
        self._step(char)

    def finish(self) -> None:
        """The text ends here: the arguments stay as far as they go."""

    def raw(self) -> str:
        """All text that has been read, while the call is not known."""
        return "".join(self._raw)

    def unread(self) -> str:
        return ""  # each character is decided at once

    @property
    def missing_brackets(self) -> str:
        """The brackets that would close the arguments if the call broke off inside them."""
        inside = self.state == "failed" and self._value is self._fragments
        return "".join(reversed(self._brackets)) if inside else ""

    def take_arguments(self) -> str:
        """The arguments' text since the last call of this method; "" before the call is known."""
        if not self.is_known:
            return ""
        text = "".join(self._fragments)
        self._fragments.clear()
        return text

    # -- between members: each takes one character -----------------------------------------------

    def _on_start(self, char: str) -> None:
        self._go(self._on_key) if char == "{" else self._fail()

    def _on_key(self, char: str) -> None:
        if char == '"':
            self._value = [char]
            self._go(self._in_key)
        elif char == "}":
            self._end()
        elif char not in _SPACE:
            self._fail()

    def _in_key(self, char: str) -> None:
        if self._string_ends(char):
            self._key = self._decoded()
            if not self.is_known and self._keys is not None and self._key not in self._keys:
                self._fail()
            self._go(self._on_colon)

    def _on_colon(self, char: str) -> None:
        if char == ":":
            self._go(self._on_value)
        elif char not in _SPACE:
            self._fail()

    def _on_comma(self, char: str) -> None:
        if char == ",":
            self._go(self._on_key)
        elif char in ("}", _MARKER):
            self._end()
            if char == _MARKER:
                self._fail()
        elif char not in _SPACE:
            self._fail()

    # -- values ----------------------------------------------------------------------------------

    def _on_value(self, char: str) -> None:
        if char in _SPACE:
            return
        is_first = self._key in _ARGUMENTS and not self._has_arguments
        if is_first and char == "{":
            self._has_arguments = True
            self._value = self._fragments
            self._look()
        else:
            is_wanted = is_first or (self._key == "name" and self.name is None)
            self._value = [] if is_wanted else None
        self._keep(char)
        if char in _CLOSES:
            self._brackets = [_CLOSES[char]]
            self._go(self._in_container)
        else:
            self._go(self._in_string if char == '"' else self._in_scalar)

    def _in_string(self, char: str) -> None:
        if self._string_ends(char):
            self._value_ends()

    def _in_scalar(self, char: str) -> None:
        if char in (",", "}", _MARKER):
            self._value_ends()
            if self.state == "open":
                self._step(char)
        elif char in '"{[:':
            self._fail()
        else:
            self._keep(char)

    def _in_container(self, char: str) -> None:
        is_open, is_close = char in _CLOSES, char in "]}"
        too_deep = is_open and len(self._brackets) == MAX_NESTING
        if too_deep or char == _MARKER or (is_close and self._brackets[-1] != char):
            self._fail()
            return
        self._keep(char)
        if char == '"':
            self._go(self._in_inner_string)
        elif is_open:
            self._brackets.append(_CLOSES[char])
        elif is_close:
            self._brackets.pop()
            if not self._brackets:
                self._value_ends()

    def _in_inner_string(self, char: str) -> None:
        if self._string_ends(char):
            self._go(self._in_container)

    def _string_ends(self, char: str) -> bool:
        # Models write line breaks in strings as they are, which is no JSON.
        self._keep(quoted(char)[1:-1] if char < " " else char)
        if self._is_escaped:
            self._is_escaped = False
            return False
        self._is_escaped = char == "\\"
        return char == '"'

    def _value_ends(self) -> None:
        value = self._value
        if value is not None and value is not self._fragments:
            self._take("".join(value))
        self._value = None
        if self._is_arguments:
            self._end()
        else:
            self._go(self._on_comma)

    def _take(self, text: str) -> None:
        """Use a name, or arguments given as a JSON string or null."""
        try:
            value = json.loads(text)
        except ValueError:
            value = 0
        if self._key == "name":
            self.name = value if isinstance(value, str) else None
            if self.name not in self._names:
                self._fail()
            self._look()
            return
        self._has_arguments = True
        if value is None:
            value = "{}"
        if isinstance(value, str) and value.lstrip().startswith("{"):
            self._fragments.append(value)
            self._look()
        else:
            self._fail()

    # -- states ----------------------------------------------------------------------------------

    def _keep(self, char: str) -> None:
        if self._value is not None:
            self._value.append(char)

    def _decoded(self) -> str:
        text, self._value = "".join(self._value or []), None
        try:
            return str(json.loads(text))
        except ValueError:
            return ""

    def _look(self) -> None:
        """Mark the call as known if its name and arguments have been seen."""
        if self.state == "open" and self.name in self._names and self._has_arguments:
            self.is_known = True
            self._raw.clear()

    def _go(self, step: Callable[[str], None]) -> None:
        if self.state == "open":
            self._step = step

    def _end(self) -> None:
        if self.state == "open" and self.name in self._names and not self._has_arguments:
            self._has_arguments = True
            self._fragments.append("{}")
            self._look()
        if self.state == "open":
            self.state = "done" if self.is_known else "failed"

    def _fail(self) -> None:
        self.state = "failed"
