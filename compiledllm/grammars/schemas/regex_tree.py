"""Regular expressions as trees, and sets of characters as ranges of code points."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

Ranges = tuple[tuple[int, int], ...]  # code points, inclusive, sorted, not adjacent
LAST = 0x10FFFF


class UnreadablePattern(ValueError):
    """The pattern has not ECMAScript's syntax, or uses a feature that is not supported.

    The message completes "it has ...".
    """


@dataclass(frozen=True, slots=True)
class Chars:
    """One character of a set."""

    ranges: Ranges


@dataclass(frozen=True, slots=True)
class Property:
    """A Unicode class such as \\p{L}, written as it was read."""

    text: str


@dataclass(frozen=True, slots=True)
class Sequence:
    nodes: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Choice:
    nodes: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Repeat:
    """Between `min_count` and `max_count` repetitions. max_count: None for any number."""

    node: Node
    min_count: int
    max_count: int | None


@dataclass(frozen=True, slots=True)
class Look:
    """A look-ahead."""

    node: Node
    is_negative: bool


@dataclass(frozen=True, slots=True)
class Edge:
    """^ or $."""

    is_start: bool


Node = Chars | Property | Sequence | Choice | Repeat | Look | Edge


def merged(ranges: Iterable[tuple[int, int]]) -> Ranges:
    found: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if found and low <= found[-1][1] + 1:
            found[-1] = found[-1][0], max(high, found[-1][1])
        else:
            found.append((low, high))
    return tuple(found)


def inverted(ranges: Ranges) -> Ranges:
    found, start = [], 0
    for low, high in ranges:
        if low > start:
            found.append((start, low - 1))
        start = high + 1
    return (*found, (start, LAST)) if start <= LAST else tuple(found)


def chars(text: str) -> Ranges:
    return merged((ord(c), ord(c)) for c in text)


DIGIT: Ranges = ((0x30, 0x39),)
WORD = merged([*DIGIT, (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)])
SPACE = merged(
    [(9, 13), (0x20, 0x20), (0xA0, 0xA0), (0x1680, 0x1680), (0x2000, 0x200A), (0x2028, 0x2029)]
    + [(0x202F, 0x202F), (0x205F, 0x205F), (0x3000, 0x3000), (0xFEFF, 0xFEFF)]
)
ANY: Ranges = ((0, LAST),)
DOT = inverted(chars("\n\r\u2028\u2029"))


def has_look(node: Node) -> bool:
    match node:
        case Look():
            return True
        case Sequence(nodes) | Choice(nodes):
            return any(map(has_look, nodes))
        case Repeat(inner, _, _):
            return has_look(inner)
        case _:
            return False


def edges_are_outside(node: Node, is_first: bool = True, is_last: bool = True) -> bool:
    """Whether every ^ is at the very beginning and every $ at the very end."""
    match node:
        case Edge(is_start):
            return is_first if is_start else is_last
        case Choice(nodes):
            return all(edges_are_outside(n, is_first, is_last) for n in nodes)
        case Sequence(nodes):
            end = len(nodes) - 1
            return all(
                edges_are_outside(n, is_first and i == 0, is_last and i == end)
                for i, n in enumerate(nodes)
            )
        case Repeat(inner, _, _):
            return edges_are_outside(inner, False, False)
        case _:
            return True
