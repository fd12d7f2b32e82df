"""Takes tool calls out of an answer's text, in the formats of `tool_formats` that have markers.

A marker that no call follows is text and stays unchanged. A marker that a call or an object follows
begins a call; from then on no marker is text, however broken the call is.
"""

from __future__ import annotations

from compiledllm.server.openai.answer_parts import CallPart, HeldSpace, Parts, hold_back
from compiledllm.server.openai.call_readers import CallReader, Names, reader_of
from compiledllm.server.openai.call_scanner import CallScanner
from compiledllm.server.openai.format_markers import any_of, markers_of
from compiledllm.server.openai.tool_formats import ToolFormat

_MAX_HEAD = 256  # characters of a function's name between a marker and the arguments


class ToolScanner:
    """Splits text into content and calls. White space at the end is dropped if there are calls."""

    def __init__(self, tool_format: ToolFormat, names: Names, max_calls: int | None) -> None:
        self._format = tool_format
        self._names = names
        self._max_calls = max_calls
        self.num_calls = 0
        markers = self._markers = markers_of(tool_format)
        self._all = [*markers.openers, *markers.closers, *markers.inner]
        self._pattern = any_of(self._all)
        self._opening = any_of(markers.openers)
        self._space = HeldSpace(drops_leading=False)
        self._text = ""  # undecided characters of the last piece, then the present piece
        self._buffer = ""  # the last characters, if their meaning depends on the next piece
        # An opening marker that may begin a call with the text before it, and the characters after
        # the marker. All of them become content if no call follows.
        self._opened: list[str] = []
        self._skipped: list[str] = []
        self._has_begun = False  # whether a call has begun, even an unfinished one
        self._call: CallReader | None = None
        self._call_id: str | None = None  # of the present call, as the model writes it
        self._is_announced = False  # whether the name of the present call has been reported
        self._closers = ""  # brackets that the present call's arguments lack where they broke off
        self._step = self._at_beginning if tool_format.bare else self._in_content

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
            undecided = self._unused(self._call.raw())
        elif self._call is not None and is_whole:
            self._call.finish()
            self._show(self._call, parts)
        if is_whole:
            parts.say(self._space.push(undecided))
        elif undecided:
            return
        if self._step == self._at_beginning:
            parts.say("".join(self._skipped))
        if not (self._has_begun or self._opened):
            parts.say("".join(self._space.held))

    # -- states: each reads some of the text from `position` on and returns the position after it --

    def _at_beginning(self, position: int, parts: Parts) -> int:
        """Before the first word, where the character `bare` may begin a call without a marker."""
        char = self._text[position]
        if char.isspace():
            self._skipped.append(char)
            return position + 1
        if char != self._format.bare:
            self._give_up(parts)
        elif char == "{":
            self._begin(CallScanner(self._names, is_bare=True), parts)
        else:
            self._step = self._in_head
            self._skipped.append(char)
            position += 1
        return position

    def _in_content(self, position: int, parts: Parts) -> int:
        """In content. A closing marker is recognised only after a call has begun."""
        pattern = self._pattern if self._has_begun else self._opening
        found = pattern.search(self._text, position)
        if found is None:
            markers = self._all if self._has_begun else self._markers.openers
            said, self._buffer = hold_back(self._text[position:], markers)
            parts.say(self._space.push(said))
            return len(self._text)
        parts.say(self._space.push(self._text[position : found.start()]))
        if found.group() in self._markers.openers:
            self._open(found.group())
        return found.end()

    def _behind_marker(self, position: int, parts: Parts) -> int:
        """After a marker: a call, another marker or text follows."""
        if (end := self._pass_marker(position, parts)) is not None:
            return end
        char = self._text[position]
        if char == "{":
            self._begin(CallScanner(self._names), parts)
        elif char.isspace() or char in self._markers.separators:
            self._skipped.append(char)
            return position + 1
        else:
            self._step = self._in_head
        return position

    def _in_head(self, position: int, parts: Parts) -> int:
        """After a marker: the function's name and more, then the arguments."""
        if (end := self._pass_marker(position, parts)) is not None:
            return end
        char = self._text[position]
        if char in self._markers.head_ends:
            self._end_head(parts)
            return position
        self._skipped.append(char)
        if len(self._skipped) > _MAX_HEAD:
            self._give_up(parts)
        return position + 1

    def _end_head(self, parts: Parts) -> None:
        """The arguments follow: of a call, if the head names a function."""
        if (name := self._named()) in self._names:
            assert name is not None
            self._begin(reader_of(self._format, self._names, name), parts)
            return
        if name and self._opened:  # a call of an unknown function: its markers are not content
            self._has_begun, self._skipped = True, [name]
        self._give_up(parts)

    def _named(self) -> str | None:
        """The function's name in the head that has been read; None if that is no head."""
        found = self._markers.head.fullmatch("".join(self._skipped))
        self._call_id = found["id"] if found and self._format.has_ids else None
        return found["name"] if found else None

    def _in_call(self, position: int, parts: Parts) -> int:
        call = self._call
        assert call is not None
        position = call.feed(self._text, position)
        self._show(call, parts)
        if call.state == "open":
            return position
        self._call = None
        if not call.is_known:
            raw = call.raw()
            rest = call.unread() or hold_back(raw, self._all)[1]
            self._give_up(parts, raw.removesuffix(rest))
            return self._back(position, rest)
        self._opened, self._skipped, self._closers = [], [], call.missing_brackets
        self._step = self._in_junk if self._closers else self._behind_call
        return self._back(position, call.unread())

    def _behind_call(self, position: int, parts: Parts) -> int:
        """After a call: another call, a marker or text follows; surplus brackets are dropped."""
        if (end := self._pass_marker(position, parts)) is not None:
            return end
        char, is_python = self._text[position], self._format.syntax == "python"
        if char == "{" and not is_python:
            self._begin(CallScanner(self._names), parts)
        elif char.isspace() or char in self._markers.separators + self._markers.junk:
            self._skipped += [char] if char.isspace() else []
            return position + 1
        elif is_python and char == "]":
            self._give_up(parts)  # the end of the list of calls
            return position + 1
        elif is_python:
            self._step = self._in_head
        else:
            self._give_up(parts)
        return position

    def _in_junk(self, position: int, parts: Parts) -> int:
        """Drop text after broken-off arguments, up to a marker; a closing marker completes them."""
        found = self._pattern.search(self._text, position)
        if found is None:
            junk, self._buffer = hold_back(self._text[position:], self._all)
            self._closers = "" if junk else self._closers
            return len(self._text)
        if found.start() == position and found.group() in self._markers.closers:
            self._add(CallPart(self.num_calls - 1, None, self._closers), parts)
        self._step = self._behind_call
        return found.start()

    # -- between states --------------------------------------------------------------------------

    def _pass_marker(self, position: int, parts: Parts) -> int | None:
        """The index after a marker at `position`, the text's end if undecided, None without one."""
        may_begin = False
        for marker in (*self._markers.openers, *self._markers.closers):
            if self._text.startswith(marker, position):
                is_opener = marker in self._markers.openers
                self._open(marker) if is_opener else self._close(marker, parts)
                return position + len(marker)
            may_begin |= marker.startswith(self._text[position : position + len(marker)])
        if not may_begin:
            return None
        self._buffer = self._text[position:]
        return len(self._text)

    def _open(self, marker: str) -> None:
        self._opened += [*self._skipped, marker]
        self._skipped, self._call_id, self._step = [], None, self._behind_marker

    def _close(self, marker: str, parts: Parts) -> None:
        """Handle a closing marker; white space between a call and the marker is dropped."""
        if self._step == self._behind_call:
            self._skipped = []
        elif self._step == self._in_head and self._begin_empty(parts):
            return
        self._give_up(parts, marker)

    def _begin_empty(self, parts: Parts) -> bool:
        """Begin a call without arguments if only a name stands between the markers.

        Returns whether that is so.
        """
        name = self._named() if self._format.syntax in ("json", "tags") else None
        if name not in self._names:
            return False
        call = CallScanner(self._names, name)
        call.feed("{}", 0)
        self._begin(call, parts)
        self._show(call, parts)
        self._call, self._step = None, self._behind_call
        return True

    def _begin(self, call: CallReader, parts: Parts) -> None:
        self._call, self._is_announced, self._step = call, False, self._in_call
        if not call.is_tentative:
            self._claim(parts)

    def _claim(self, parts: Parts) -> None:
        """Accept the held text as part of a call: only text outside of its markers is content."""
        self._skipped = []
        if self._opened:
            self._has_begun = True
            parts.say(self._space.push(self._unused().strip(self._markers.separators)))
            self._opened = []

    def _unused(self, more: str = "") -> str:
        """The text held back for a possible call; without its markers if a call has begun."""
        text = "".join(self._opened + self._skipped) + more
        return self._pattern.sub("", text) if self._has_begun else text

    def _give_up(self, parts: Parts, more: str = "") -> None:
        """Turn the text held back for a possible call into content."""
        parts.say(self._space.push(self._unused(more)))
        self._opened, self._skipped, self._step = [], [], self._in_content

    def _back(self, position: int, rest: str) -> int:
        """The index from which `rest`, the characters just before `position`, is scanned again."""
        if len(rest) > position:
            self._text, position = rest + self._text[position:], len(rest)
        return position - len(rest)

    def _show(self, call: CallReader, parts: Parts) -> None:
        """Report the new parts of a call whose name is known."""
        if not call.is_known:
            return
        arguments = call.take_arguments()
        name = None if self._is_announced else call.name
        if not self._is_announced:
            self._claim(parts)
            self._is_announced = self._has_begun = True
            self.num_calls += 1
        call_id = self._call_id if name else None
        self._add(CallPart(self.num_calls - 1, name, arguments, call_id), parts)

    def _add(self, part: CallPart, parts: Parts) -> None:
        """Add a part, unless the call exceeds `max_calls`."""
        if self._max_calls is None or self.num_calls <= self._max_calls:
            parts.add_call(part)
