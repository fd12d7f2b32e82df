"""Converts argument values that a model writes without JSON's quotes, by the tool's schema."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

TYPES = frozenset({"string", "number", "boolean", "null", "object", "array"})
STRING = frozenset({"string"})
_MAX_REFS = 16

# Strings, words, and what JSON writes otherwise. A string without an end reaches to the text's end,
# so that the time is linear.
_TOKEN = re.compile(
    r'"""(?s:.*?)(?:"""|\Z)|"(?:\\(?s:.)|[^"\\])*"?'
    r"|'''(?s:.*?)(?:'''|\Z)|'(?:\\(?s:.)|[^'\\])*'?"
    r"|[A-Za-z_]\w*|,(?=\s*[\])}])|[()]"
)
_WORDS = {"true": "true", "false": "false", "none": "null", "null": "null"}
_BRACKETS = {"(": "[", ")": "]", ",": ""}
_ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|(?s:.))")
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "0": "\0", "\n": ""}
_FIRST = {'"': "string", "{": "object", "[": "array", "t": "boolean", "f": "boolean", "n": "null"}


Memo = dict[int, frozenset[str]]


def types_of(schema: Any, root: Any, memo: Memo | None = None) -> frozenset[str]:
    """The JSON types that a schema allows, integers as "number".

    root: the schema that references are relative to. memo: the types of the schemas that have been
    visited, by `id`.
    """
    schema = resolved(schema, root) if isinstance(schema, Mapping) else {}
    memo = {} if memo is None else memo
    if id(schema) not in memo:
        memo[id(schema)] = frozenset()  # ends the recursion of a schema that contains itself
        memo[id(schema)] = _types_of(schema, root, memo) or TYPES
    return memo[id(schema)]


def _types_of(schema: Mapping[str, Any], root: Any, memo: Memo) -> frozenset[str]:
    types = TYPES
    names = [schema["type"]] if isinstance(schema.get("type"), str) else list_of(schema, "type")
    if names:
        types &= {"number" if name == "integer" else str(name) for name in names}
    if values := values_of(schema):
        types &= {type_of(json.dumps(value)) for value in values}
    for name in ("anyOf", "oneOf"):
        if options := list_of(schema, name):
            types &= frozenset().union(*(types_of(one, root, memo) for one in options))
    for one in list_of(schema, "allOf"):
        types &= types_of(one, root, memo)
    return types | {"null"} if schema.get("nullable") is True else types


def properties_of(schema: Any, root: Any) -> tuple[dict[str, Any], set[str]]:
    """The properties of an object's schema, and the names of those that it must have."""
    schema = resolved(schema, root) if isinstance(schema, Mapping) else {}
    parts = [resolved(one, root) for one in list_of(schema, "allOf") if isinstance(one, Mapping)]
    properties: dict[str, Any] = {}
    required: set[str] = set()
    for part in (*parts, schema):
        own = part.get("properties")
        properties |= own if isinstance(own, Mapping) else {}
        required |= {name for name in list_of(part, "required") if isinstance(name, str)}
    return properties, required


def values_of(schema: Mapping[str, Any]) -> list[Any]:
    """The values that a schema enumerates; [] if it does not."""
    return [schema["const"]] if "const" in schema else list_of(schema, "enum")


def list_of(schema: Mapping[str, Any], keyword: str) -> list[Any]:
    """The value of a keyword that takes a list; [] for any other value."""
    value = schema.get(keyword)
    return value if isinstance(value, list) else []


def resolved(schema: Mapping[str, Any], root: Any) -> Mapping[str, Any]:
    """The schema that a chain of local references leads to; {} if it leads nowhere."""
    for _ in range(_MAX_REFS):
        reference = schema.get("$ref")
        if not isinstance(reference, str):
            return schema
        found: Any = root if reference.startswith("#") else None
        for name in filter(None, reference[1:].split("/")):
            name = name.replace("~1", "/").replace("~0", "~")
            found = found.get(name) if isinstance(found, Mapping) else None
        schema = found if isinstance(found, Mapping) else {}
    return {}


def type_of(text: str) -> str:
    """The type of a value in JSON."""
    return _FIRST.get(text[0], "number")


def json_of(text: str, types: Iterable[str] = TYPES) -> str:
    """The JSON of a value that a model writes without quotes if it is a string, else as JSON.

    Python's spelling of JSON's values counts as well. A text that fits none of the types is a
    string.
    """
    if set(types) != STRING:
        found = as_json(text.strip())
        kind = type_of(found) if found else "string"
        if found and ("string" not in types or (kind in types and kind != "string")):
            return found
    return quoted(text)


def as_json(text: str) -> str | None:
    """The text if it is JSON, or the JSON of a Python literal; None for anything else."""
    for candidate in (text, _TOKEN.sub(_in_json, text)):
        try:
            json.loads(candidate, parse_constant=_refuse)
        except (ValueError, RecursionError):
            continue
        return candidate
    return None


def quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _refuse(name: str) -> None:
    raise ValueError(f"JSON has no {name}")


def _in_json(match: re.Match[str]) -> str:
    token = match[0]
    if token in _BRACKETS:
        return _BRACKETS[token]
    if token[0] not in "\"'":
        return _WORDS.get(token.lower(), token)
    quotes = token[0] * (3 if token[:3] in ('"""', "'''") and len(token) > 5 else 1)
    if len(token) < 2 * len(quotes) or not token.endswith(quotes):
        return token
    return json.dumps(_ESCAPE.sub(_unescaped, token[len(quotes) : -len(quotes)]))


def _unescaped(match: re.Match[str]) -> str:
    name = match[1]
    if len(name) > 1:
        number = int(name[1:], 16)
        return chr(number) if number < 0x110000 else match[0]
    return _ESCAPED.get(name, name if name in "\\'\"" else match[0])
