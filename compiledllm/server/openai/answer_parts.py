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
class Parts:
    """The parts that a piece of an answer's text adds to the answer."""

    reasoning: str = ""
    content: str = ""
    calls: list[CallPart] = field(default_factory=list)

    def add_call(self, part: CallPart) -> None:
        """Append a piece of a call, merging consecutive pieces of the same call."""
        if self.calls and self.calls[-1].index == part.index:
            self.calls[-1].arguments += part.arguments
        else:
            self.calls.append(part)


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
