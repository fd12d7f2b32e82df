"""Error messages for a body's values: the field, the expected value and the value that was sent."""

from __future__ import annotations

import re
from typing import Any, get_args, get_origin

import msgspec
from msgspec import Raw, ValidationError

from compiledllm.server.openai.body_kinds import Buffer, bare_of, describe
from compiledllm.server.openai.errors import ApiError

SMALL_BYTES = 2**16  # bytes of JSON that may be decoded before any item is counted
_SHOWN = 80  # characters of a value in a message
_TRUNCATED = ("Input data was truncated", "it ends early, or has half of a surrogate pair")
_PATH = re.compile(r" - at `\$((?:\[\d+\])*)")


def refusal(error: Exception, kind: Any, data: Buffer, where: str) -> ApiError:
    """Turn a decoding error into an ApiError in the wording of this module."""
    if isinstance(error, RecursionError):
        return ApiError(400, f"{where or 'the body'} is nested too deeply", where or None)
    if not isinstance(error, ValidationError):
        cause = str(error).replace(*_TRUNCATED)
        within = f" (in {where})" if where else ""
        return ApiError(
            400, f"the body is not valid JSON{within}: {cause}, near {_near(error, data)}"
        )
    found = _PATH.search(str(error))
    for index in re.findall(r"\d+", found[1]) if found else ():
        kind, data = _item_of(kind, data, int(index))
        where += f".{index}"
    if "at most length" in str(error):
        return must_be(kind, "more", where)
    got = re.search(r"got `(\w+)`", str(error))
    return must_be(kind, shown(data) or (got[1] if got else "another"), where)


def _item_of(kind: Any, data: Buffer, index: int) -> tuple[Any, Buffer]:
    """The annotation of a list's items, and the item's JSON if the list is short."""
    bare, _ = bare_of(kind)
    kind = get_args(bare)[0] if get_origin(bare) is list else bare
    if not memoryview(data).nbytes or memoryview(data).nbytes > SMALL_BYTES:
        return kind, b""
    return kind, msgspec.json.decode(data, type=list[Raw])[index]


def must_be(kind: Any, got: str, where: str) -> ApiError:
    return ApiError(
        400, f"{where or 'the body'} must be {describe(kind)}, got {got}", where or None
    )


def shown(data: Buffer) -> str:
    view = memoryview(data)
    text = bytes(view[:_SHOWN]).decode(errors="replace")
    return text if view.nbytes <= _SHOWN else f"{text}..."


def _near(error: Exception, data: Buffer) -> str:
    at = re.search(r"byte (\d+)", str(error))
    start = max(int(at[1]) - 20, 0) if at else max(memoryview(data).nbytes - 20, 0)
    text = bytes(memoryview(data)[start : start + 40]).decode(errors="replace")
    return repr(text) if text else "its beginning: it is empty"
