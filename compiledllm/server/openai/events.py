"""Server-sent events, and a template for a stream's events that differ only in their text."""

from __future__ import annotations

import time
from typing import Any

import msgspec

from compiledllm.outputs import FinishReason

_ENCODE = msgspec.json.Encoder().encode
_HOLE = b"\0"  # JSON never contains this byte
DONE = b"data: [DONE]\n\n"


def event(body: Any) -> bytes:
    return b"data: " + _ENCODE(body) + b"\n\n"


def hole(name: str) -> msgspec.Raw:
    """A placeholder for a value that `Template.fill` inserts."""
    return msgspec.Raw(_HOLE + f"({name})b".encode())


class Template:
    """An event with placeholders, filled in a fraction of the time that encoding a body takes."""

    def __init__(self, body: dict[str, Any]) -> None:
        self._event = event(body).replace(b"%", b"%%").replace(_HOLE, b"%")

    def fill(
        self,
        index: int,
        text: str,
        finish_reason: FinishReason | None,
        stop_reason: int | str | None,
    ) -> bytes:
        return self._event % {
            b"created": b"%d" % time.time(),
            b"index": b"%d" % index,
            b"text": _ENCODE(text),
            b"finish_reason": b"null" if finish_reason is None else _ENCODE(finish_reason),
            b"stop_reason": b"null" if stop_reason is None else _ENCODE(stop_reason),
        }
