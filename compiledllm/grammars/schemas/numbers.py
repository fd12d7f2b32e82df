"""Keywords of numbers, and numbers in other keywords, within llguidance's 64-bit floats."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from compiledllm.grammars.schemas.keywords import MAX_BOUND, MAX_EXACT, Schema
from compiledllm.grammars.schemas.refusal import refuse

KEYWORDS = frozenset(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"))
MAX_SIZE = 2**31
_INCLUSIVE = {"exclusiveMinimum": "minimum", "exclusiveMaximum": "maximum"}


def bounds(
    _: Any, schema: Mapping[str, Any], at: str, found: dict[str, Any], parts: list[Schema]
) -> None:
    """Rewrite the keywords of numbers. See `rewrite.Rule`.

    Draft 4's boolean exclusive bounds become numbers, as in later drafts.
    """
    for name in ("minimum", "maximum"):
        if name in schema and schema.get(_exclusive(name)) is not True:
            found[name] = _bound(schema[name], at, name)
    for name, inclusive in _INCLUSIVE.items():
        value = schema.get(name, False)
        if value is True:
            value = schema.get(inclusive, False)
        if value is not False:
            found[name] = _bound(value, at, name)
    if "multipleOf" in schema:
        value = schema["multipleOf"]
        if not _is_number(value) or not value:
            refuse(at, "multipleOf", value, "must be a number that is not 0")
        if value != 1 or schema.get("type") == "number":
            found["multipleOf"] = abs(value)


def _exclusive(name: str) -> str:
    return f"exclusive{name.capitalize()}"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _bound(value: Any, at: str, name: str) -> int | float:
    """The nearest bound that llguidance represents exactly and that allows nothing more."""
    if not _is_number(value):
        refuse(at, name, value, "must be a number")
    if isinstance(value, float) and not value.is_integer():
        return value
    whole, is_lower = int(value), "inimum" in name
    if abs(whole) <= MAX_EXACT:
        return whole if isinstance(value, int) else value
    if abs(whole) > MAX_BOUND:
        if (whole > 0) == is_lower:
            refuse(at, name, value, f"is beyond {MAX_BOUND}", "there is no such large integer")
        return MAX_BOUND if whole > 0 else -MAX_BOUND
    near = float(whole)
    if (near < whole) if is_lower else (near > whole):
        near = math.nextafter(near, math.inf if is_lower else -math.inf)
    return int(near)


def exact(value: Any, at: str, name: str) -> Any:
    """A constant, whole floats as integers. Refuses numbers that llguidance would change."""
    if isinstance(value, list):
        return [exact(inner, at, name) for inner in value]
    if isinstance(value, dict):
        return {key: exact(inner, at, name) for key, inner in value.items()}
    if _is_number(value) and abs(value) > MAX_EXACT:
        refuse(at, name, value, f"is a number beyond {MAX_EXACT}", "give it as a string")
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def size(schema: Mapping[str, Any], at: str, name: str) -> int:
    """The bound that keyword `name` sets on the length of a text, an array or an object."""
    value = schema[name]
    if not _is_number(value) or value != int(value) or not 0 <= value <= MAX_SIZE:
        refuse(at, name, value, f"must be an integer from 0 to {MAX_SIZE}")
    return int(value)
