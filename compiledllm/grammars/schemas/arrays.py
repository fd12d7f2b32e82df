"""Array keywords, including tuples of old drafts and uniqueItems."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from compiledllm.grammars.schemas.keywords import Schema
from compiledllm.grammars.schemas.numbers import size
from compiledllm.grammars.schemas.references import step
from compiledllm.grammars.schemas.refusal import refuse
from compiledllm.grammars.schemas.shapes import any_of, are_disjoint, values

if TYPE_CHECKING:
    from compiledllm.grammars.schemas.rewrite import Rewriter

KEYWORDS = {"items", "prefixItems", "additionalItems", "minItems", "maxItems", "uniqueItems"}
KEYWORDS |= {"contains", "minContains", "maxContains", "unevaluatedItems"}
MAX_ARRANGEMENTS = 400  # constant arrays that may replace a uniqueItems


def arrays(
    rewriter: Rewriter,
    schema: Mapping[str, Any],
    at: str,
    found: dict[str, Any],
    parts: list[Schema],
) -> None:
    """Rewrite the keywords of arrays. See `rewrite.Rule`."""
    for name in ("minItems", "maxItems"):
        if name in schema:
            found[name] = size(schema, at, name)
    _items(rewriter, schema, at, found)
    _contains(schema, at, found)
    _unevaluated(schema, at, found)
    if schema.get("uniqueItems") is True:
        _unique(rewriter, schema, at, found, parts)


def _items(rewriter: Rewriter, schema: Mapping[str, Any], at: str, found: dict[str, Any]) -> None:
    """Rewrite the items. Before draft 2020-12 a tuple was a list in `items`, now prefixItems."""
    is_tuple = isinstance(schema.get("items"), list)
    first, rest = ("items", "additionalItems") if is_tuple else ("prefixItems", "items")
    if first in schema:
        if not isinstance(schema[first], list):
            refuse(at, first, schema[first], "must be a list of schemas")
        found["prefixItems"] = [
            rewriter.schema(inner, step(at, first, str(i))) for i, inner in enumerate(schema[first])
        ]
    if rest in schema:
        found["items"] = rewriter.schema(schema[rest], step(at, rest))


def _contains(schema: Mapping[str, Any], at: str, found: dict[str, Any]) -> None:
    if "contains" not in schema:
        return
    min_count, max_count = schema.get("minContains", 1), schema.get("maxContains")
    if schema["contains"] in (True, {}):
        found["minItems"] = max(found.get("minItems", 0), min_count)
        if max_count is not None:
            found["maxItems"] = min(found.get("maxItems", max_count), max_count)
    elif min_count != 0 or max_count is not None:
        refuse(at, "contains", schema["contains"], "cannot be enforced", "give items a schema")


def _unevaluated(schema: Mapping[str, Any], at: str, found: dict[str, Any]) -> None:
    value = schema.get("unevaluatedItems", True)
    if value in (True, {}) or "items" in found:
        return
    if value is False and not {"allOf", "anyOf", "oneOf", "if", "$ref", "contains"} & set(schema):
        found["items"] = False
        return
    refuse(at, "unevaluatedItems", value, "cannot be enforced here", "give items a schema")


def _unique(
    rewriter: Rewriter,
    schema: Mapping[str, Any],
    at: str,
    found: dict[str, Any],
    parts: list[Schema],
) -> None:
    """Enforce uniqueItems. Disjoint items need nothing; for a few constants, list all arrays."""
    first, rest = found.get("prefixItems", []), found.get("items", {})
    max_count = found.get("maxItems", math.inf)
    if max_count <= 1:
        return
    pairs = itertools.combinations(first, 2)
    is_tuple = bool(first) and (rest is False or max_count <= len(first))
    if is_tuple and all(are_disjoint(a, b, rewriter.deref) for a, b in pairs):
        return
    few = None if first else values(rest, rewriter.deref)
    arrangements = None if few is None else _arrangements(list(few.values()), found)
    if arrangements is None:
        refuse(
            at,
            "uniqueItems",
            True,
            "cannot be enforced for these items: only for at most one, or for a few constants",
            "leave it out, or give items a short enum",
        )
    rewriter.count(at, len(arrangements))
    options: list[Schema] = [{"const": list(chosen)} for chosen in arrangements]
    for name in ("items", "minItems", "maxItems"):
        found.pop(name, None)
    other_types: Schema = {} if "type" not in schema else False
    if other_types is not False:
        options.append({"type": ["null", "boolean", "number", "string", "object"]})
    parts.append(any_of(options))


def _arrangements(few: list[Any], found: dict[str, Any]) -> list[tuple[Any, ...]] | None:
    """All permutations of the constants if they are few, or else all combinations in their order.

    None if there are more than MAX_ARRANGEMENTS of both.
    """
    min_count = found.get("minItems", 0)
    max_count = min(found.get("maxItems", len(few)), len(few))
    for ways, choose in ((math.perm, itertools.permutations), (math.comb, itertools.combinations)):
        if len(few) <= 64 and sum(ways(len(few), k) for k in range(min_count, max_count + 1)) <= (
            MAX_ARRANGEMENTS
        ):
            return list(_chosen(choose, few, min_count, max_count))
    return None


def _chosen(
    choose: Any, few: list[Any], min_count: int, max_count: int
) -> Iterator[tuple[Any, ...]]:
    for count in range(min_count, max_count + 1):
        yield from choose(few, count)
