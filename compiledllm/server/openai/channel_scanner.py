"""Takes gpt-oss's answers apart: messages in channels, each with a header, text and an end.

    <|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...<|return|>

The prompt ends inside a header, after `<|start|>assistant`. A recipient in the header, such as
`to=functions.get_weather`, makes the message a tool call.
"""

from __future__ import annotations

import re

from compiledllm.server.openai.answer_parts import CallPart, HeldSpace, Parts, hold_back
from compiledllm.server.openai.call_readers import Names
from compiledllm.server.openai.call_scanner import CallScanner

_MESSAGE = "<|message|>"
_ENDS = ("<|end|>", "<|call|>", "<|return|>", "<|start|>", "<|channel|>")
_END = re.compile("|".join(map(re.escape, _ENDS)))
_HEADER_STARTS = ("<|channel|>", "<|start|>", "to=")
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_RECIPIENT = re.compile(r"to=(?:functions\.)?([^\s<]+)")
_MAX_HEADER = 512  # characters


class ChannelScanner:
    """Splits an answer in channels into reasoning, content and calls.

    shows_reasoning: whether reasoning is separated; otherwise it is content.
    """

    def __init__(self, names: Names, max_calls: int | None, shows_reasoning: bool) -> None:
        self._names = names
        self._max_calls = max_calls
        self._shows_reasoning = shows_reasoning
        self.num_calls = 0
        self._held = ""
        self._step = self._at_beginning
        self._reasoning = HeldSpace(drops_leading=True)
        self._has_content = False
        self._separator = ""  # before the first text of a further message
        self._call: CallScanner | None = None
        self._is_announced = False

    def feed(self, text: str, parts: Parts) -> None:
        text, self._held = self._held + text, ""
        position = 0
        while position < len(text):
            position = self._step(text, position, parts)

    def finish(self, parts: Parts, is_whole: bool) -> None:
        """End the text. is_whole: undecided text counts; otherwise the text is dropped."""
        held, self._held = self._held, ""
        if not is_whole:
            return
        is_text = self._step == self._in_header and "<|" not in held and held != "assistant"
        if is_text or self._step in (self._at_beginning, self._in_content):
            self._say(held, parts)
        elif self._step == self._in_reasoning:
            parts.think(self._reasoning.push(held))
        elif self._step == self._behind_call and self._call is not None:
            self._add(None, self._call.missing_brackets, parts)

    # -- states: each reads some of the text from `position` on and returns the position after it --

    def _at_beginning(self, text: str, position: int, parts: Parts) -> int:
        """The rest of a header, or the text of an answer without channels."""
        start = text[position : position + _MAX_HEADER].lstrip()
        if start.startswith(_HEADER_STARTS):
            self._step = self._in_header
        elif len(text) < _MAX_HEADER and any(mark.startswith(start) for mark in _HEADER_STARTS):
            self._held = text[position:]
            return len(text)
        else:
            self._step = self._in_content
        return position

    def _in_header(self, text: str, position: int, parts: Parts) -> int:
        last = position + _MAX_HEADER
        end = text.find(_MESSAGE, position, last)
        if end < 0 and len(text) < last:
            self._held = text[position:]
            return len(text)
        if end < 0:  # no header after all
            self._step = self._in_content
            marker = _END.match(text, position)
            return marker.end() if marker else position
        self._enter(text[position:end])
        return end + len(_MESSAGE)

    def _enter(self, header: str) -> None:
        """Begin the message of a header."""
        channels, recipients = _CHANNEL.findall(header), _RECIPIENT.findall(header)
        if recipients and recipients[-1] in self._names:
            self._call, self._is_announced = CallScanner(self._names, recipients[-1]), False
            self._step = self._before_call
        elif channels[-1:] == ["analysis"] and self._shows_reasoning:
            self._reasoning.held = [] if self._reasoning.drops_leading else ["\n"]
            self._step = self._in_reasoning
        else:
            self._separator = "\n" if self._has_content else ""
            self._step = self._in_content

    def _in_reasoning(self, text: str, position: int, parts: Parts) -> int:
        said, position = self._up_to_end(text, position)
        parts.think(self._reasoning.push(said))
        return position

    def _in_content(self, text: str, position: int, parts: Parts) -> int:
        said, position = self._up_to_end(text, position)
        self._say(said, parts)
        return position

    def _before_call(self, text: str, position: int, parts: Parts) -> int:
        """Before the arguments, an object; a message without any is a call without arguments."""
        call = self._call
        assert call is not None
        if text[position].isspace():
            return position + 1
        if text[position] == "{":
            self._step = self._in_call
            return position
        if any(end.startswith(text[position : position + len(end)]) for end in _ENDS):
            said, position = self._up_to_end(text, position)
            if not self._held:
                call.feed("{}", 0)
                self._show(call, parts)
            return position
        self._step = self._in_content
        return position

    def _in_call(self, text: str, position: int, parts: Parts) -> int:
        call = self._call
        assert call is not None
        position = call.feed(text, position)
        self._show(call, parts)
        if call.state != "open":
            self._step = self._behind_call
        return position

    def _behind_call(self, text: str, position: int, parts: Parts) -> int:
        """After the arguments: the end of the message makes broken-off arguments whole."""
        call = self._call
        assert call is not None
        _, position = self._up_to_end(text, position)
        if self._step != self._behind_call:
            self._add(None, call.missing_brackets, parts)
        return position

    # -- between states --------------------------------------------------------------------------

    def _up_to_end(self, text: str, position: int) -> tuple[str, int]:
        """The text up to the message's end, and the position after the end.

        Without an end: the text that cannot be part of one, and the end of the text.
        """
        found = _END.search(text, position)
        if found is None:
            said, self._held = hold_back(text[position:], _ENDS)
            return said, len(text)
        self._step = self._in_header
        is_header = found.group() == "<|channel|>"
        return text[position : found.start()], found.start() if is_header else found.end()

    def _say(self, text: str, parts: Parts) -> None:
        if text:
            parts.say(self._separator + text)
            self._separator, self._has_content = "", True

    def _show(self, call: CallScanner, parts: Parts) -> None:
        """Report the new parts of the present call."""
        arguments = call.take_arguments()
        name = None if self._is_announced else call.name
        self.num_calls += not self._is_announced
        self._is_announced = True
        self._add(name, arguments, parts)

    def _add(self, name: str | None, arguments: str, parts: Parts) -> None:
        """Add a part of the present call, unless the call exceeds `max_calls`."""
        is_counted = self._max_calls is None or self.num_calls <= self._max_calls
        if is_counted and (name or arguments):
            parts.add_call(CallPart(self.num_calls - 1, name, arguments))
