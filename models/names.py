"""Maps checkpoint names to the model's names and back; `weights.py` explains the patterns."""

from __future__ import annotations

import re
from types import ModuleType

from compiledllm.models.checkpoint import is_derived
from compiledllm.models.reranker import SCORE_HEAD
from compiledllm.models.spec import ModelSpec


class NameRules:
    """A family's NAMES and IGNORED, for look-ups in both directions.

    Names also match without the prefix "model.", as in checkpoints of embedding models, which hold
    the model without its head. Look-ups are cached without the numbers of layers and experts, since
    a model with experts has tens of thousands of names.
    """

    @classmethod
    def of(cls, family: ModuleType, spec: ModelSpec) -> NameRules:
        """The rules of a family's module for a model."""
        names = family.names(spec) if hasattr(family, "names") else family.NAMES
        return cls(names, getattr(family, "IGNORED", ()))

    def __init__(self, names: dict[str, str], ignored: tuple[str, ...]) -> None:
        names = names | {_without_prefix(source): names[source] for source in names}
        self._patterns = [(_compile(source), target) for source, target in names.items()]
        self._sources = [
            (_compile(name), parts.split(","), source)
            for source, target in names.items()
            for name, _, parts in [target.partition(":")]
        ]
        self._ignored = [_compile(source) for source in ignored]
        self._targets_found: dict[str, str] = {}
        self._sources_found: dict[str, list[str]] = {}

    def ignore(self, source: str) -> None:
        """Treat the checkpoint tensor `source` as one of IGNORED."""
        self._ignored.append(_compile(source))

    def rename(self, source: str, target: str) -> None:
        """Map the checkpoint tensor `source` to `target`, overriding NAMES."""
        self._patterns.insert(0, (_compile(source), target))
        self._targets_found.clear()

    def sources_of(self, target: str) -> list[str]:
        """The checkpoint names that NAMES maps to the slot `target`, alone or with other slots."""
        key, numbers = _without_numbers(target)
        if key not in self._sources_found:
            self._sources_found[key] = self._find_sources(key)
        return [_with_numbers(source, numbers) for source in self._sources_found[key]]

    def _find_sources(self, target: str) -> list[str]:
        path, _, part = target.partition(":")
        return [
            _substitute(source, match.groups())
            for name, parts, source in self._sources
            if part in parts and (match := name.fullmatch(path))
        ]

    def is_used(self, name: str) -> bool:
        """Whether the model needs the tensor: false for IGNORED names and derived buffers."""
        is_ignored = name == SCORE_HEAD or any(p.fullmatch(name) for p in self._ignored)
        return not is_ignored and not (is_derived(name) and not self.target_of(name))

    def target_of(self, name: str) -> str:
        """The target that NAMES gives a checkpoint tensor; "" if no pattern matches."""
        key, numbers = _without_numbers(name)
        if key not in self._targets_found:
            found = ((p.fullmatch(key), target) for p, target in self._patterns)
            targets = (_substitute(target, m.groups()) for m, target in found if m)
            self._targets_found[key] = next(targets, "")
        return _with_numbers(self._targets_found[key], numbers)

    def source_of(self, target: str) -> str:
        """The checkpoint name that would have filled `target`, for error messages."""
        return next(iter(self.sources_of(target)), target)


def slots_of(target: str) -> list[str]:
    """Split a target into its slots: "x:a,b" -> "x:a", "x:b"."""
    name, _, parts = target.partition(":")
    return [f"{name}:{part}" for part in parts.split(",")] if parts else [name]


def _without_numbers(name: str) -> tuple[str, list[str]]:
    """The name with a placeholder for each segment that is a number, and these numbers."""
    segments = name.split(".")
    numbers: list[str] = []
    for index, segment in enumerate(segments):
        if segment.isdecimal():
            segments[index] = f"<{len(numbers)}>"
            numbers.append(segment)
    return ".".join(segments), numbers


def _with_numbers(name: str, numbers: list[str]) -> str:
    for index, number in enumerate(numbers):
        name = name.replace(f"<{index}>", number)
    return name


def _without_prefix(source: str) -> str:
    return source.removeprefix("model.")


def _compile(pattern: str) -> re.Pattern[str]:
    pieces = re.split(r"(\*+)", pattern)
    kinds = {"*": "([^.:]+)", "**": ".+"}
    return re.compile("".join(kinds.get(piece) or re.escape(piece) for piece in pieces))


def _substitute(pattern: str, groups: tuple[str, ...]) -> str:
    pieces = pattern.split("*")
    return "".join(p + g for p, g in zip(pieces, [*groups, ""], strict=True))
