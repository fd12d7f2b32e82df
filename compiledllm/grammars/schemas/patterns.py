"""Rewrites a schema's patterns for llguidance, and answers questions about several patterns.

A pattern has ECMAScript's syntax and may match anywhere in the text, unless it has ^ and $.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from compiledllm.grammars.schemas.automaton import TooComplex, automaton
from compiledllm.grammars.schemas.regex_syntax import parse
from compiledllm.grammars.schemas.regex_tree import (
    Edge,
    Look,
    Node,
    Sequence,
    UnreadablePattern,
    edges_are_outside,
    has_look,
)
from compiledllm.grammars.schemas.regex_writer import write

START = Edge(True)


def conjuncts(pattern: str) -> list[str]:
    """Patterns without look-around that together match exactly what the pattern matches.

    Raises ValueError naming the part that cannot be enforced.
    """
    try:
        tree = parse(pattern)
        return [_written(part) for part in _parts(tree)]
    except UnreadablePattern as error:
        if "(?i" in str(error) or pattern.startswith("(?i)"):
            return [pattern]  # Rust's syntax has this flag
        raise ValueError(f"it has {error}, which cannot be enforced") from None
    except (TooComplex, RecursionError) as error:
        raise ValueError(f"its look-around cannot be resolved: {error}") from None


def single(pattern: str) -> str:
    """One pattern without look-around that matches the same texts. Raises ValueError."""
    found = conjuncts(pattern)
    if len(found) == 1:
        return found[0]
    try:
        return f"^(?:{automaton([parse(pattern)]).expression()})$"
    except TooComplex as error:
        raise ValueError(f"its look-around cannot be resolved: {error}") from None


def _parts(tree: Node) -> list[Node]:
    """Make patterns of their own of the look-aheads at the very beginning."""
    nodes = tree.nodes if isinstance(tree, Sequence) else (tree,)
    if not nodes or nodes[0] != START:
        return [tree]
    count = next((i for i, n in enumerate(nodes[1:], 1) if not isinstance(n, Look)), len(nodes))
    looks = [node for node in nodes[1:count] if isinstance(node, Look)]
    parts: list[Node] = [
        Sequence((START, look)) if look.is_negative else Sequence((START, look.node))
        for look in looks
    ]
    return [*parts, Sequence((START, *nodes[count:]))]


def _written(tree: Node) -> str:
    if not has_look(tree) and edges_are_outside(tree):
        return write(tree)
    return f"^(?:{automaton([tree]).expression()})$"


def literal(text: str) -> str:
    """The pattern that matches one text only."""
    return f"^{re.escape(text)}$"


def can_match(finds: Iterable[str], misses: Iterable[str] = ()) -> bool:
    """Whether some text matches all of `finds` and none of `misses`; True if undecided."""
    try:
        return not automaton(map(parse, finds), map(parse, misses)).is_empty
    except (UnreadablePattern, TooComplex, RecursionError):
        return True


def matches(pattern: str, text: str) -> bool | None:
    """Whether the pattern matches in the text; None if undecided."""
    found = can_match([pattern, literal(text)])
    return found and (None if can_match([literal(text)], [pattern]) else True)


def both(finds: Iterable[str], misses: Iterable[str] = ()) -> str:
    """A pattern of the texts that match all of `finds` and none of `misses`."""
    looks = [f"(?=[^]*(?:{pattern}))" for pattern in finds]
    return "^" + "".join([*looks, *(f"(?![^]*(?:{pattern}))" for pattern in misses)])
