"""Reads JSON bodies field by field and builds only the values that a field takes, within limits.

A kind of body is a subclass of `Body` whose annotations give the types and limits of its fields.
Reading takes linear time, stops at the first bad item and needs a small multiple of the body's
bytes, even for hostile input: an unknown field stays bytes, the first characters choose the member
of a union, and a list ends at its limit. Null means absent. This module knows neither HTTP nor the
meaning of a field.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from types import GenericAlias, UnionType
from typing import Any, ClassVar, TypeVar, Union, get_args, get_origin
from typing import get_type_hints as hints_of

import msgspec
from msgspec import UNSET, DecodeError, Raw, UnsetType, ValidationError

from compiledllm.server.openai.body_budget import MAX_OBJECTS, Budget
from compiledllm.server.openai.body_errors import SMALL_BYTES, must_be, refusal, shown
from compiledllm.server.openai.body_kinds import (
    Buffer,
    bare_of,
    describe,
    json_type_of,
    json_types_of,
    without_none,
)
from compiledllm.server.openai.body_objects import CountedName, name_counter, split_fields
from compiledllm.server.openai.errors import ApiError
from compiledllm.structured_outputs import MAX_NESTING, is_nested_deeper

MAX_TEXT_BYTES = 2**24  # bytes of one text, as sent

BodyT = TypeVar("BodyT", bound="Body")


class Body(msgspec.Struct, kw_only=True):
    """An object with fields. A field is optional if it has a default.

    unknown_fields: names of sent fields that the class does not declare. more: the values of those
    fields in a class that sets `keeps_more`.
    """

    keeps_more: ClassVar[bool] = False

    unknown_fields: list[str] = []
    more: dict[str, Any] = {}

    def plain(self) -> dict[str, Any]:
        """The object as it was sent, with defaults and without nulls."""
        fields = {field.name: getattr(self, name) for name, field in fields_of(type(self)).items()}
        return {k: _plain(v) for k, v in fields.items() if v is not None} | self.more


def _plain(value: Any) -> Any:
    if isinstance(value, Body):
        return value.plain()
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, msgspec.Struct):
        return {k: v for k, v in msgspec.structs.asdict(value).items() if v is not None}
    return value


Reader = Callable[[Buffer, str, Budget], Any]


@dataclass(frozen=True, slots=True)
class Field:
    """One field. name: in JSON. kind: the annotation without None. read: reads a value."""

    name: str
    kind: Any
    is_required: bool
    read: Reader


def parse(kind: type[BodyT], data: bytes) -> BodyT:
    """Parse a body. Raises ApiError (400) with the field, the limit and the value."""
    return _read_body(kind, data, "", Budget())


@lru_cache
def fields_of(kind: type[Body]) -> dict[str, Field]:
    """The fields of a kind of body, by attribute."""
    hints = hints_of(kind, include_extras=True)
    own = [f for f in msgspec.structs.fields(kind) if f.name not in ("unknown_fields", "more")]
    kinds = {f.name: without_none(hints[f.name]) for f in own}
    return {
        f.name: Field(f.encode_name, kinds[f.name], f.required, _reader(kinds[f.name])) for f in own
    }


@lru_cache
def _by_name(kind: type[Body]) -> dict[str, tuple[str, Reader]]:
    return {field.name: (name, field.read) for name, field in fields_of(kind).items()}


# -- readers ---------------------------------------------------------------------------------------


def _read_body(kind: type[BodyT], data: Buffer, where: str, budget: Budget) -> BodyT:
    known, values, unknown, more = _by_name(kind), {}, [], {}
    for name, value in split_fields(data, where).items():
        size = memoryview(value).nbytes
        if size == 4 and bytes(value) == b"null":
            continue
        if name in known:
            attribute, read = known[name]
            values[attribute] = read(value, _inner(where, name), budget)
        elif kind.keeps_more:
            more[name] = _read_free(value, _inner(where, name), budget)
        else:
            unknown.append(name)
    for name, field in fields_of(kind).items():
        if field.is_required and name not in values:
            path = _inner(where, field.name)
            raise ApiError(400, f"{path} is missing; it must be {describe(field.kind)}", path)
    if unknown:
        values["unknown_fields"] = sorted(unknown)
    if more:
        values["more"] = more
    return kind(**values)


def _reader(kind: Any) -> Reader:
    bare, meta = bare_of(kind)
    if get_origin(bare) in (Union, UnionType):
        return _union_reader(kind, get_args(bare))
    if isinstance(bare, type) and issubclass(bare, Body):
        return partial(_read_item_body, bare)
    if get_origin(bare) is list:
        assert meta is not None and meta.max_length is not None, f"{kind} has no limit"
        return _list_reader(kind, get_args(bare)[0], meta.min_length or 0, meta.max_length)
    if bare == dict[str, Any]:
        return _read_object
    if get_origin(bare) is dict:
        assert meta is not None and meta.max_length is not None, f"{kind} has no limit"
        return partial(_read_map, kind, get_args(bare)[1], meta.max_length)
    return _leaf_reader(kind, bare)


def _read_item_body(kind: type[Body], data: Buffer, where: str, budget: Budget) -> Body:
    budget.take(where, objects=1)
    return _read_body(kind, data, where, budget)


_WHOLE = re.compile(rb"(-?[0-9]{1,19})\.0+")
_BYTES_PER_CHARACTER = 12  # at most, in JSON: two escapes of six characters


def _leaf_reader(kind: Any, bare: Any) -> Reader:
    decoder = msgspec.json.Decoder(kind)
    _, meta = bare_of(kind)
    max_bytes = MAX_TEXT_BYTES
    if meta is not None and meta.max_length is not None:
        max_bytes = meta.max_length * _BYTES_PER_CHARACTER + 2

    def read(data: Buffer, where: str, budget: Budget) -> Any:
        size = memoryview(data).nbytes
        if size > max_bytes:  # refused by its size, without decoding
            if size > MAX_TEXT_BYTES:
                raise ApiError(
                    400, f"{where} has {size} bytes; at most {max_bytes} are taken", where
                )
            raise must_be(kind, shown(data), where)
        try:
            return decoder.decode(data)
        except (DecodeError, RecursionError) as error:
            # Typed clients in other languages write integers as 1.0.
            if bare is int and (whole := _WHOLE.fullmatch(memoryview(data))):
                return read(whole[1], where, budget)
            raise refusal(error, kind, data, where) from None

    return read


def _read_object(data: Buffer, where: str, budget: Budget) -> Any:
    if memoryview(data)[0] != ord("{"):
        raise must_be(dict[str, Any], shown(data), where)
    return _read_free(data, where, budget)


def _read_free(data: Buffer, where: str, budget: Budget) -> Any:
    """Decode free-form JSON. Only objects and lists count: once decoded they grow far larger."""
    view = memoryview(data)
    if view[0] != ord('"'):
        budget.take(where, free_bytes=view.nbytes)
    try:
        value = msgspec.json.decode(data)
    except (DecodeError, RecursionError) as error:
        raise refusal(error, dict[str, Any], data, where) from None
    if is_nested_deeper(value, MAX_NESTING):
        raise ApiError(400, f"{where} must be nested at most {MAX_NESTING} deep", where)
    return value


def _read_map(
    kind: Any, value_kind: Any, max_entries: int, data: Buffer, where: str, budget: Budget
) -> dict[str, Any]:
    hook = name_counter(where, max_entries, "entries")
    try:
        found = msgspec.json.decode(data, type=dict[CountedName, value_kind], dec_hook=hook)
    except (DecodeError, RecursionError) as error:
        raise refusal(error, kind, data, where) from None
    return {str(name): value for name, value in found.items()}


def _list_reader(kind: Any, item: Any, min_length: int, max_length: int) -> Reader:
    """Decodes numbers, texts and plain structs at once; bodies, lists and unions one by one."""
    bare, _ = bare_of(item)
    is_number, is_leaf = bare in (int, float), not _is_read_alone(bare)
    whole = msgspec.json.Decoder(GenericAlias(list, (item if is_leaf else Raw,)))
    read_item = None if is_leaf else _reader(item)

    def read(data: Buffer, where: str, budget: Budget) -> list[Any]:
        size = memoryview(data).nbytes
        if is_number:
            count = size // 2 if size <= SMALL_BYTES else bytes(data).count(b",") + 1
            budget.take(where, numbers=min(count, max_length + 1))
        try:
            if size <= SMALL_BYTES or (is_number and count <= max_length):
                items: list[Any] = whole.decode(data)
            else:
                items = _decode_at_most(item if is_leaf else Raw, max_length, data)
        except (DecodeError, RecursionError) as error:
            raise refusal(error, kind, data, where) from None
        if not min_length <= len(items) <= max_length:
            raise must_be(kind, f"{len(items)} items", where)
        if read_item is not None:
            return [read_item(part, f"{where}.{i}", budget) for i, part in enumerate(items)]
        if not is_number:
            budget.take(where, objects=len(items))
        return items

    return read


def _is_read_alone(bare: Any) -> bool:
    """Whether an item of a list has limits on its own contents."""
    is_body = isinstance(bare, type) and issubclass(bare, Body)
    return is_body or get_origin(bare) in (list, dict)


def _decode_at_most(item: Any, max_length: int, data: Buffer) -> list[Any]:
    """Decode a list; the first item beyond the limit raises before later items are decoded."""
    if max_length > MAX_OBJECTS:
        raise ValidationError("at most length")
    return [
        value
        for value in msgspec.structs.astuple(_bounded(item, max_length).decode(data))
        if value is not UNSET
    ]


@lru_cache
def _bounded(item: Any, max_length: int) -> msgspec.json.Decoder[Any]:
    fields = [(f"_{i}", item | UnsetType, UNSET) for i in range(max_length)]
    kind = msgspec.defstruct("Items", fields, array_like=True, forbid_unknown_fields=True)
    return msgspec.json.Decoder(kind)


# -- unions ----------------------------------------------------------------------------------------


def _union_reader(kind: Any, arms: tuple[Any, ...]) -> Reader:
    by_type: dict[str, Reader] = {}
    for arm in arms:
        for json_type in json_types_of(arm):
            by_type.setdefault(json_type, _reader(arm))

    def read(data: Buffer, where: str, budget: Budget) -> Any:
        json_type = json_type_of(data)
        arm = by_type.get(json_type) or by_type.get(json_type.partition(" ")[0])
        if arm is None:
            raise must_be(kind, shown(data), where)
        return arm(data, where, budget)

    return read


def _inner(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name
