"""The parts of an answer, and helpers that the scanners of its text share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(slots=True)
class CallPart:
    """A piece of a tool call: part of the arguments' text; the first piece also has the name.

    call_id: with the name, if the model has written one.
    """

    index: int
    name: str | None = None
    arguments: str = ""
    call_id: str | None = None


@dataclass(slots=True)
class Step:
    """Reasoning, content and calls, in this order. The rest of an open call is `calls[0]`."""

    reasoning: str = ""
    content: str = ""
    calls: list[CallPart] = field(default_factory=list)


class Parts:
    """The parts that a piece of an answer's text adds to the answer.

    steps: in the order of the text. A part that would break the order within a step begins a new
    step.
    """

    __slots__ = ("steps",)

    def __init__(self) -> None:
        self.steps: list[Step] = []

    @property
    def reasoning(self) -> str:
        return "".join([step.reasoning for step in self.steps])

    @property
    def content(self) -> str:
        return "".join([step.content for step in self.steps])

    @property
    def calls(self) -> list[CallPart]:
        return [part for step in self.steps for part in step.calls]

    def think(self, text: str) -> None:
        if text:
            step = self._last()
            (self._next() if step.content or step.calls else step).reasoning += text

    def say(self, text: str) -> None:
        if text:
            step = self._last()
            (self._next() if step.calls else step).content += text

    def add_call(self, part: CallPart) -> None:
        """Append a piece of a call, merging consecutive pieces of the same call."""
        step = self._last()
        if step.calls and step.calls[-1].index == part.index:
            step.calls[-1].arguments += part.arguments
        elif part.name is None and (step.reasoning or step.content or step.calls):
            self._next().calls.append(part)
        else:
            step.calls.append(part)

    def extend(self, more: Parts) -> None:
        for step in more.steps:
            self.think(step.reasoning)
            self.say(step.content)
            for part in step.calls:
                self.add_call(part)

    def _last(self) -> Step:
        return self.steps[-1] if self.steps else self._next()

    def _next(self) -> Step:
        self.steps.append(Step())
        return self.steps[-1]


class HeldSpace:
    """Holds back white space until text follows, and drops leading white space if told to."""

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


def hold_back(text: str, markers: Iterable[str]) -> tuple[str, str]:
    """Split the text in two; the second part is the longest suffix that may begin a marker."""
    longest = 0
    for marker in markers:
        for length in range(min(len(text), len(marker) - 1), longest, -1):
            if text.endswith(marker[:length]):
                longest = length
                break
    return text[: len(text) - longest], text[len(text) - longest :]
