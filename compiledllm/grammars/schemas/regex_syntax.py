"""Parses ECMAScript's regular expressions (ECMA-262) into a tree.

`parse(pattern) -> Node`; `write(node) -> str` writes the syntax of Rust's regex crate, where a
bracket or an ampersand inside a class, `\\d` and the dot mean something else. Raises
UnreadablePattern.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

Ranges = tuple[tuple[int, int], ...]  # code points, inclusive, sorted, not adjacent
LAST = 0x10FFFF
MAX_REPEATS = 10_000


class UnreadablePattern(ValueError):
    """The pattern is not ECMAScript's syntax, or uses a feature that is not supported."""


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
    """Between `least` and `most` repetitions. most: None for any number."""

    node: Node
    least: int
    most: int | None


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
    found, place = [], 0
    for low, high in ranges:
        if low > place:
            found.append((place, low - 1))
        place = high + 1
    return (*found, (place, LAST)) if place <= LAST else tuple(found)


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
_CLASSES = {"d": DIGIT, "w": WORD, "s": SPACE}
_CLASSES |= {name.upper(): inverted(ranges) for name, ranges in _CLASSES.items()}
_CONTROLS = {"n": "\n", "r": "\r", "t": "\t", "f": "\f", "v": "\v", "0": "\0"}


def parse(pattern: str) -> Node:
    """The tree of a pattern. Look-behind, back references and \\b are refused."""
    parser = _Parser(pattern)
    node = parser.choice()
    if not parser.is_over:
        raise UnreadablePattern("a ) without its (")
    return node


class _Parser:
    def __init__(self, text: str) -> None:
        self._text = text
        self._place = 0
        self._depth = 0

    @property
    def is_over(self) -> bool:
        return self._place >= len(self._text)

    def _peek(self) -> str:
        return self._text[self._place : self._place + 1]

    def _next(self) -> str:
        if self.is_over:
            raise UnreadablePattern("it ends too early")
        self._place += 1
        return self._text[self._place - 1]

    def _take(self, text: str) -> bool:
        found = self._text.startswith(text, self._place)
        self._place += len(text) if found else 0
        return found

    def _until(self, end: str) -> str:
        stop = self._text.find(end, self._place)
        if stop < 0:
            raise UnreadablePattern(f"no {end} behind {self._text[self._place : self._place + 9]}")
        found, self._place = self._text[self._place : stop], stop + len(end)
        return found

    def choice(self) -> Node:
        self._depth += 1
        if self._depth > 100:
            raise UnreadablePattern("groups are nested more than 100 deep")
        options = [self._sequence()]
        while self._take("|"):
            options.append(self._sequence())
        self._depth -= 1
        return options[0] if len(options) == 1 else Choice(tuple(options))

    def _sequence(self) -> Node:
        nodes: list[Node] = []
        while not self.is_over and self._peek() not in "|)":
            nodes.append(self._repeated(self._atom()))
        return nodes[0] if len(nodes) == 1 else Sequence(tuple(nodes))

    def _repeated(self, node: Node) -> Node:
        while (bounds := self._bounds()) is not None:
            node = Repeat(node, *bounds)
            if not self._take("?"):  # laziness does not change which texts match
                break
        return node

    def _bounds(self) -> tuple[int, int | None] | None:
        for sign, bounds in (("*", (0, None)), ("+", (1, None)), ("?", (0, 1))):
            if self._take(sign):
                return bounds
        end = self._text.find("}", self._place)
        low, comma, high = self._text[self._place + 1 : max(end, self._place)].partition(",")
        if self._peek() != "{" or not low.isdecimal() or (high and not high.isdecimal()):
            return None  # the brace is a literal character
        self._place = end + 1
        least = int(low[:9])
        most = None if comma and not high else int(high[:9] or least)
        if max(least, most or 0) > MAX_REPEATS or (most is not None and most < least):
            raise UnreadablePattern(f"a repetition of {{{low}{comma}{high}}}")
        return least, most

    def _atom(self) -> Node:
        char = self._next()
        if char == "(":
            return self._group()
        if char == "[":
            return self._class()
        if char == "\\":
            return self._escape()
        if char == ".":
            return Chars(DOT)
        if char in "^$":
            return Edge(char == "^")
        if char in "*+?":
            raise UnreadablePattern(f"nothing to repeat in front of {char}")
        return Chars(chars(char))

    def _group(self) -> Node:
        look = self._take("?=") or (None if not self._take("?!") else False)
        if look is None:
            if self._take("?<") or self._take("?P<"):
                if self._peek() in "=!":
                    raise UnreadablePattern("look-behind")
                self._until(">")
            elif self._take("?") and not self._take(":"):
                raise UnreadablePattern(f"(?{self._peek()}")
        node = self.choice()
        if not self._take(")"):
            raise UnreadablePattern("a ( without its )")
        return node if look is None else Look(node, not look)

    def _escape(self) -> Node:
        char = self._next()
        if char in _CLASSES:
            return Chars(_CLASSES[char])
        if char in "pP":
            return Property(f"\\{char}{self._property()}")
        if char in "bB":
            raise UnreadablePattern(f"\\{char}, a word boundary")
        if char in "123456789k":
            raise UnreadablePattern(f"\\{char}, a back reference")
        return Chars(chars(self._escaped(char)))

    def _property(self) -> str:
        return "{" + self._until("}") + "}" if self._take("{") else self._next()

    def _escaped(self, char: str) -> str:
        """The character that an escape stands for."""
        if char in _CONTROLS:
            return _CONTROLS[char]
        if char == "c":
            return chr(ord(self._next()) % 32)
        if char in "xu":
            digits = self._until("}") if self._take("{") else None
            if digits is None:
                size = 2 if char == "x" else 4
                digits, self._place = self._text[self._place :][:size], self._place + size
            try:
                return chr(int(digits, 16))
            except (ValueError, OverflowError):
                raise UnreadablePattern(f"\\{char}{digits}") from None
        if char.isalnum() and char not in "aezAZG":
            return char
        if char.isalnum():
            raise UnreadablePattern(f"\\{char}")
        return char

    def _class(self) -> Node:
        is_inverted = self._take("^")
        ranges: list[tuple[int, int]] = []
        others: list[Node] = []
        while not self._take("]"):
            low = self._member()
            if isinstance(low, Property):
                others.append(low)
            elif len(low) != 1 or low[0][0] != low[0][1] or not self._is_range():
                ranges += low
            else:
                self._place += 1
                high = self._member()
                if isinstance(high, Property) or high[0][0] < low[0][0]:
                    raise UnreadablePattern("a range in a class that runs backwards")
                ranges.append((low[0][0], high[0][0]))
        found = merged(ranges)
        if not others:
            return Chars(inverted(found) if is_inverted else found)
        if is_inverted:
            raise UnreadablePattern("[^\\p{..}]")
        return Choice((Chars(found), *others))

    def _is_range(self) -> bool:
        return self._peek() == "-" and self._text[self._place + 1 : self._place + 2] not in (
            "]",
            "",
        )

    def _member(self) -> Ranges | Property:
        char = self._next()
        if char != "\\":
            return chars(char)
        char = self._next()
        if char == "b":
            return chars("\b")
        if char in _CLASSES:
            return _CLASSES[char]
        if char in "pP":
            return Property(f"\\{char}{self._property()}")
        return chars(self._escaped(char))


def write_ranges(ranges: Ranges) -> str:
    if not ranges:
        return r"[^\x{0}-\x{10FFFF}]"
    (low, high), *more = ranges
    if low == high and not more and chr(low).isalnum() and low < 128:
        return chr(low)
    parts = (f"\\x{{{a:X}}}" + (f"-\\x{{{b:X}}}" if b > a else "") for a, b in ranges)
    return f"[{''.join(parts)}]"


def write(node: Node) -> str:
    """Write a tree in the syntax of Rust's regex crate. Look-around is an UnreadablePattern."""
    match node:
        case Chars(ranges):
            return write_ranges(ranges)
        case Property(text):
            return text
        case Edge(is_start):
            return "^" if is_start else "$"
        case Sequence(nodes):
            return "".join(map(write, nodes)) or "(?:)"
        case Choice(nodes):
            return f"(?:{'|'.join(map(write, nodes))})"
        case Repeat(inner, least, most):
            return f"(?:{write(inner)}){write_bounds(least, most)}"
        case Look():
            raise UnreadablePattern("look-around")


def write_bounds(least: int, most: int | None) -> str:
    if (least, most) in ((0, None), (1, None), (0, 1)):
        return "*" if most is None and not least else "+" if most is None else "?"
    return f"{{{least},{'' if most is None else most}}}"


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
