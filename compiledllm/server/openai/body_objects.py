"""Splits a JSON object into its fields, still as JSON, and limits their number and names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
from msgspec import DecodeError, Raw

from compiledllm.server.openai.body_errors import SMALL_BYTES, refusal
from compiledllm.server.openai.body_kinds import Buffer
from compiledllm.server.openai.errors import ApiError

MAX_FIELDS = 256  # fields of one object, known or unknown
MAX_NAME_LENGTH = 256  # characters of a field's name


class CountedName(str):
    """A field name that `name_counter` has counted."""


_FIELDS = msgspec.json.Decoder(dict[str, Raw])


def split_fields(data: Buffer, where: str) -> dict[str, Raw]:
    """The fields of an object, still as raw JSON."""
    try:
        if memoryview(data).nbytes <= SMALL_BYTES // 16:
            fields = _FIELDS.decode(data)
        else:
            hook = name_counter(where, MAX_FIELDS, "fields")
            fields = msgspec.json.decode(data, type=dict[CountedName, Raw], dec_hook=hook)
    except (DecodeError, RecursionError) as error:
        raise refusal(error, dict[str, Any], data, where) from None
    for name in fields:
        if len(name) > MAX_NAME_LENGTH:
            _check_name(name, where)
    if len(fields) > MAX_FIELDS:
        _check_count(len(fields), where, MAX_FIELDS, "fields")
    return fields


def name_counter(where: str, max_count: int, what: str) -> Callable[[type, Any], Any]:
    """A decoder hook that rejects an object with too many names or with a name that is too long."""
    count = 0

    def hook(kind: type, name: str) -> CountedName:
        nonlocal count
        count += 1
        _check_count(count, where, max_count, what)
        _check_name(name, where)
        return CountedName(name)

    return hook


def _check_count(count: int, where: str, max_count: int, what: str) -> None:
    if count > max_count:
        raise ApiError(
            400, f"{where or 'the body'} must have at most {max_count} {what}", where or None
        )


def _check_name(name: str, where: str) -> None:
    if len(name) > MAX_NAME_LENGTH:
        raise ApiError(
            400,
            f"{where or 'the body'} has a field with a name of {len(name)} characters, "
            f"'{name[:32]}...'; at most {MAX_NAME_LENGTH} are taken",
            where or None,
        )
