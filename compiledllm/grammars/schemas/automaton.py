"""Converts regular expressions with look-ahead to finite automata, and back without look-ahead.

A state is a boolean formula over places in the expression, which says which places must match the
rest of the text and which must not: a look-ahead is an "and", a negative look-ahead a "not".
Reading a character turns the formula into another one. All sizes are bounded; a larger automaton
raises TooComplex.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from compiledllm.grammars.schemas.regex_tree import (
    ANY,
    LAST,
    Chars,
    Choice,
    Edge,
    Look,
    Node,
    Property,
    Ranges,
    Repeat,
    Sequence,
    UnreadablePattern,
    merged,
)
from compiledllm.grammars.schemas.regex_writer import write_ranges

MAX_PLACES = 4_000
MAX_STATES = 200
MAX_LENGTH = 20_000  # characters of a written expression

Formula = bool | tuple[object, ...]


class TooComplex(ValueError):
    """An expression whose automaton exceeds the bounds."""


def _both(formulas: Iterable[Formula]) -> Formula:
    return _joined("and", formulas, True)


def _either(formulas: Iterable[Formula]) -> Formula:
    return _joined("or", formulas, False)


def _joined(kind: str, formulas: Iterable[Formula], unit: bool) -> Formula:
    found: set[Formula] = set()
    for formula in formulas:
        if formula is (not unit):
            return not unit
        if isinstance(formula, tuple) and formula[0] == kind:
            assert isinstance(formula[1], frozenset)
            found |= formula[1]
        elif formula is not unit:
            found.add(formula)
    if any(_negated(formula) in found for formula in found):
        return not unit
    if len(found) < 2:
        return found.pop() if found else unit
    return kind, frozenset(found)


def _negated(formula: Formula) -> Formula:
    if isinstance(formula, bool):
        return not formula
    return formula[1] if formula[0] == "not" else ("not", formula)  # type: ignore[return-value]


@dataclass(frozen=True, slots=True)
class _Place:
    """A place in an expression: what to match, and the places to go on from.

    kind: "chars", a character of `ranges`; "fork", any of the next places; "look", a look-ahead to
    nexts[0] before nexts[1]; "edge", the start or end of the text; "done", the end of the
    expression. flag: whether a look-ahead is negative, or whether an edge is the start.
    """

    kind: str
    nexts: tuple[int, ...]
    ranges: Ranges = ()
    flag: bool = False


@dataclass(slots=True)
class Automaton:
    """A deterministic automaton. States are numbers; 0 is the initial state.

    moves[state]: (characters, next state). accepts[state]: whether a text may end there.
    """

    moves: list[list[tuple[Ranges, int]]] = field(default_factory=list)
    accepts: list[bool] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        """Whether the automaton matches no text."""
        return not any(self.accepts)

    def expression(self) -> str:
        """A regular expression in Rust's syntax that matches the same whole texts."""
        return _Elimination(self).run()


class _Builder:
    """Builds the places of a tree, from the end to the beginning. Place 0 is the end."""

    def __init__(self) -> None:
        self.places = [_Place("done", ())]

    def add(self, place: _Place) -> int:
        if len(self.places) >= MAX_PLACES:
            raise TooComplex(f"it has more than {MAX_PLACES} parts")
        self.places.append(place)
        return len(self.places) - 1

    def search(self, node: Node) -> int:
        """The place from which a match may begin anywhere in the text."""
        entry = self.build(node, 0)
        start = self.add(_Place("fork", ()))
        skip = self.add(_Place("chars", (start,), ANY))
        self.places[start] = _Place("fork", (entry, skip))
        return start

    def build(self, node: Node, following: int) -> int:
        """The place that matches the node and then the place `following`."""
        match node:
            case Chars(ranges):
                return self.add(_Place("chars", (following,), ranges))
            case Sequence(nodes):
                for part in reversed(nodes):
                    following = self.build(part, following)
                return following
            case Choice(nodes):
                return self.add(_Place("fork", tuple(self.build(n, following) for n in nodes)))
            case Repeat(inner, min_count, max_count):
                return self._repeat(inner, min_count, max_count, following)
            case Look(inner, is_negative):
                entry = self.build(inner, 0)
                return self.add(_Place("look", (entry, following), flag=is_negative))
            case Edge(is_start):
                return self.add(_Place("edge", (following,), flag=is_start))
            case Property(text):
                raise UnreadablePattern(f"{text} beside a look-ahead")

    def _repeat(self, inner: Node, min_count: int, max_count: int | None, following: int) -> int:
        if max_count is None:
            loop = self.add(_Place("fork", ()))
            self.places[loop] = _Place("fork", (following, self.build(inner, loop)))
            entry = loop
        else:
            entry = following
            for _ in range(max_count - min_count):
                entry = self.add(_Place("fork", (following, self.build(inner, entry))))
        for _ in range(min_count):
            entry = self.build(inner, entry)
        return entry


class _Reader:
    """Evaluates formulas over the places.

    Formulas: True, False, ("at", place), ("end",), ("not", formula), ("and" or "or", formulas).
    """

    def __init__(self, places: list[_Place]) -> None:
        self._places = places

    def at(self, place: int, is_start: bool, visiting: frozenset[int] = frozenset()) -> Formula:
        """The condition on the rest of the text under which the place matches."""
        found = self._places[place]
        if found.kind == "done":
            return True  # the rest of the text may be anything
        if found.kind == "chars":
            return ("at", place)
        if place in visiting:
            return False  # a loop that reads no character
        visiting |= {place}
        if len(visiting) > 400:
            raise TooComplex("its parts are nested too deep")
        nexts = [self.at(i, is_start, visiting) for i in found.nexts]
        if found.kind == "fork":
            return _either(nexts)
        if found.kind == "look":
            return _both([_negated(nexts[0]) if found.flag else nexts[0], nexts[1]])
        if found.flag:
            return nexts[0] if is_start else False
        return _both([("end",), nexts[0]])

    def after(self, formula: Formula, char: int) -> Formula:
        """The condition on the text after `char` under which the formula holds before it."""
        if isinstance(formula, bool):
            return formula
        kind, *rest = formula
        if kind == "at":
            place = self._places[rest[0]]  # type: ignore[call-overload]
            fits = any(low <= char <= high for low, high in place.ranges)
            return self.at(place.nexts[0], False) if fits else False
        if kind == "end":
            return False
        if kind == "not":
            return _negated(self.after(rest[0], char))  # type: ignore[arg-type]
        join = _both if kind == "and" else _either
        return join(self.after(part, char) for part in rest[0])  # type: ignore[attr-defined]

    def ends(self, formula: Formula) -> bool:
        """Whether the text may end here."""
        if isinstance(formula, bool):
            return formula
        kind, *rest = formula
        if kind in ("at", "end"):
            return kind == "end"
        if kind == "not":
            return not self.ends(rest[0])  # type: ignore[arg-type]
        return (all if kind == "and" else any)(map(self.ends, rest[0]))  # type: ignore[call-overload]


def automaton(finds: Iterable[Node], misses: Iterable[Node] = ()) -> Automaton:
    """The automaton of the texts in which all of `finds` match and none of `misses` does.

    Raises TooComplex, and UnreadablePattern for Unicode classes.
    """
    builder = _Builder()
    places = [(builder.search(node), False) for node in finds]
    places += [(builder.search(node), True) for node in misses]
    reader = _Reader(builder.places)
    parts = [(reader.at(place, True), negate) for place, negate in places]
    start = _both([_negated(part) if negate else part for part, negate in parts])
    return _smallest(_explore(reader, start, _alphabet(builder.places)))


def _alphabet(places: list[_Place]) -> list[tuple[int, Ranges]]:
    """(character, set) for each set of characters that no place tells apart."""
    cuts = {0} | {edge for p in places for low, high in p.ranges for edge in (low, high + 1)}
    starts = sorted(cut for cut in cuts if cut <= LAST)
    sets = sorted({place.ranges for place in places if place.ranges})
    found: dict[tuple[bool, ...], list[tuple[int, int]]] = {}
    for low, following in zip(starts, [*starts[1:], LAST + 1], strict=True):
        key = tuple(any(a <= low <= b for a, b in ranges) for ranges in sets)
        found.setdefault(key, []).append((low, following - 1))
    return [(ranges[0][0], tuple(ranges)) for ranges in found.values()]


def _explore(reader: _Reader, start: Formula, alphabet: list[tuple[int, Ranges]]) -> Automaton:
    """The automaton whose states are the formulas that can be reached from `start`."""
    numbers: dict[Formula, int] = {start: 0}
    found, todo = Automaton(), [start]
    for formula in todo:
        moves: dict[int, list[tuple[int, int]]] = {}
        for char, ranges in alphabet:
            target = reader.after(formula, char)
            if target is False:
                continue
            if target not in numbers:
                numbers[target] = len(numbers)
                todo.append(target)
            if len(numbers) > MAX_STATES:
                raise TooComplex(f"it has more than {MAX_STATES} states")
            moves.setdefault(numbers[target], []).extend(ranges)
        found.moves.append([(merged(ranges), to) for to, ranges in moves.items()])
        found.accepts.append(reader.ends(formula))
    return found


def _smallest(given: Automaton) -> Automaton:
    """The automaton without states that lead to no match, and with equivalent states merged."""
    alive = {i for i, accepts in enumerate(given.accepts) if accepts}
    while more := {
        i
        for i, moves in enumerate(given.moves)
        if i not in alive and any(to in alive for _, to in moves)
    }:
        alive |= more
    group = [int(accepts) if i in alive else -1 for i, accepts in enumerate(given.accepts)]
    while True:
        keys = [(group[i], _grouped(given.moves[i], group)) for i in range(len(group))]
        order = {key: n for n, key in enumerate(dict.fromkeys(keys))}
        refined = [order[key] if i in alive else -1 for i, key in enumerate(keys)]
        if len(set(refined)) == len(set(group)):
            break
        group = refined
    if 0 not in alive:
        return Automaton([[]], [False])
    numbers = {g: n for n, g in enumerate(dict.fromkeys([group[0], *(g for g in group if g >= 0)]))}
    chosen = {g: group.index(g) for g in numbers}
    moves = [
        [(ranges, numbers[to]) for to, ranges in _grouped(given.moves[i], group)]
        for i in chosen.values()
    ]
    return Automaton(moves, [given.accepts[i] for i in chosen.values()])


def _grouped(moves: list[tuple[Ranges, int]], group: list[int]) -> tuple[tuple[int, Ranges], ...]:
    found: dict[int, list[tuple[int, int]]] = {}
    for ranges, to in moves:
        if group[to] >= 0:
            found.setdefault(group[to], []).extend(ranges)
    return tuple(sorted((to, merged(ranges)) for to, ranges in found.items()))


class _Elimination:
    """Turns an automaton into an expression by state elimination.

    States are removed one by one; the paths through a removed state become edges between its
    neighbours. Edges are expressions; "" matches the empty text. State -1 comes before the first
    state, and state -2 after the accepting states.
    """

    def __init__(self, automaton: Automaton) -> None:
        self._edges: dict[int, dict[int, str]] = {-1: {0: ""}}
        for i, moves in enumerate(automaton.moves):
            self._edges[i] = {to: write_ranges(ranges) for ranges, to in moves}
            if automaton.accepts[i]:
                self._edges[i][-2] = ""

    def run(self) -> str:
        while len(self._edges) > 1:
            self._remove(min((i for i in self._edges if i >= 0), key=self._cost))
        return self._edges[-1].get(-2, write_ranges(()))

    def _cost(self, state: int) -> int:
        into = sum(state in edges for i, edges in self._edges.items() if i != state)
        return sum(map(len, self._edges[state].values())) * max(into, 1)

    def _remove(self, state: int) -> None:
        out = self._edges.pop(state)
        loop = out.pop(state, None)
        middle = "" if not loop else f"(?:{loop})*"
        for edges in self._edges.values():
            into = edges.pop(state, None)
            if into is None:
                continue
            for to, tail in out.items():
                path = into + middle + tail
                edges[to] = _or(edges[to], path) if to in edges else path
                if len(edges[to]) > MAX_LENGTH:
                    raise TooComplex(f"written out it is longer than {MAX_LENGTH} characters")


def _or(one: str, other: str) -> str:
    if not one or not other:
        return f"(?:{one or other})?"
    return f"(?:{one}|{other})"
