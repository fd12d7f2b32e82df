"""A chat answer's text, as it comes, parted into reasoning, content and tool calls.

Linear scanners with bounded buffers; whatever the model writes, each of its characters is looked at
once or twice, and any chunking gives the same parts.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, field

from compiledllm.server.call_scanner import CallScanner
from compiledllm.server.tool_formats import ToolFormat

THINK, END_THINK = "<think>", "</think>"
_MAX_HEAD = 256  # characters of a function's name in front of its arguments


@dataclass(slots=True)
class CallPart:
    """More of a tool call: its name with the first part, and a piece of the arguments' text."""

    index: int
    name: str | None = None
    arguments: str = ""


@dataclass(slots=True)
class Parts:
    """What has come of an answer."""

    reasoning: str = ""
    content: str = ""
    calls: list[CallPart] = field(default_factory=list)

    def add_call(self, part: CallPart) -> None:
        """Merges it with an earlier part of the same call."""
        if self.calls and self.calls[-1].index == part.index:
            self.calls[-1].arguments += part.arguments
        else:
            self.calls.append(part)


class AnswerParser:
    """feed(text) for each piece, finish() at the end; both return what is new.

    tool_format: None if there are no tools; tool_names: of the functions that can be called; what
    calls others is content. most_calls: more are dropped. reasoning: "off", "leading" (an answer
    may begin with it) or "begun" (the prompt has opened it).
    """

    def __init__(
        self,
        tool_format: ToolFormat | None,
        tool_names: Set[str] = frozenset(),
        most_calls: int | None = None,
        reasoning: str = "off",
    ) -> None:
        self._reasoning = _ReasoningScanner(reasoning)
        self._calls: _ToolScanner | None = None
        if tool_format is not None:
            self._calls = _ToolScanner(tool_format, tool_names, most_calls)

    @property
    def num_calls(self) -> int:
        return self._calls.num_calls if self._calls else 0

    @property
    def is_past_parts(self) -> bool:
        """Whether everything else is content, to the letter."""
        return self._calls is None and self._reasoning.is_over

    def feed(self, text: str) -> Parts:
        parts = Parts()
        rest = self._reasoning.feed(text, parts)
        if self._calls is None:
            parts.content += rest
        else:
            self._calls.feed(rest, parts)
        return parts

    def finish(self) -> Parts:
        """The answer is over: what was held back."""
        parts = Parts()
        rest = self._reasoning.finish(parts)
        if self._calls is None:
            parts.content += rest
        else:
            self._calls.feed(rest, parts)
            self._calls.finish(parts)
        return parts


class _Space:
    """Holds back white space until text follows; drops it at the beginning, if told to."""

    def __init__(self, drops_leading: bool) -> None:
        self.drops_leading = drops_leading
        self.held: list[str] = []

    def push(self, text: str) -> str:
        if self.drops_leading:
            text = text.lstrip()
            if not text:
                return ""
            self.drops_leading = False
        kept = text.rstrip()
        if not kept:
            self.held.append(text)
            return ""
        whole = "".join(self.held) + kept
        self.held = [text[len(kept) :]]
        return whole


class _ReasoningScanner:
    """Takes out what stands between <think> and </think> at the beginning, without space around."""

    def __init__(self, mode: str) -> None:
        self._state = {"off": "content", "leading": "start", "begun": "inside"}[mode]
        self._leading: list[str] = []  # white space in front of the first word
        self._pending = ""  # perhaps the beginning of a marker
        self._space = _Space(drops_leading=True)

    @property
    def is_over(self) -> bool:
        return self._state == "content"

    def feed(self, text: str, parts: Parts) -> str:
        """Adds reasoning to the parts; returns the rest."""
        if self._state == "content":
            return text
        text = self._pending + text
        self._pending = ""
        if self._state == "start":
            word = text.lstrip()
            self._leading.append(text[: len(text) - len(word)])
            if len(word) < len(THINK) and THINK.startswith(word):
                self._pending = word
                return ""
            if not word.startswith(THINK):
                self._state = "content"
                return "".join(self._leading) + word
            self._state, text = "inside", word[len(THINK) :]
        if self._state == "inside":
            end = text.find(END_THINK)
            if end < 0:
                text, self._pending = _hold_back(text, END_THINK)
                parts.reasoning += self._space.push(text)
                return ""
            parts.reasoning += self._space.push(text[:end])
            self._state, text = "behind", text[end + len(END_THINK) :]
        text = text.lstrip()  # behind it: up to the first word
        if text:
            self._state = "content"
        return text

    def finish(self, parts: Parts) -> str:
        """Adds reasoning that was held back; returns what turns out to be content."""
        if self._state == "inside":
            parts.reasoning += self._space.push(self._pending)
        return "".join(self._leading) + self._pending if self._state == "start" else ""


class _ToolScanner:
    """Takes calls out of a text. What begins like one and is none stays text, to the letter.

    White space at the end of a text with calls is dropped.
    """

    def __init__(self, form: ToolFormat, names: Set[str], most_calls: int | None) -> None:
        self._form = form
        self._names = names
        self._most_calls = most_calls
        self.num_calls = 0
        self._space = _Space(drops_leading=False)
        self._buffer = ""  # what came last, if more is needed to decide about it
        self._skipped: list[str] = []  # a marker and so on: text after all, should no call follow
        self._has_call = False  # since the last marker
        self._call: CallScanner | None = None
        self._is_announced = False  # the present call
        self._step = self._at_beginning if form.is_bare else self._in_content

    def feed(self, text: str, parts: Parts) -> None:
        text, self._buffer = self._buffer + text, ""
        place = 0
        while place < len(text):
            place = self._step(text, place, parts)

    def finish(self, parts: Parts) -> None:
        """Whatever is not known to be a call is text."""
        if self._call is None:
            separators = not self._buffer and self._has_call and self._step == self._between
            self._give_up(parts, "" if separators else "".join(self._skipped) + self._buffer)
        elif not self._call.is_known:
            self._give_up(parts, "".join(self._skipped + self._call.raw))
        if not self.num_calls:
            parts.content += "".join(self._space.held)

    # -- states: each takes some of the text from `place` on, and returns the place behind it -----

    def _at_beginning(self, text: str, place: int, parts: Parts) -> int:
        """In front of the first word; an object there may be a call without a marker."""
        if text[place].isspace():
            self._skipped.append(text[place])
            return place + 1
        if text[place] == "{":
            self._begin(CallScanner(self._names))
        else:
            self._give_up(parts, "".join(self._skipped))
        return place

    def _in_content(self, text: str, place: int, parts: Parts) -> int:
        start = text.find(self._form.open, place)
        if start < 0:
            said, self._buffer = _hold_back(text[place:], self._form.open)
            parts.content += self._space.push(said)
            return len(text)
        parts.content += self._space.push(text[place:start])
        self._open()
        return start + len(self._form.open)

    def _between(self, text: str, place: int, parts: Parts) -> int:
        """Behind a marker or a call: a call, another marker, or text."""
        marker = self._marker_at(text, place)
        if marker is None:
            self._buffer = text[place:]
            return len(text)
        char = text[place]
        if marker:
            self._pass(marker, parts)
            return place + len(marker)
        if char == "{":
            self._begin(CallScanner(self._names))
        elif char.isspace() or char in ",;[]":
            self._skipped.append(char)
            return place + 1
        elif not self._has_call and self._skipped == [self._form.open]:
            self._step = self._in_head
        else:
            self._give_up(parts, "".join(self._skipped))
        return place

    def _in_head(self, text: str, place: int, parts: Parts) -> int:
        """Directly behind a marker: a name, perhaps something in brackets, then the arguments."""
        head = self._skipped[1:]
        if text[place] == "{" and (name := "".join(head).partition("[")[0]) in self._names:
            self._begin(CallScanner(self._names, name))
            return place
        self._skipped.append(text[place])
        if text[place] == "{" or len(head) >= _MAX_HEAD:
            self._give_up(parts, "".join(self._skipped))
        return place + 1

    def _in_call(self, text: str, place: int, parts: Parts) -> int:
        call = self._call
        assert call is not None
        while place < len(text) and call.state == "open":
            call.feed(text[place])
            place += 1
        self._show(call, parts)
        if call.state == "open":
            return place
        self._call = None
        if not call.is_known:
            self._give_up(parts, "".join(self._skipped + call.raw))
            return place
        self._skipped, self._has_call, self._step = [], True, self._between
        return place if call.state == "done" else place - 1  # where it broke off, text may go on

    # -- between states --------------------------------------------------------------------------

    def _marker_at(self, text: str, place: int) -> str | None:
        """The marker there, "" if there is none, None if more has to come to tell."""
        may_begin = False
        for marker in filter(None, (self._form.open, self._form.close)):
            if text.startswith(marker, place):
                return marker
            rest = text[place : place + len(marker)]
            may_begin |= marker.startswith(rest)
        return None if may_begin else ""

    def _pass(self, marker: str, parts: Parts) -> None:
        """A marker behind another one, or behind a call."""
        unused = "" if self._has_call else "".join(self._skipped)
        if marker == self._form.open:
            parts.content += self._space.push(unused)
            self._open()
        else:
            self._give_up(parts, unused and unused + marker)

    def _open(self) -> None:
        self._skipped, self._has_call, self._step = [self._form.open], False, self._between

    def _begin(self, call: CallScanner) -> None:
        self._call, self._is_announced, self._step = call, False, self._in_call

    def _give_up(self, parts: Parts, text: str) -> None:
        """It is no call but this text."""
        self._skipped, self._step = [], self._in_content
        parts.content += self._space.push(text)

    def _show(self, call: CallScanner, parts: Parts) -> None:
        """What is known of a call, unless it is one too many."""
        if not call.is_known:
            return
        arguments = call.take_arguments()
        if not self._is_announced:
            self._is_announced = True
            self.num_calls += 1
            name = call.name
        else:
            name = None
        if self._most_calls is None or self.num_calls <= self._most_calls:
            parts.add_call(CallPart(self.num_calls - 1, name, arguments))


def _hold_back(text: str, marker: str) -> tuple[str, str]:
    """The text in two; the second part may be the beginning of the marker."""
    for length in range(min(len(text), len(marker) - 1), 0, -1):
        if marker.startswith(text[-length:]):
            return text[:-length], text[-length:]
    return text, ""
