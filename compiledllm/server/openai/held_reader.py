"""The base class of readers of a call's arguments in other syntaxes than JSON."""

from __future__ import annotations

from typing import Literal

State = Literal["open", "done", "failed"]


class HeldReader:
    """Keeps undecided text between pieces; see `CallReader` for the interface.

    A subclass implements `_step(text, position)`, which reads some text and returns the position
    after it. Text that cannot be decided yet goes into `_held`.
    """

    is_tentative = True
    missing_brackets = ""

    def __init__(self, name: str) -> None:
        self.name: str | None = name
        self.state: State = "open"
        self.is_known = False
        self._fragments: list[str] = []
        self._raw: list[str] = []  # what has been read before the call is known
        self._held = ""
        self._unread = ""

    def feed(self, text: str, position: int) -> int:
        start, shift = position, 0
        if self._held:
            text, shift = self._held + text[position:], position - len(self._held)
            position = 0
        self._held = ""
        while position < len(text) and self.state == "open":
            position = self._step(text, position)
        # Text of earlier pieces that is not of this call is scanned again by the caller.
        self._unread = text[position : start - shift]
        return max(position + shift, start)

    def _step(self, text: str, position: int) -> int:
        raise NotImplementedError

    def raw(self) -> str:
        return "".join(self._raw) + self._held

    def unread(self) -> str:
        return self._unread

    def take_arguments(self) -> str:
        text = "".join(self._fragments)
        self._fragments.clear()
        return text

    def _begin(self) -> None:
        """Mark the call as known, and begin the arguments."""
        self.is_known = True
        self._raw.clear()
        self._fragments.append("{")

    def _end(self) -> None:
        self._fragments.append("}")
        self.state = "done"
