"""Analyses the annotations of bodies' fields, and describes them in words for errors."""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from msgspec import Meta, Raw

Buffer = bytes | Raw


def bare_of(kind: Any) -> tuple[Any, Meta | None]:
    """An annotation without its limits, and the limits."""
    if get_origin(kind) is Annotated:
        bare, *more = get_args(kind)
        return bare, next((meta for meta in more if isinstance(meta, Meta)), None)
    return kind, None


def without_none(kind: Any) -> Any:
    """The annotation of an optional field without None, since null means absent."""
    if get_origin(kind) in (Union, UnionType):
        arms = tuple(arm for arm in get_args(kind) if arm is not type(None))
        return arms[0] if len(arms) == 1 else Union[arms]  # noqa: UP007 (made at run time)
    return kind


def describe(kind: Any) -> str:
    """The values that an annotation allows, in words, with the limits."""
    bare, meta = bare_of(kind)
    if meta is not None and meta.description is not None:
        return meta.description
    origin = get_origin(bare)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(describe(arm) for arm in get_args(bare)))
    if origin is Literal:
        return f"one of {', '.join(map(repr, get_args(bare)))}"
    if origin is list:
        count = _range(meta, "item")
        return f"a list of {_many(get_args(bare)[0])}{count and f', {count}'}"
    if bare is bool:
        return "true or false"
    if bare is str:
        return f"text of {length}" if (length := _range(meta, "character")) else "text"
    if bare in (int, float):
        return f"{'an integer' if bare is int else 'a number'}{_interval(meta)}"
    if origin is dict and get_args(bare)[1] is not Any:
        return f"an object, {_range(meta, 'entry')}, each {describe(get_args(bare)[1])}"
    return "an object"


def _many(kind: Any) -> str:
    """Items of a list in words, in the plural and without the items' own limits."""
    bare, _ = bare_of(kind)
    if get_origin(bare) in (Union, UnionType):
        return " or ".join(map(_many, get_args(bare)))
    if get_origin(bare) is list:
        return f"lists of {_many(get_args(bare)[0])}"
    return {int: "integers", float: "numbers", str: "texts"}.get(bare, "objects")


def _range(meta: Meta | None, unit: str) -> str:
    low, high = (meta.min_length, meta.max_length) if meta is not None else (None, None)
    if low and high:
        return f"at least {_count(low, unit)} and at most {high}"
    return f"at most {_count(high, unit)}" if high else ""


def _count(number: int, unit: str) -> str:
    return f"{number} {unit if number == 1 else _PLURALS[unit]}"


_PLURALS = {"item": "items", "character": "characters", "entry": "entries"}


def _interval(meta: Meta | None) -> str:
    if meta is None:
        return ""
    bounds = {"above": meta.gt, ">=": meta.ge, "<=": meta.le, "below": meta.lt}
    words = [f"{word} {bound}" for word, bound in bounds.items() if bound is not None]
    return f" {' and '.join(words)}" if words else ""


def json_types_of(kind: Any) -> Iterator[str]:
    """The types of JSON that a value may have: "text", "object", "list number", ..."""
    bare, _ = bare_of(kind)
    origin = get_origin(bare)
    if origin is list:
        for json_type in json_types_of(get_args(bare)[0]):
            yield f"list {json_type.partition(' ')[0]}"
        yield "list"
    elif origin in (Union, UnionType):
        for arm in get_args(bare):
            yield from json_types_of(arm)
    elif bare is bool:
        yield "switch"
    elif bare in (int, float):
        yield "number"
    else:
        yield "text" if bare is str or origin is Literal else "object"


def json_type_of(data: Buffer) -> str:
    """The type of a value by its first character; for a list also by the first item's."""
    view = memoryview(data)
    json_type = _TYPES.get(view[0], "")
    if json_type != "list":
        return json_type
    item = _FIRST_ITEM.match(view)
    return f"list {_TYPES.get(item[1][0], '')}" if item else json_type


_FIRST_ITEM = re.compile(rb"\[\s*(.)", re.DOTALL)
_TYPES = {ord('"'): "text", ord("{"): "object", ord("["): "list", ord("t"): "switch"}
_TYPES |= {ord("f"): "switch", ord("-"): "number"} | {
    ord(digit): "number" for digit in "0123456789"
}
