"""What an answer is made of, and what the scanners of its text have in common."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field


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


class HeldSpace:
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


def hold_back(text: str, markers: Iterable[str]) -> tuple[str, str]:
    """The text in two; the second part is the longest end that may begin a marker."""
    longest = 0
    for marker in markers:
        for length in range(min(len(text), len(marker) - 1), longest, -1):
            if text.endswith(marker[:length]):
                longest = length
                break
    return text[: len(text) - longest], text[len(text) - longest :]
