"""Rules without an end are found, and no others."""

from __future__ import annotations

import pytest

from compiledllm.grammars.endless import endless_rule


@pytest.mark.parametrize(
    "lark",
    [
        'start: "a" start',
        'start: "a" | x\nx: "b" y\ny: ("c" | "d") x',
        'start: "a"\nx: x',
        'start: x+\nx: [y] "a" x\ny: "b"',
        'start: x{1,3}\nx: "a" (x | x "b")',
        'start: "a"\n     | x  // one more\nx: "x"\n   x',
        'start: %json {"type": "string", "x": "}"} start',
    ],
)
def test_rules_without_an_end_are_named(lark: str) -> None:
    assert endless_rule(lark) in ("start", "x", "y")


@pytest.mark.parametrize(
    "lark",
    [
        'start: "a" start | "b"',
        'start: "a" start?',
        'start: "a" (start ",")*\n',
        'start: x\nx: "(" x ")" | /[0-9]+/\n%ignore /\\s+/',
        'start: x~0..2\nx: "a" x{0,3}',
        'start: a | B\na: "(" start ")"\nB: /x|: /',
        'start[temperature=0.5]: x\nx[lazy]: /a|b/ "| :"',
        'start: %json {"a": "start"} | "x" start\n# start: start',
        "start: unknown",
        "start: ((",
        "",
        'start: x::5\nx::n: "a" x::n',
        'start: <[5]> <eos> @other "x"i',
        "%llguidance {}\nstart: TAG_TEXT\nTAG_TEXT: /(.|\\n)*/",
    ],
)
def test_rules_with_an_end_and_unknown_syntax_are_left_alone(lark: str) -> None:
    assert endless_rule(lark) is None
