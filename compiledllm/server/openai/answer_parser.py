"""Splits the text of a chat answer, piece by piece, into reasoning, content and tool calls.

The scanners are linear and their buffers bounded: each character is read once or twice, and the
result does not depend on how the text is cut into pieces.
"""

from __future__ import annotations

from compiledllm.server.openai.answer_parts import Parts
from compiledllm.server.openai.call_readers import Names
from compiledllm.server.openai.channel_scanner import ChannelScanner
from compiledllm.server.openai.reasoning_formats import Reasoning
from compiledllm.server.openai.reasoning_scanner import ReasoningScanner
from compiledllm.server.openai.tool_formats import ToolFormat
from compiledllm.server.openai.tool_scanner import ToolScanner


class AnswerParser:
    """Call feed(text) for each piece and finish() at the end; both return the new parts.

    The parts of a truncated answer are a prefix of the parts of the complete answer.

    tool_format: None if there are no tools. names: the functions that may be called, with the
    schemas of their arguments; a call of another function is content. max_calls: further calls are
    dropped.
    """

    def __init__(
        self,
        tool_format: ToolFormat | None,
        names: Names | None = None,
        max_calls: int | None = None,
        reasoning: Reasoning | None = None,
    ) -> None:
        names, reasoning = names or {}, reasoning or Reasoning()
        is_told, has_channels = reasoning.mode != "off", reasoning.mode == "channels"
        ends = tool_format.ends_reasoning if tool_format is not None else ""
        self._reasoning = ReasoningScanner(reasoning, ends)
        self._calls: ToolScanner | ChannelScanner | None = None
        if has_channels or (tool_format is not None and tool_format.syntax == "channels"):
            self._calls = ChannelScanner(names, max_calls, is_told)
        elif tool_format is not None:
            self._calls = ToolScanner(tool_format, names, max_calls)

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
            parts.say(rest)
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
            parts.say(rest)
        else:
            self._calls.feed(rest, parts)
            self._calls.finish(parts, is_whole)
        return parts
