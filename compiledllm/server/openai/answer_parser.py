"""Splits the text of a chat answer, piece by piece, into reasoning, content and tool calls.

The scanners are linear and their buffers bounded: each character is read once or twice, and the
result does not depend on how the text is cut into pieces.
"""

from __future__ import annotations

from collections.abc import Set

from compiledllm.server.openai.answer_parts import HeldSpace, Parts, hold_back
from compiledllm.server.openai.tool_formats import ToolFormat
from compiledllm.server.openai.tool_scanner import ToolScanner

THINK, END_THINK = "<think>", "</think>"


class AnswerParser:
    """Call feed(text) for each piece and finish() at the end; both return the new parts.

    The parts of a truncated answer are a prefix of the parts of the complete answer.

    tool_format: None if there are no tools. tool_names: the functions that may be called; a call of
    another name is content. max_calls: calls beyond this number are dropped. reasoning: "off",
    "leading" (the answer may begin with <think>) or "begun" (the prompt ends with <think>).
    """

    def __init__(
        self,
        tool_format: ToolFormat | None,
        tool_names: Set[str] = frozenset(),
        max_calls: int | None = None,
        reasoning: str = "off",
    ) -> None:
        self._reasoning = _ReasoningScanner(reasoning)
        self._calls: ToolScanner | None = None
        if tool_format is not None:
            self._calls = ToolScanner(tool_format, tool_names, max_calls)

    @property
    def num_calls(self) -> int:
        return self._calls.num_calls if self._calls else 0

    @property
    def is_past_parts(self) -> bool:
        """Whether the rest of the answer is content, unchanged."""
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
        """End the answer and return the parts that were held back.

        is_whole: the model ended the answer. In a truncated answer, text that may be the beginning
        of a marker or of a call is dropped.
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
    """Takes out the text between leading <think> and </think>, without surrounding white space."""

    def __init__(self, mode: str) -> None:
        self._state = {"off": "content", "leading": "start", "begun": "inside"}[mode]
        self._leading: list[str] = []  # white space before the first word
        self._pending = ""  # text that may be the beginning of a marker
        self._space = HeldSpace(drops_leading=True)

    @property
    def is_over(self) -> bool:
        return self._state == "content"

    def feed(self, text: str, parts: Parts) -> str:
        """Add reasoning to `parts` and return the text that is not reasoning."""
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
        text = text.lstrip()  # white space between </think> and the first word is dropped
        if text:
            self._state = "content"
        return text

    def finish(self, parts: Parts, is_whole: bool) -> str:
        """Add the reasoning that was held back and return the text that turns out to be content."""
        pending = self._pending if is_whole else ""
        if self._state == "inside":
            parts.reasoning += self._space.push(pending)
        return "".join(self._leading) + pending if self._state == "start" else ""
