"""The values an engine chose at start, with reasons; logged, and shown by `compiledllm info`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Choice:
    """A value that was given or chosen automatically, with the reason."""

    value: object
    reason: str

    def __str__(self) -> str:
        return f"{self.value} ({self.reason})"


class Report:
    """What was chosen at start: named choices, in the order in which they were made."""

    def __init__(self, choices: Mapping[str, Choice] | None = None) -> None:
        self._choices = dict(choices or {})

    def note(self, name: str, choice: Choice) -> None:
        """Add a line; a second line of the same name replaces the first."""
        self._choices[name] = choice

    def __getitem__(self, name: str) -> Choice:
        return self._choices[name]

    def get(self, name: str) -> Choice | None:
        return self._choices.get(name)

    def __or__(self, later: Report) -> Report:
        return Report(self._choices | later._choices)

    def lines(self) -> dict[str, str]:
        """Name -> value and reason."""
        return {name: str(choice) for name, choice in self._choices.items()}
