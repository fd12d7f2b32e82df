"""Patterns of schemas, taken apart and put together again, match what Python's `re` finds."""

from __future__ import annotations

import random
import re

import pytest

from compiledllm.grammars.schemas.patterns import (
    both,
    can_match,
    conjuncts,
    literal,
    matches,
    single,
)

PATTERNS = [
    r"^(?!\.)(?!.*\.\.)([a-c'+\-\.]*)[a-c+-]@([a-c][a-c\-]*\.)+[a-c]{2,}$",
    r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$",
    r"^(?!^[-+.]*$)[+-]?0*(?:\d{0,3}|(?=[\d.]{1,6}0*$)\d{0,3}\.\d{0,2}0*)$",
    r"^(?=.*[a-c])(?=.*\d).{2,4}$",
    r"^(?:(?!ab).)*$",
    r"(?!a)b|c(?=\.)",
    r"a(?=b)b$|^$",
    r"^a|b$",
    r"(^a|b)c",
    r"[\[&]{1,2}|\]",
    r"\x61{2}\u0062|\-\.",
    r"^\w+\.(?:[^a]|\d)??$",
    r"(?:)$^",
]


def in_python(pattern: str) -> re.Pattern[str]:
    """What we write for Rust, as Python reads it."""
    return re.compile(
        re.sub(r"\\x\{([0-9A-F]+)\}", lambda found: f"\\U{int(found[1], 16):08x}", pattern)
    )


@pytest.mark.parametrize("pattern", PATTERNS)
def test_rewritten_patterns_match_the_same(pattern: str) -> None:
    draw = random.Random(1)
    parts = [in_python(part) for part in conjuncts(pattern)]
    whole = in_python(single(pattern))
    found = set()
    texts = ["".join(draw.choices("abc.@-+019[]&{,}", k=i % 8)) for i in range(3000)]
    for text in [*texts, "a.b@c.ab", "a..b@c.ab"]:
        expected = re.search(pattern, text, re.ASCII) is not None
        assert all(part.search(text) for part in parts) == expected, text
        assert (whole.search(text) is not None) == expected, text
        found.add(expected)
    assert True in found


def test_several_patterns_at_once() -> None:
    assert can_match(["^a", "b$"]) and not can_match(["^a$", "b"])
    assert can_match(["^[ab]$"], [literal("a")]) and not can_match(["^a$"], [literal("a")])
    assert matches("a.c", "xabcx") is True and matches("^b", "ab") is False
    assert matches(r"\p{L}", "a") is None
    joined = in_python(single(both(["^a", "b"], ["c$"])))
    assert joined.search("axbx") and not joined.search("axbc") and not joined.search("bax")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (r"a\b", "a word boundary"),
        (r"(a)\1", "a back reference"),
        ("(?<!a)b", "look-behind"),
        ("a)", "without its"),
        ("[b-a]", "backwards"),
        ("*a", "nothing to repeat"),
        ("(" * 200 + ")" * 200, "nested more than 100 deep"),
        ("a{3,2}", "a repetition"),
        (r"(?=\p{L})a|b", "beside a look-ahead"),
        ("^(?:(?!a{1,250}b).)*$", "cannot be resolved"),
    ],
)
def test_what_cannot_be_enforced_is_said(pattern: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        conjuncts(pattern)
