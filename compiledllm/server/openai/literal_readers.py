"""Read the arguments of a tool call that are written as literals, in Python's syntax or Gemma's."""

from __future__ import annotations

import re

from compiledllm.server.openai.answer_parts import hold_back
from compiledllm.server.openai.argument_values import as_json, quoted
from compiledllm.server.openai.call_scanner import MAX_BUFFERED, MAX_NESTING
from compiledllm.server.openai.held_reader import HeldReader

_MAX_WORD = 1024  # characters of a key, and of a value without quotes, in `_GEMMA_TOKEN`
_CLOSED_BY = {"(": ")", "[": "]", "{": "}"}


_PYTHON_KEY = re.compile(r"[^\s\"']+(?: [^\s\"']+)*")


class PythonReader(HeldReader):
    """Keyword arguments of a Python call, whose values are literals; each is shown when it ends."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._key: str | None = None
        self._text: list[str] = []  # of the present key or value
        self._brackets: list[str] = []  # closing brackets that the call still needs
        self._quote = ""
        self._is_escaped = False
        self._separator = ""

    def _step(self, text: str, position: int) -> int:
        char = text[position]
        if not self.is_known:
            self._raw.append(char)
            if len(self._raw) > MAX_BUFFERED:
                self.state = "failed"
        if self._quote:
            self._in_string(char)
        elif not self._brackets:
            self._brackets.append(")")
        elif char in _CLOSED_BY:
            self._open(char)
        elif char in ")]}":
            self._close(char)
        elif len(self._brackets) == 1 and char == ",":
            self._end_argument()
        elif char == "=" and self._key is None:
            self._end_key()
        else:
            self._quote = char if char in "\"'" else ""
            self._text.append(char)
        return position + 1

    def _in_string(self, char: str) -> None:
        self._text.append(char)
        if self._is_escaped:
            self._is_escaped = False
        elif char == "\\":
            self._is_escaped = True
        elif char == self._quote:
            self._quote = ""

    def _open(self, char: str) -> None:
        self._brackets.append(_CLOSED_BY[char])
        self._text.append(char)
        if len(self._brackets) > MAX_NESTING:
            self._break_off()

    def _close(self, char: str) -> None:
        if char != self._brackets.pop():
            self._break_off()
        elif self._brackets:
            self._text.append(char)
        else:
            self._end_argument()
            if self.state == "open" and not self.is_known:
                self._begin()
            if self.state == "open":
                self._end()

    def _end_key(self) -> None:
        self._key, self._text = "".join(self._text).strip(), []
        # Schemas have names like `user-id`, with which models write no valid Python.
        if not _PYTHON_KEY.fullmatch(self._key) or len(self._brackets) > 1:
            self._break_off()
        elif not self.is_known:
            self._begin()

    def _end_argument(self) -> None:
        text, self._text = "".join(self._text).strip(), []
        if self._key is not None:
            value = as_json(text) or quoted(text)
            self._fragments.append(f"{self._separator}{quoted(self._key)}: {value}")
            self._key, self._separator = None, ", "
        elif text:
            self._break_off()

    def _break_off(self) -> None:
        """End the call here if it is known; otherwise the text is no call."""
        if self.is_known:
            self._end()
        else:
            self.state = "failed"

    def finish(self) -> None:
        if self.is_known and self.state == "open":
            self._end()


GEMMA_QUOTE = '<|"|>'
GEMMA_WORD = re.compile(r"[^{}\[\]:,<\"\s][^{}\[\]:,<\"]{0,1023}")
_GEMMA_TOKEN = re.compile(rf"\s+|[{{}}\[\]:,]|{GEMMA_WORD.pattern}")


class GemmaReader(HeldReader):
    """JSON whose keys have no quotes, and whose strings stand between markers, without escapes."""

    is_tentative = False

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._brackets: list[str] = []  # closing brackets that the object still needs
        self._quote = ""  # what ends the present string
        self._is_escaped = False
        self._awaits = ""  # what follows next: "key", ":", "value", or "" after a value
        self._separator = ""

    def _step(self, text: str, position: int) -> int:
        if self._quote:
            return self._in_string(text, position)
        if not self._brackets:
            self.is_known = True
            self._open("{")
            return position + 1
        char = text[position]
        if char == '"' or text.startswith(GEMMA_QUOTE, position):
            self._quote = '"' if char == '"' else GEMMA_QUOTE
            self._item('"')
            return position + len(self._quote)
        if char == "<":
            if GEMMA_QUOTE.startswith(text[position : position + len(GEMMA_QUOTE)]):
                self._held = text[position:]
                return len(text)
            self.finish()  # a marker, which can only follow the call
            return position
        found = _GEMMA_TOKEN.match(text, position)
        assert found is not None
        token = found.group()
        is_word = token[0] not in "{}[]:," and not token.isspace()
        if is_word and found.end() == len(text) and len(token) < _MAX_WORD:
            self._held = token
        elif is_word:
            self._word(token.strip())
        elif not token.isspace():
            self._sign(token)
        return found.end()

    def _in_string(self, text: str, position: int) -> int:
        if self._quote == '"':
            found = _JSON_STRING.match(text, position)
            assert found is not None
            token, end = found.group(), found.end()
            if token == "\\" and end + _LONGEST_ESCAPE > len(text):
                self._held = text[position:]
                return len(text)
            is_end, is_escape = token == '"', len(token) > 1 and token[0] == "\\"
            self._fragments.append(token if is_end or is_escape else quoted(token)[1:-1])
        else:
            end = text.find(self._quote, position)
            is_end = end >= 0
            piece, self._held = (
                (text[position:end], "") if is_end else hold_back(text[position:], [self._quote])
            )
            self._fragments.append(quoted(piece)[1:-1] + ('"' if is_end else ""))
            end = end + len(self._quote) if is_end else len(text)
        self._quote = "" if is_end else self._quote
        return end

    def _item(self, text: str) -> None:
        """A key or a value, or the quote with which one begins."""
        is_key = self._brackets[-1] == "}" and self._awaits in ("key", "")
        self._fragments.append(self._lead(is_key) + text)
        self._awaits = ":" if is_key else ""

    def _lead(self, is_key: bool) -> str:
        """The JSON between the last token and a key or value, missing signs included."""
        lead = {"": ", ", ":": ": ", "key": self._separator, "value": self._separator}[self._awaits]
        self._separator = ""
        no_key = self._brackets[-1] == "}" and self._awaits in ("key", "") and not is_key
        return lead + '"": ' if no_key else lead

    def _word(self, word: str) -> None:
        is_key = self._brackets[-1] == "}" and self._awaits in ("key", "")
        self._item(quoted(word) if is_key else as_json(word) or quoted(word))

    def _sign(self, sign: str) -> None:
        if sign in _CLOSED_BY:
            self._open(sign)
        elif sign in "]}":
            if sign == self._brackets[-1]:
                self._close()
            else:
                self.finish()
        elif sign == ":":
            if self._awaits == ":":
                self._fragments.append(": ")
                self._awaits = "value"
        else:
            self._fill()
            self._separator = ", "
            self._awaits = "key" if self._brackets[-1] == "}" else "value"

    def _open(self, bracket: str) -> None:
        if len(self._brackets) == MAX_NESTING:
            self.finish()
            return
        self._fragments.append((self._lead(False) if self._brackets else "") + bracket)
        self._brackets.append(_CLOSED_BY[bracket])
        self._awaits, self._separator = "key" if bracket == "{" else "value", ""

    def _fill(self) -> None:
        """Give a key that has no value the value null."""
        if self._brackets[-1] == "}" and self._awaits in (":", "value"):
            self._fragments.append(": null" if self._awaits == ":" else "null")

    def _close(self) -> None:
        self._fill()
        self._fragments.append(self._brackets.pop())
        self._awaits, self._separator = "", ""
        if not self._brackets:
            self.state = "done"

    def finish(self) -> None:
        """Close what is open."""
        if self.state != "open" or not self._brackets:
            return
        if self._quote:
            self._fragments.append('"')
        elif self._held and self._held[0] != "<":
            self._word(self._held.strip())
        self._held = self._quote = ""
        while self._brackets:
            self._close()


# In a JSON string: its end, text, an escape, or a backslash that is text.
_JSON_STRING = re.compile(r'"|[^"\\]+|\\["\\/bfnrt]|\\u[0-9a-fA-F]{4}|\\')
_LONGEST_ESCAPE = len("u0000")
