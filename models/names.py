"""Maps checkpoint names to the model's names and back; `weights.py` explains the patterns."""

from __future__ import annotations

import re

from compiledllm.models.checkpoint import is_derived
from compiledllm.models.reranker import SCORE_HEAD


class NameRules:
    """A family's NAMES and IGNORED, for look-ups in both directions.

    Checkpoints of embedding models hold the model without its head, whose names lack "model.".
    """

    def __init__(self, names: dict[str, str], ignored: tuple[str, ...]) -> None:
        self._names = names | {_without_prefix(source): names[source] for source in names}
        self._patterns = [(_compile(source), target) for source, target in self._names.items()]
        self._ignored = [_compile(source) for source in ignored]

    def ignore(self, source: str) -> None:
        self._ignored.append(_compile(source))

    def rename(self, source: str, target: str) -> None:
        """Map the checkpoint tensor `source` to `target`, overriding NAMES."""
        self._patterns.insert(0, (_compile(source), target))

    def sources_of(self, target: str) -> list[str]:
        """The checkpoint names that NAMES maps to the slot `target`, alone or with other slots."""
        path, _, part = target.partition(":")
        found = []
        for source, pattern in self._names.items():
            name, _, parts = pattern.partition(":")
            match = _compile(name).fullmatch(path)
            if match and part in parts.split(","):
                found.append(_substitute(source, match.groups()))
        return found

    def is_used(self, name: str) -> bool:
        """Whether the model needs the tensor: false for IGNORED names and derived buffers."""
        is_ignored = name == SCORE_HEAD or any(p.fullmatch(name) for p in self._ignored)
        return not is_ignored and not (is_derived(name) and not self.target_of(name))

    def target_of(self, name: str) -> str:
        """The target that NAMES gives a checkpoint tensor; "" if no pattern matches."""
        for pattern, target in self._patterns:
            match = pattern.fullmatch(name)
            if match:
                return _substitute(target, match.groups())
        return ""

    def source_of(self, target: str) -> str:
        """The checkpoint name that would have filled `target`, for error messages."""
        return next(iter(self.sources_of(target)), target)


def slots_of(target: str) -> list[str]:
    """Split a target into its slots: "x:a,b" -> "x:a", "x:b"."""
    name, _, parts = target.partition(":")
    return [f"{name}:{part}" for part in parts.split(",")] if parts else [name]


def _without_prefix(source: str) -> str:
    return source.removeprefix("model.")


def _compile(pattern: str) -> re.Pattern[str]:
    pieces = re.split(r"(\*+)", pattern)
    kinds = {"*": "([^.:]+)", "**": ".+"}
    return re.compile("".join(kinds.get(piece) or re.escape(piece) for piece in pieces))


def _substitute(pattern: str, groups: tuple[str, ...]) -> str:
    pieces = pattern.split("*")
    return "".join(p + g for p, g in zip(pieces, [*groups, ""], strict=True))
