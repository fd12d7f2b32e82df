"""A chat answer's text, as it comes, parted into reasoning, content and tool calls.

Linear scanners with bounded buffers; whatever the model writes, each of its characters is looked at
once or twice, and any chunking gives the same parts.
"""

from __future__ import annotations

from collections.abc import Set

from compiledllm.server.answer_parts import HeldSpace, Parts, hold_back
from compiledllm.server.tool_formats import ToolFormat
from compiledllm.server.tool_scanner import ToolScanner

THINK, END_THINK = "<think>", "</think>"


class AnswerParser:
    """feed(text) for each piece, finish() at the end; both return what is new.

    What an answer that was cut off shows is the beginning of what the whole of it would.

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
        self._calls: ToolScanner | None = None
        if tool_format is not None:
            self._calls = ToolScanner(tool_format, tool_names, most_calls)

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

    def finish(self, is_whole: bool = False) -> Parts:
        """The answer is over: what was held back.

        is_whole: the model ended it. Of one that was cut off, what may have become a marker or a
        call is dropped.
        """
        parts = Parts()
        rest = self._reasoning.finish(parts, is_whole)
        if self._calls is None:
            parts.content += rest
        else:
            self._calls.feed(rest, parts)
            self._calls.finish(parts, is_whole)
        return parts


class _ReasoningScanner:
    """Takes out what stands between <think> and </think> at the beginning, without space around."""

    def __init__(self, mode: str) -> None:
        self._state = {"off": "content", "leading": "start", "begun": "inside"}[mode]
        self._leading: list[str] = []  # white space in front of the first word
        self._pending = ""  # perhaps the beginning of a marker
        self._space = HeldSpace(drops_leading=True)

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
                text, self._pending = hold_back(text, [END_THINK])
                parts.reasoning += self._space.push(text)
                return ""
            parts.reasoning += self._space.push(text[:end])
            self._state, text = "behind", text[end + len(END_THINK) :]
        text = text.lstrip()  # behind it: up to the first word
        if text:
            self._state = "content"
        return text

    def finish(self, parts: Parts, is_whole: bool) -> str:
        """Adds reasoning that was held back; returns what turns out to be content."""
        pending = self._pending if is_whole else ""
        if self._state == "inside":
            parts.reasoning += self._space.push(pending)
        return "".join(self._leading) + pending if self._state == "start" else ""
