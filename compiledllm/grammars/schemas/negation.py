"""Negates a rewritten schema: a value fits the result if and only if it does not fit the schema."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from compiledllm.grammars.schemas.keywords import KINDS, Schema
from compiledllm.grammars.schemas.patterns import both, single
from compiledllm.grammars.schemas.shapes import MAX_DEPTH, Deref, all_of, any_of, kind_of


class NoNegation(ValueError):
    """The schema has a keyword whose negation no other keyword can express."""


def negated(schema: Schema, deref: Deref, depth: int = 0) -> Schema:
    """The negation of a schema. Raises NoNegation naming the keyword."""
    schema = deref(schema)
    if isinstance(schema, bool):
        return not schema
    if depth > MAX_DEPTH:
        raise NoNegation("schemas nested so deep")

    def inner(part: Schema) -> Schema:
        return negated(part, deref, depth + 1)

    found: list[Schema] = []
    for keyword, value in schema.items():
        if keyword == "$ref":
            found.append(inner({"$ref": value}))
        elif keyword == "anyOf":
            found.append(all_of(map(inner, value)))
        elif keyword == "allOf":
            found += map(inner, value)
        elif keyword == "properties":
            found += [
                {"type": "object", "required": [name], "properties": {name: inner(part)}}
                for name, part in value.items()
                if part is not True and part != {}
            ]
        elif keyword == "format":
            pass  # many validators treat format as an annotation, which fits every value
        elif keyword in _OPPOSITES:
            found.append(_OPPOSITES[keyword](value))
        else:
            raise NoNegation(keyword)
    return any_of(found)


def _not_type(value: Any) -> Schema:
    names = {value} if isinstance(value, str) else set(value)
    if "integer" in names and "number" not in names:
        raise NoNegation("type integer")
    rest = [kind for kind in KINDS if kind not in names]
    return {"type": rest} if rest else False


def _not_const(value: Any) -> Schema:
    kind = kind_of(value)
    others: Schema = {"type": [name for name in KINDS if name != kind]}
    if kind == "null":
        return others
    if kind == "boolean":
        return any_of([others, {"const": not value}])
    if kind == "number":
        above: Schema = {"type": "number", "exclusiveMinimum": value}
        return any_of([others, above, {"type": "number", "exclusiveMaximum": value}])
    if kind == "string":
        return any_of([others, _not_pattern(_literal(value))])
    raise NoNegation(f"a constant {kind}")


def _literal(text: str) -> str:
    from compiledllm.grammars.schemas.patterns import literal

    return literal(text)


def _not_pattern(pattern: str) -> Schema:
    try:
        return {"type": "string", "pattern": single(both([], [pattern]))}
    except ValueError:
        raise NoNegation(f"pattern {pattern:.60}") from None


def _not_enum(few: list[Any]) -> Schema:
    texts = [value for value in few if isinstance(value, str)]
    parts = [_not_const(value) for value in few if not isinstance(value, str)]
    if texts:
        rest: Schema = {"type": [name for name in KINDS if name != "string"]}
        parts.append(any_of([rest, _not_pattern("|".join(map(_literal, texts)))]))
    return all_of(parts)


def _less(kind: str, keyword: str, by: int) -> Callable[[Any], Schema]:
    def opposite(value: Any) -> Schema:
        bound = value + by
        return {"type": kind, keyword: bound} if bound >= 0 or kind == "number" else False

    return opposite


_OPPOSITES: dict[str, Callable[[Any], Schema]] = {
    "type": _not_type,
    "const": _not_const,
    "enum": _not_enum,
    "pattern": _not_pattern,
    "required": lambda names: any_of(
        {"type": "object", "properties": {name: False}} for name in names
    ),
    "minimum": _less("number", "exclusiveMaximum", 0),
    "maximum": _less("number", "exclusiveMinimum", 0),
    "exclusiveMinimum": _less("number", "maximum", 0),
    "exclusiveMaximum": _less("number", "minimum", 0),
    "minLength": _less("string", "maxLength", -1),
    "maxLength": _less("string", "minLength", 1),
    "minItems": _less("array", "maxItems", -1),
    "maxItems": _less("array", "minItems", 1),
}
