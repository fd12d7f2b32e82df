"""Takes tool calls out of an answer's text, in any of the formats of `tool_formats`.

A marker that no object follows is text and stays unchanged. A marker that an object follows begins
a call; from then on no marker is text, however broken the call is.
"""

from __future__ import annotations

import re
from collections.abc import Set

from compiledllm.server.openai.answer_parts import CallPart, HeldSpace, Parts, hold_back
from compiledllm.server.openai.call_scanner import CallScanner
from compiledllm.server.openai.tool_formats import ToolFormat

_MAX_HEAD = 256  # characters of a function's name between a marker and the arguments
_SEPARATORS = " \t\n\r,;[]"  # between a marker and the object
_NAME = re.compile(r"[\w.-]+")


class ToolScanner:
    """Splits text into content and calls. White space at the end is dropped if there are calls."""

    def __init__(self, tool_format: ToolFormat, names: Set[str], max_calls: int | None) -> None:
        self._format = tool_format
        self._names = names
        self._max_calls = max_calls
        self.num_calls = 0
        self._markers = [marker for marker in (tool_format.open, tool_format.close) if marker]
        self._pattern = re.compile("|".join(map(re.escape, self._markers)))
        self._opening = re.compile(re.escape(tool_format.open))
        self._space = HeldSpace(drops_leading=False)
        self._text = ""  # undecided characters of the last piece, then the present piece
        self._buffer = ""  # the last characters, if their meaning depends on the next piece
        # An opening marker that may begin a call with the text before it, and the characters after
        # the marker. All of them become content if no call follows.
        self._opened: list[str] = []
        self._skipped: list[str] = []
        self._has_begun = False  # whether a call has begun, even an unfinished one
        self._call: CallScanner | None = None
        self._is_announced = False  # whether the name of the present call has been reported
        self._closers = ""  # brackets that the present call's arguments lack where they broke off
        self._step = self._at_beginning if tool_format.is_bare else self._in_content

    def feed(self, text: str, parts: Parts) -> None:
        self._text, self._buffer = self._buffer + text, ""
        position = 0
        while position < len(self._text):
            position = self._step(position, parts)

    def finish(self, parts: Parts, is_whole: bool) -> None:
        """End the text. is_whole: undecided text becomes content; otherwise the text is dropped."""
        undecided = self._buffer if self._step == self._in_content else ""
        if self._step == self._in_head:
            undecided = self._unused(self._buffer)
        elif self._call is not None and not self._call.is_known:
            undecided = self._unused("".join(self._call.raw))
        if is_whole:
            parts.content += self._space.push(undecided)
        elif undecided:
            return
        if self._step == self._at_beginning:
            parts.content += "".join(self._skipped)
        if not (self._has_begun or self._opened):
            parts.content += "".join(self._space.held)

    # -- states: each takes some of the text from `position` on and returns the position behind ----

    def _at_beginning(self, position: int, parts: Parts) -> int:
        """Before the first word: an object here may be a call without a marker."""
        char = self._text[position]
        if char.isspace():
            self._skipped.append(char)
            return position + 1
        if char == "{":
            self._begin(CallScanner(self._names, is_bare=True), parts)
        else:
            self._give_up(parts)
        return position

    def _in_content(self, position: int, parts: Parts) -> int:
        """In content. A closing marker is recognised only after a call has begun."""
        pattern = self._pattern if self._has_begun else self._opening
        found = pattern.search(self._text, position)
        if found is None:
            markers = self._markers if self._has_begun else [self._format.open]
            said, self._buffer = hold_back(self._text[position:], markers)
            parts.content += self._space.push(said)
            return len(self._text)
        parts.content += self._space.push(self._text[position : found.start()])
        if found.group() == self._format.open:
            self._open()
        return found.end()

    def _behind_marker(self, position: int, parts: Parts) -> int:
        """After a marker: a call, another marker or text follows."""
        if (end := self._pass_marker(position, parts)) is not None:
            return end
        char = self._text[position]
        if char == "{":
            self._begin(CallScanner(self._names), parts)
        elif char.isspace() or char in _SEPARATORS:
            self._skipped.append(char)
            return position + 1
        elif not self._skipped:
            self._step = self._in_head
        else:
            self._give_up(parts)
        return position

    def _in_head(self, position: int, parts: Parts) -> int:
        """Right after a marker: a name, optional text in brackets, then the arguments."""
        if (end := self._pass_marker(position, parts)) is not None:
            return end
        char = self._text[position]
        if char == "{":
            name = "".join(self._skipped).partition("[")[0]
            if name in self._names:
                self._skipped = []
                self._begin(CallScanner(self._names, name), parts)
                return position
            if _NAME.fullmatch(name):
                self._has_begun, self._skipped = True, [name]
            self._give_up(parts)
            return position
        self._skipped.append(char)
        if len(self._skipped) > _MAX_HEAD:
            self._give_up(parts)
        return position + 1

    def _in_call(self, position: int, parts: Parts) -> int:
        call, text = self._call, self._text
        assert call is not None
        while position < len(text) and call.state == "open":
            call.feed(text[position])
            position += 1
        self._show(call, parts)
        if call.state == "open":
            return position
        self._call = None
        if not call.is_known:
            said, rest = hold_back("".join(call.raw), self._markers)
            self._give_up(parts, said)
            return self._back(position, rest)
        self._opened, self._skipped, self._closers = [], [], call.missing_brackets
        self._step = self._in_junk if self._closers else self._behind_call
        # A character that breaks the call is scanned again.
        return position if call.state == "done" else position - 1

    def _behind_call(self, position: int, parts: Parts) -> int:
        """After a call: another call, a marker or text follows; surplus brackets are dropped."""
        if (end := self._pass_marker(position, parts)) is not None:
            return end
        char = self._text[position]
        if char == "{":
            self._begin(CallScanner(self._names), parts)
        elif char.isspace() or char in _SEPARATORS or char == "}":
            self._skipped += [char] if char.isspace() else []
            return position + 1
        else:
            self._give_up(parts)
        return position

    def _in_junk(self, position: int, parts: Parts) -> int:
        """Drop text after broken-off arguments, up to a marker; a closing marker completes them."""
        found = self._pattern.search(self._text, position)
        if found is None:
            junk, self._buffer = hold_back(self._text[position:], self._markers)
            self._closers = "" if junk else self._closers
            return len(self._text)
        if found.start() == position and found.group() == self._format.close:
            self._add(CallPart(self.num_calls - 1, None, self._closers), parts)
        self._step = self._behind_call
        return found.start()

    # -- between states --------------------------------------------------------------------------

    def _pass_marker(self, position: int, parts: Parts) -> int | None:
        """The index after a marker at `position`, the text's end if undecided, None without one."""
        may_begin = False
        for marker in self._markers:
            if self._text.startswith(marker, position):
                self._open() if marker == self._format.open else self._close(parts)
                return position + len(marker)
            may_begin |= marker.startswith(self._text[position : position + len(marker)])
        if not may_begin:
            return None
        self._buffer = self._text[position:]
        return len(self._text)

    def _open(self) -> None:
        self._opened += [*self._skipped, self._format.open]
        self._skipped, self._step = [], self._behind_marker

    def _close(self, parts: Parts) -> None:
        """Handle a closing marker; white space between a call and the marker is dropped."""
        if self._step == self._behind_call:
            self._skipped = []
        self._give_up(parts, self._format.close)

    def _begin(self, call: CallScanner, parts: Parts) -> None:
        if self._opened:
            self._has_begun = True
            parts.content += self._space.push(self._unused().strip(_SEPARATORS))
            self._opened, self._skipped = [], []
        self._call, self._is_announced, self._step = call, False, self._in_call

    def _unused(self, more: str = "") -> str:
        """The text held back for a possible call; without its markers if a call has begun."""
        text = "".join(self._opened + self._skipped) + more
        return self._pattern.sub("", text) if self._has_begun else text

    def _give_up(self, parts: Parts, more: str = "") -> None:
        """Turn the text held back for a possible call into content."""
        parts.content += self._space.push(self._unused(more))
        self._opened, self._skipped, self._step = [], [], self._in_content

    def _back(self, position: int, rest: str) -> int:
        """The index from which `rest`, the characters just before `position`, is scanned again."""
        if len(rest) > position:
            self._text, position = rest + self._text[position:], len(rest)
        return position - len(rest)

    def _show(self, call: CallScanner, parts: Parts) -> None:
        """Report the new parts of a call whose name is known."""
        if not call.is_known:
            return
        arguments = call.take_arguments()
        name = None if self._is_announced else call.name
        if not self._is_announced:
            self._is_announced = self._has_begun = True
            self.num_calls += 1
        self._add(CallPart(self.num_calls - 1, name, arguments), parts)

    def _add(self, part: CallPart, parts: Parts) -> None:
        """Add a part, unless the call exceeds `max_calls`."""
        if self._max_calls is None or self.num_calls <= self._max_calls:
            parts.add_call(part)
