"""Writes a tree in the syntax of Rust's regex crate.

In that syntax, a bracket or an ampersand inside a class, `\\d` and the dot differ in meaning from
ECMAScript's.
"""

from __future__ import annotations

from compiledllm.grammars.schemas.regex_tree import (
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
)


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
        case Repeat(inner, min_count, max_count):
            return f"(?:{write(inner)}){write_bounds(min_count, max_count)}"
        case Look():
            raise UnreadablePattern("look-around")


def write_bounds(min_count: int, max_count: int | None) -> str:
    if (min_count, max_count) in ((0, None), (1, None), (0, 1)):
        return "*" if max_count is None and not min_count else "+" if max_count is None else "?"
    return f"{{{min_count},{'' if max_count is None else max_count}}}"
