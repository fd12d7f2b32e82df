"""Lines of batch files, however they are read and whatever they hold."""

from __future__ import annotations

import asyncio
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("msgspec")

from compiledllm.config import ConfigError
from compiledllm.server import batch_lines
from compiledllm.server.batch import Window
from compiledllm.server.batch_answers import AnswerFile, Record, Refusal
from compiledllm.server.batch_lines import BatchRequest, Line, LineError, Lines, count_lines

GOOD = json.dumps(
    {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": [5]}}
).encode()


class Pieces(io.RawIOBase):
    """A file that gives what it has in pieces."""

    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = [piece for piece in pieces if piece]

    def read(self, size: int = -1) -> bytes:
        return self._pieces.pop(0) if self._pieces else b""


def lines_of(pieces: list[bytes]) -> list[Line]:
    async def read() -> list[Line]:
        file: Any = Pieces(pieces)
        return [line async for line in Lines(file)]

    return asyncio.run(read())


@given(st.lists(st.binary(max_size=9) | st.sampled_from([b"\n", b"a\nb", b"\r\n", b" "])))
def test_lines_do_not_depend_on_how_they_arrive(pieces: list[bytes]) -> None:
    expected = [
        (number, line.strip())
        for number, line in enumerate(b"".join(pieces).split(b"\n"), start=1)
        if line.strip()
    ]
    found = [(line.number, line.data) for line in lines_of(pieces)]
    assert found == [pair for pair in expected if pair[1] != b"\xef\xbb\xbf"]


@given(st.binary(max_size=40), st.integers(0, len(GOOD)), st.integers(0, len(GOOD)))
def test_any_line_is_a_request_or_an_error(junk: bytes, start: int, end: int) -> None:
    data = GOOD[:start] + junk + GOOD[end:]
    try:
        found = batch_lines.read_request(Line(1, data))
    except LineError as error:
        assert len(str(error)) < 1000 and error.code
    else:
        assert isinstance(found, BatchRequest) and found.custom_id and found.body


def test_of_a_line_that_is_too_long_only_the_beginning_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(batch_lines, "MAX_LINE_BYTES", 10)
    found = lines_of([b"x" * 6, b"y" * 5, *[b"z" * 1000] * 50, b"\nab", b"c\n" + b"d" * 11])
    assert [(line.number, line.is_too_long) for line in found] == [(1, True), (2, False), (3, True)]
    assert found[0].data == b"x" * 6 and found[1].data == b"abc"
    with pytest.raises(LineError, match="at most 10 bytes"):
        batch_lines.read_request(found[2])


def test_reading_that_fails_is_named() -> None:
    class Broken(io.RawIOBase):
        def read(self, size: int = -1) -> bytes:
            raise OSError(5, "Input/output error")

    async def read() -> None:
        file: Any = Broken()
        async for _ in Lines(file):
            pass

    with pytest.raises(ConfigError, match="cannot be read any further: Input/output error"):
        asyncio.run(read())


def test_lines_are_counted_without_the_blank_ones(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"a\n\n  \nb\r\n\r\nc")
    assert count_lines(str(tmp_path / "in")) == 3


def test_a_record_is_written_whole_where_the_system_takes_part_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write: Callable[..., int] = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, bytes(data[:7])))
    answers = AnswerFile(str(tmp_path / "out"))
    record = Record("batch_req_00", None, None, Refusal("code", "wörds" * 50, None, 3))
    asyncio.run(answers.write(record))
    answers.close()
    (line,) = (tmp_path / "out").read_text().splitlines()
    assert json.loads(line)["error"]["message"] == "wörds" * 50
    again = AnswerFile(str(tmp_path / "out"))
    assert again.refused == {3} and not again.earlier
    again.close()


def test_a_window_bounds_items_and_bytes_but_lets_one_in() -> None:
    async def play() -> None:
        window = Window(max_bytes=10)
        window.max_items = 2
        await window.enter(50)  # alone
        waiting = asyncio.create_task(window.enter(4))
        await asyncio.sleep(0)
        assert not waiting.done()
        window.leave(50)
        await waiting
        await window.enter(6)
        waiting = asyncio.create_task(window.enter(0))
        await asyncio.sleep(0)
        assert not waiting.done(), "two are in"
        window.leave(4)
        await waiting

    asyncio.run(asyncio.wait_for(play(), 30))
