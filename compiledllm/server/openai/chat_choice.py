"""One choice of a chat answer in OpenAI's format: whole, or delta by delta."""

from __future__ import annotations

from typing import Any

from compiledllm.server.openai.answer_parser import AnswerParser
from compiledllm.server.openai.answer_parts import CallPart, Parts, Step
from compiledllm.server.openai.reasoning_formats import Reasoning
from compiledllm.server.openai.tools import ToolUse


class Choice:
    """Turns the text of a choice, piece by piece, into the parts of a message.

    use: None without tools.
    """

    def __init__(self, use: ToolUse | None, reasoning: Reasoning) -> None:
        self._use = use
        if use is None:
            self._parser = AnswerParser(None, reasoning=reasoning)
        else:
            self._parser = AnswerParser(use.format, use.names, use.max_calls, reasoning)

    @property
    def has_calls(self) -> bool:
        return self._parser.num_calls > 0

    @property
    def shows_as_is(self) -> bool:
        """Whether the rest of the text is content that `delta` would pass on unchanged."""
        return self._parser.is_past_parts

    def message(self, text: str, is_whole: bool = False) -> dict[str, Any]:
        """The message of a complete text. is_whole: the answer was not truncated."""
        parts = self._parts(text, True, is_whole)
        message: dict[str, Any] = {"role": "assistant", "content": parts.content, "refusal": None}
        if parts.calls:
            message["content"] = parts.content or None
        return message | self._more(parts)

    def delta(self, text: str, is_last: bool, is_whole: bool = False) -> dict[str, Any]:
        """The delta of the next piece. is_whole: the piece ends an answer that is not truncated."""
        return self._delta(self._parts(text, is_last, is_whole))

    def deltas(self, text: str, is_last: bool, is_whole: bool = False) -> list[dict[str, Any]]:
        """As `delta`, but in several deltas if text follows calls or reasoning follows content."""
        return [self._delta(step) for step in self._parts(text, is_last, is_whole).steps]

    def _parts(self, text: str, is_last: bool, is_whole: bool) -> Parts:
        parts = self._parser.feed(text)
        if is_last:
            parts.extend(self._parser.finish(is_whole))
        return parts

    def _delta(self, parts: Parts | Step) -> dict[str, Any]:
        delta = {"content": parts.content} if parts.content else {}
        more = self._more(parts)
        if "tool_calls" in more:
            calls = zip(parts.calls, more["tool_calls"], strict=True)
            more["tool_calls"] = [{"index": part.index} | call for part, call in calls]
        return delta | more

    def _more(self, parts: Parts | Step) -> dict[str, Any]:
        more: dict[str, Any] = {"reasoning": parts.reasoning} if parts.reasoning else {}
        if parts.calls:
            more["tool_calls"] = [self._call(part) for part in parts.calls]
        return more

    def _call(self, part: CallPart) -> dict[str, Any]:
        function: dict[str, Any] = {"arguments": part.arguments}
        if part.name is None:
            return {"function": function}
        assert self._use is not None
        call = {"id": part.call_id or self._use.new_call_id(), "type": "function"}
        return call | {"function": {"name": part.name} | function}
