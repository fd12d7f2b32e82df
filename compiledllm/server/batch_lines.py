"""The lines of a batch file: read in pieces, numbered, bounded in size and taken apart.

A line is `{"custom_id": ..., "method": "POST", "url": "/v1/chat/completions", "body": {...}}`. This
module does not know what a body means.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import BinaryIO

import msgspec
from msgspec import Raw

from compiledllm.config import ConfigError
from compiledllm.server.endpoints import ENDPOINTS
from compiledllm.server.openai.body_budget import MAX_BODY_BYTES
from compiledllm.server.openai.body_errors import shown
from compiledllm.server.openai.body_objects import split_fields
from compiledllm.server.openai.errors import ApiError

MAX_LINE_BYTES = MAX_BODY_BYTES + 2**16  # the largest body of a server, and the other fields
MAX_ID_LENGTH = 512  # characters
_CHUNK_BYTES = 2**20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Line:
    """A line that is not blank. number: from 1. data: without the spaces around it.

    is_too_long: `data` is only the beginning of the line.
    """

    number: int
    data: bytes
    is_too_long: bool = False


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """A request of a batch file. body: JSON, not yet checked."""

    line_number: int
    custom_id: str
    url: str
    body: bytes


class LineError(Exception):
    """A line that is no request. custom_id: the line's, if it has one. code, param: OpenAI's."""

    def __init__(
        self, code: str, message: str, param: str | None = None, custom_id: str | None = None
    ) -> None:
        super().__init__(message)
        self.code, self.param, self.custom_id = code, param, custom_id


class Lines:
    """The lines of a file that is read once, in a thread, since a pipe may be slow.

    Raises ConfigError if reading fails.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file  # unbuffered: `read` returns what there is
        self._number = 0
        self._pieces: list[bytes] = []  # of a line whose end has not been read
        self._num_bytes = 0

    async def __aiter__(self) -> AsyncIterator[Line]:
        while chunk := await asyncio.to_thread(self._read):
            for line in self._split(chunk):
                yield line
        for line in self._split(b"\n"):  # the last line may lack its end
            yield line

    def _read(self) -> bytes:
        try:
            return self._file.read(_CHUNK_BYTES)
        except OSError as error:
            raise ConfigError(f"the input cannot be read any further: {error.strerror}") from None

    def _split(self, chunk: bytes) -> Iterator[Line]:
        start = 0
        while (end := chunk.find(b"\n", start)) >= 0:
            self._add(chunk[start:end])
            start = end + 1
            if line := self._take():
                yield line
        self._add(chunk[start:])

    def _add(self, piece: bytes) -> None:
        if self._num_bytes <= MAX_LINE_BYTES and piece:
            self._pieces.append(piece)
        self._num_bytes += len(piece)

    def _take(self) -> Line | None:
        """The line whose end has been read; None for a blank line."""
        is_too_long = self._num_bytes > MAX_LINE_BYTES
        data = self._pieces[0][:_CHUNK_BYTES] if is_too_long else b"".join(self._pieces)
        self._pieces, self._num_bytes = [], 0
        self._number += 1
        if self._number == 1:
            data = data.removeprefix(_BYTE_ORDER_MARK)
        data = data.strip()
        return Line(self._number, data, is_too_long) if data or is_too_long else None


def count_lines(path: str) -> int:
    """The number of lines of a file that are not blank."""
    with open(path, "rb") as file:
        return sum(not line.isspace() for line in file)


def read_request(line: Line) -> BatchRequest:
    """The request on a line. Raises LineError."""
    if line.is_too_long:
        raise LineError("line_too_long", f"a line may have at most {MAX_LINE_BYTES} bytes")
    try:
        fields = split_fields(line.data, "")
    except ApiError as error:
        message = error.message.replace("the body", "the line", 1)
        raise LineError("invalid_json_line", message) from None
    except ValueError as error:  # a name that is not UTF-8
        raise LineError("invalid_json_line", f"the line is not valid JSON: {error}") from None
    custom_id = _text(fields, "custom_id", None)
    if not 1 <= len(custom_id) <= MAX_ID_LENGTH:
        message = f"custom_id must have 1 to {MAX_ID_LENGTH} characters, got {len(custom_id)}"
        raise LineError("invalid_custom_id", message, "custom_id")
    method = _text(fields, "method", custom_id)
    if method != "POST":
        message = f"method must be POST, got '{method[:80]}'"
        raise LineError("invalid_method", message, "method", custom_id)
    url = _text(fields, "url", custom_id)
    if url not in ENDPOINTS:
        known = ", ".join(ENDPOINTS)
        message = f"url '{url[:128]}' cannot be answered in a batch; known: {known}"
        raise LineError("invalid_url", message, "url", custom_id)
    return BatchRequest(line.number, custom_id, url, bytes(_given(fields, "body", custom_id)))


def _given(fields: dict[str, Raw], name: str, custom_id: str | None) -> Raw:
    value = fields.get(name)
    if value is None or bytes(memoryview(value)[:5]) == b"null":
        message = f"{name} is missing from the line"
        raise LineError("missing_required_parameter", message, name, custom_id)
    return value


def _text(fields: dict[str, Raw], name: str, custom_id: str | None) -> str:
    value = _given(fields, name, custom_id)
    try:
        return msgspec.json.decode(value, type=str)
    except ValueError:
        message = f"{name} must be text, got {shown(value)}"
        raise LineError(f"invalid_{name}", message, name, custom_id) from None
