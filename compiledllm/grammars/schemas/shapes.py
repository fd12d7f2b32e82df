"""Combines rewritten schemas, and tells which types and values a rewritten schema allows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

from compiledllm.grammars.schemas.keywords import KINDS, Schema

Deref = Callable[[Schema], Schema]
MAX_DEPTH = 12  # of nested schemas that are examined
_BY_KEYWORD = {"minLength": "string", "maxLength": "string", "pattern": "string"}


def all_of(parts: Iterable[Schema]) -> Schema:
    """A schema of the values that all parts allow."""
    found: list[Schema] = []
    for part in parts:
        if part is False:
            return False
        if part is not True and part != {} and part not in found:
            found.append(part)
    if len(found) < 2:
        return found[0] if found else {}
    first, *rest = found
    if isinstance(first, dict) and not {"allOf", "$ref", "oneOf"} & set(first):
        return first | {"allOf": rest}
    return {"allOf": found}


def any_of(options: Iterable[Schema]) -> Schema:
    """A schema of the values that at least one option allows."""
    found: list[Schema] = []
    for option in options:
        if option is True or option == {}:
            return {}
        if option is not False and option not in found:
            found.append(option)
    if len(found) < 2:
        return found[0] if found else False
    return {"anyOf": found}


def options_of(schema: dict[str, Any]) -> list[list[Schema]]:
    """The lists of alternatives: of anyOf, and of a oneOf that is not rewritten yet."""
    return [schema[keyword] for keyword in ("anyOf", "oneOf") if keyword in schema]


def kind_of(value: Any) -> str:
    """The type of a JSON value; integers are numbers."""
    if isinstance(value, bool):
        return "boolean"
    kinds = {type(None): "null", str: "string", list: "array", dict: "object"}
    return kinds.get(type(value), "number")


def canonical(value: Any) -> str:
    """A text that is equal for equal JSON values: 1 and 1.0 are equal, 1 and true are not."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, list):
        return "[" + ",".join(map(canonical, value)) + "]"
    if isinstance(value, dict):
        items = sorted((json.dumps(k), canonical(v)) for k, v in value.items())
        return "{" + ",".join(f"{k}:{v}" for k, v in items) + "}"
    return json.dumps(value)


def kinds(schema: Schema, deref: Deref, depth: int = 0) -> frozenset[str]:
    """A superset of the types that the schema's values have."""
    schema = deref(schema)
    if isinstance(schema, bool) or depth > MAX_DEPTH:
        return frozenset(KINDS if schema is not False else ())
    found = frozenset(KINDS)
    if "type" in schema:
        types = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
        found &= {"number" if name == "integer" else name for name in types}
    if "const" in schema:
        found &= {kind_of(schema["const"])}
    if "enum" in schema:
        found &= {kind_of(value) for value in schema["enum"]}
    for options in options_of(schema):
        found &= frozenset().union(*(kinds(option, deref, depth + 1) for option in options))
    for part in schema.get("allOf", ()):
        found &= kinds(part, deref, depth + 1)
    if "$ref" in schema and len(schema) > 1:
        found &= kinds({"$ref": schema["$ref"]}, deref, depth + 1)
    return found


def values(schema: Schema, deref: Deref, depth: int = 0) -> dict[str, Any] | None:
    """A superset of the schema's values, by canonical text; None if the values cannot be listed."""
    schema = deref(schema)
    if isinstance(schema, bool) or depth > MAX_DEPTH:
        return {} if schema is False else None
    found: list[dict[str, Any]] = []
    if "const" in schema:
        found.append({canonical(schema["const"]): schema["const"]})
    if "enum" in schema:
        found.append({canonical(value): value for value in schema["enum"]})
    if schema.get("type") in ("null", "boolean"):
        all_values = [None] if schema["type"] == "null" else [False, True]
        found.append({canonical(value): value for value in all_values})
    for options in options_of(schema):
        few = [values(option, deref, depth + 1) for option in options]
        if None not in few:
            found.append({k: v for option in few for k, v in (option or {}).items()})
    found += [
        v for part in schema.get("allOf", ()) if (v := values(part, deref, depth + 1)) is not None
    ]
    if not found:
        return None
    types = kinds(schema, deref, depth)
    keys = set(found[0]).intersection(*found[1:])
    return {k: v for k, v in found[0].items() if k in keys and kind_of(v) in types}


def members(schema: Schema, deref: Deref, depth: int = 0) -> list[dict[str, Any]]:
    """The schema and all schemas that must hold with it, with references resolved."""
    schema = deref(schema)
    if isinstance(schema, bool) or depth > MAX_DEPTH:
        return []
    found = [schema]
    for part in schema.get("allOf", ()):
        found += members(part, deref, depth + 1)
    if "$ref" in schema:
        found += members({"$ref": schema["$ref"]}, deref, depth + 1)
    return found


def property_of(schema: dict[str, Any], name: str) -> Schema:
    """The schema that one schema's keywords give to a property, apart from patterns."""
    if name in schema.get("properties", {}):
        found: Schema = schema["properties"][name]
        return found
    if "patternProperties" in schema:
        return {}
    rest: Schema = schema.get("additionalProperties", {})
    return rest


def are_disjoint(one: Schema, other: Schema, deref: Deref, depth: int = 0) -> bool:
    """Whether certainly no value fits both schemas."""
    one, other = deref(one), deref(other)
    if one is False or other is False:
        return True
    if isinstance(one, bool) or isinstance(other, bool) or depth > MAX_DEPTH:
        return False
    common = kinds(one, deref) & kinds(other, deref)
    if not common:
        return True
    few, others = values(one, deref), values(other, deref)
    if few is not None and others is not None:
        return not set(few) & set(others)
    for here, there in ((one, other), (other, one)):
        for options in options_of(here):
            return all(are_disjoint(option, there, deref, depth + 1) for option in options)
    if common == {"object"}:
        return _have_disjoint_properties(one, other, deref, depth)
    return False


def _have_disjoint_properties(one: Schema, other: Schema, deref: Deref, depth: int) -> bool:
    ours, theirs = members(one, deref), members(other, deref)
    required = {name for part in [*ours, *theirs] for name in part.get("required", ())}
    return any(
        are_disjoint(property_of(a, name), property_of(b, name), deref, depth + 1)
        for name in required
        for a in ours
        for b in theirs
    )
