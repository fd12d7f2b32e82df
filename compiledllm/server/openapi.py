"""JSON schemas of the bodies, for `/openapi.json`."""

from __future__ import annotations

from types import UnionType
from typing import Any, Union, get_args, get_origin

import msgspec

from compiledllm.server.openai.bodies import Body, fields_of
from compiledllm.server.openai.body_kinds import bare_of

Schema = dict[str, Any]


def add_bodies(schema: Schema, kinds: tuple[type[Body], ...]) -> None:
    """Add the bodies to FastAPI's schema, and remove its status 422, which no route sends."""
    schemas = schema["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    for path in schema["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    schemas |= components(kinds)


def body_of(kind: type[Body]) -> Schema:
    """The description of a route's request body."""
    schema = {"$ref": f"#/components/schemas/{kind.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def components(kinds: tuple[type[Body], ...]) -> dict[str, Schema]:
    """The schemas of these kinds of bodies and of the types that they contain, by name."""
    found: dict[str, Schema] = {}
    for kind in kinds:
        _add(kind, found)
    return found


def _add(kind: type[Body], found: dict[str, Schema]) -> None:
    if kind.__name__ in found:
        return
    schema: Schema = {"title": kind.__name__, "type": "object"}
    found[kind.__name__] = schema
    if kind.__doc__:
        schema["description"] = kind.__doc__
    fields = fields_of(kind).values()
    schema["properties"] = {
        field.name: _schema(field.kind, found)
        if field.is_required
        else {"anyOf": [_schema(field.kind, found), {"type": "null"}]}
        for field in fields
    }
    if required := [field.name for field in fields if field.is_required]:
        schema["required"] = required


def _schema(kind: Any, found: dict[str, Schema]) -> Schema:
    bare, meta = bare_of(kind)
    arguments, origin = get_args(bare), get_origin(bare)
    if isinstance(bare, type) and issubclass(bare, Body):
        _add(bare, found)
        return {"$ref": f"#/components/schemas/{bare.__name__}"}
    if origin in (Union, UnionType):
        return {"anyOf": [_schema(arm, found) for arm in arguments]}
    if origin is list:
        limits = {"minItems": meta and meta.min_length, "maxItems": meta and meta.max_length}
        schema = {"type": "array", "items": _schema(arguments[0], found)}
        return schema | {name: limit for name, limit in limits.items() if limit is not None}
    if isinstance(bare, type) and issubclass(bare, msgspec.Struct):
        (schemas, more) = msgspec.json.schema_components(
            [bare], ref_template="#/components/schemas/{name}"
        )
        found |= more
        return schemas[0]
    if origin is dict:
        values = {} if arguments[1] is Any else _schema(arguments[1], found)
        most = {"maxProperties": meta.max_length} if meta else {}
        return {"type": "object", "additionalProperties": values} | most
    return msgspec.json.schema(kind)
