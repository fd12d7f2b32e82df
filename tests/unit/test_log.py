"""What a client chose as a name stays on its line of the log."""

from __future__ import annotations

import logging

import pytest

from compiledllm.log import OneLine, escaped

HOSTILE = "a\nERROR 00:00:00 forged\r\x1b[31mred\x85\u2028\u202e\x00\x7f"


def shown(*arguments: object, exc_info: BaseException | None = None) -> str:
    info = exc_info and (type(exc_info), exc_info, None)
    record = logging.LogRecord("x", logging.INFO, "", 0, arguments[0], arguments[1:], info)
    assert OneLine().filter(record)
    return logging.Formatter().format(record)


def test_control_characters_are_escaped() -> None:
    line = shown("request %s: %d", HOSTILE, 5)
    assert line.isprintable() and "\\n" in line and "\\x1b[31m" in line and line.endswith(": 5")
    assert len(line.splitlines()) == 1
    assert shown("plain 100 % wörld 日本\t!") == "plain 100 % wörld 日本\t!"
    assert escaped("\ud800") == "\\ud800"


def test_a_line_has_an_end() -> None:
    assert len(shown("%s", "x" * 10**6)) < 5000


def test_the_lines_of_a_traceback_are_indented() -> None:
    lines = shown("it failed", exc_info=ValueError(HOSTILE)).split("\n")
    assert lines[0] == "it failed"
    assert all(line.startswith("  ") and line.isprintable() for line in lines[1:])


@pytest.mark.parametrize("name", ["compiledllm"])
def test_the_packages_logger_does_so(name: str) -> None:
    assert any(isinstance(one, OneLine) for one in logging.getLogger(name).filters)
