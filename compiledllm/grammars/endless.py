"""Finds rules of a Lark grammar that match no finite text because every alternative recurses."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

_TOKEN = re.compile(
    r"""(?P<text>"(?:\\.|[^"\\\n])*"i?|/(?:\\.|[^/\\\n])+/[a-z]*|<[^>\n]*>|@[\w-]+)"""
    r"""|(?P<skip>\#[^\n]*|//[^\n]*|[ \t\r]+)|(?P<line>\n)|(?P<json>%\w+\s*(?=\{))"""
    r"""|(?P<count>~\s*\d+(?:\s*\.\.\s*\d+)?|\{\s*\d*\s*,?\s*\d*\s*\})|(?P<name>[\w-]+)|(?P<sign>.)"""
)
Node = str | tuple["Node", ...] | list["Node"]  # a name; a sequence (tuple); alternatives (list)


class _Unread(Exception):
    """Lark syntax that this module does not read; llguidance may accept it."""


def endless_rule(lark: str) -> str | None:
    """The name of a rule that matches no finite text; None if none was found."""
    try:
        rules = dict(_rules(lark))
    except (_Unread, RecursionError, ValueError):
        return None
    alive: set[str] = set()
    left, before = list(rules), -1
    while len(alive) > before:
        before = len(alive)
        for name in left:
            if _has_end(rules[name], alive, rules):
                alive.add(name)
        left = [name for name in reversed(left) if name not in alive]  # references run both ways
    return next((name for name in rules if name not in alive), None)


def _has_end(node: Node, alive: set[str], rules: dict[str, Node]) -> bool:
    if isinstance(node, str):
        return node in alive or node not in rules
    return (all if isinstance(node, tuple) else any)(_has_end(n, alive, rules) for n in node)


def _rules(lark: str) -> Iterator[tuple[str, Node]]:
    """The names and bodies of rules. A definition starts on a new line and ends before the next."""
    lines: list[list[str]] = [[]]
    for token in _tokens(lark):
        if token == "\n":
            lines.append([])
        else:
            lines[-1].append(token)
    body: list[str] = []
    for line in reversed([line for line in lines if line]):
        body = line + body
        if line[0] == "%":
            body = []
        elif ":" in line and re.fullmatch(r"[a-zA-Z_][\w-]*", line[0]):
            colon = line.index(":")
            if colon > 1 and line[1] not in ("[", "."):
                raise _Unread
            yield line[0], _Body(body[colon + 1 :]).whole()
            body = []


def _tokens(lark: str) -> Iterator[str]:
    position = 0
    while match := _TOKEN.match(lark, position):
        position = match.end()
        kind = match.lastgroup
        if kind == "json":
            _, position = json.JSONDecoder().raw_decode(lark, position)
        if kind != "skip":
            yield '""' if kind in ("text", "json") else match[0]


class _Body:
    """Parses the body of a rule: the tokens after the colon. Texts and optional parts become ()."""

    def __init__(self, tokens: list[str]) -> None:
        self._tokens = tokens[::-1]

    def whole(self) -> Node:
        node = self._choice()
        if self._tokens:
            raise _Unread
        return node

    def _choice(self) -> Node:
        options = [self._sequence()]
        while self._tokens and self._tokens[-1] == "|":
            self._tokens.pop()
            options.append(self._sequence())
        return options

    def _sequence(self) -> Node:
        nodes: list[Node] = []
        while self._tokens and self._tokens[-1] not in ("|", ")", "]"):
            node = self._atom()
            while self._tokens and self._is_suffix(self._tokens[-1]):
                suffix = self._tokens.pop()
                if suffix in ("?", "*") or re.match(r"[~{]\s*(?:0|,)", suffix):
                    node = ()
            nodes.append(node)
        return tuple(nodes)

    @staticmethod
    def _is_suffix(token: str) -> bool:
        return token in ("?", "*", "+") or token[0] == "~" or (token[0] == "{" and len(token) > 1)

    def _atom(self) -> Node:
        token = self._tokens.pop()
        if token in ("(", "["):
            node = self._choice()
            if not self._tokens or self._tokens.pop() != (")" if token == "(" else "]"):
                raise _Unread
            return node if token == "(" else ()
        if token == '""':
            return ()
        if re.fullmatch(r"[\w-]+", token):
            return token
        raise _Unread
