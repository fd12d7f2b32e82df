"""Takes the reasoning at the beginning of an answer out of the text."""

from __future__ import annotations

import re

from compiledllm.server.openai.answer_parts import HeldSpace, Parts, hold_back
from compiledllm.server.openai.reasoning_formats import Reasoning

_STATES = {"off": "content", "channels": "content", "leading": "start", "begun": "start"}


class ReasoningScanner:
    """Takes out the text up to the end marker, without surrounding white space.

    Reasoning that the prompt has begun may begin with the start marker once more. begin_calls: a
    text that only calls begin with, and that therefore ends the reasoning as well; "" for none.
    """

    def __init__(self, reasoning: Reasoning, begin_calls: str = "") -> None:
        self._start, self._end = reasoning.form.start, reasoning.form.end
        self._ends = [self._end, begin_calls] if begin_calls else [self._end]
        self._any_end = re.compile("|".join(map(re.escape, self._ends)))
        self._is_begun = reasoning.mode == "begun"
        self._state = _STATES[reasoning.mode]
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
            if len(word) < len(self._start) and self._start.startswith(word):
                self._pending = word
                return ""
            if not (word.startswith(self._start) or self._is_begun):
                self._state = "content"
                return "".join(self._leading) + word
            self._state, text = "inside", word.removeprefix(self._start)
        if self._state == "inside":
            found = self._any_end.search(text)
            if found is None:
                text, self._pending = hold_back(text, self._ends)
                parts.think(self._space.push(text))
                return ""
            parts.think(self._space.push(text[: found.start()]))
            self._state = "after"
            text = text[found.start() :].removeprefix(self._end)
        text = text.lstrip()  # white space between the marker and the first word is dropped
        if text:
            self._state = "content"
        return text

    def finish(self, parts: Parts, is_whole: bool) -> str:
        """Add the reasoning that was held back and return the text that turns out to be content."""
        pending = self._pending if is_whole else ""
        if self._state == "inside" or self._is_begun:
            parts.think(self._space.push(pending))
            return ""
        return "".join(self._leading) + pending if self._state == "start" else ""
