"""Rewrites allOf, anyOf, oneOf, not and if as allOf and anyOf alone."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from compiledllm.grammars.schemas.keywords import Schema
from compiledllm.grammars.schemas.negation import NoNegation, negated
from compiledllm.grammars.schemas.references import step
from compiledllm.grammars.schemas.refusal import refuse
from compiledllm.grammars.schemas.shapes import (
    all_of,
    any_of,
    are_disjoint,
    kinds,
    members,
    options_of,
    values,
)

if TYPE_CHECKING:
    from compiledllm.grammars.schemas.rewrite import Rewriter

KEYWORDS = frozenset(("allOf", "anyOf", "oneOf", "not", "if"))
MAX_BRANCHES = 500


def combine(rewriter: Rewriter, schema: Mapping[str, Any], at: str, parts: list[Schema]) -> None:
    """Add to `parts` the schemas that these keywords require."""
    for keyword in ("allOf", "anyOf", "oneOf"):
        if keyword not in schema:
            continue
        given, inside = schema[keyword], step(at, keyword)
        if not isinstance(given, list) or not 1 <= len(given) <= MAX_BRANCHES:
            refuse(at, keyword, given, f"must be a list of 1 to {MAX_BRANCHES} schemas")
        found = [rewriter.schema(inner, step(inside, str(i))) for i, inner in enumerate(given)]
        if keyword == "allOf":
            parts += found
        else:
            parts.append(any_of(found) if keyword == "anyOf" else rewriter.one_of(found, at))
    if "not" in schema:
        inner = rewriter.schema(schema["not"], step(at, "not"))
        parts.append(_negated(rewriter, inner, schema["not"], at, "not"))
    if "if" in schema:
        parts.append(_conditional(rewriter, schema, at))


def _conditional(rewriter: Rewriter, schema: Mapping[str, Any], at: str) -> Schema:
    branches = [rewriter.schema(schema.get(k, True), step(at, k)) for k in ("if", "then", "else")]
    condition, then, otherwise = branches
    if then in (True, {}) and otherwise in (True, {}):
        return {}
    opposite = _negated(rewriter, condition, schema["if"], at, "if")
    return any_of([all_of([condition, then]), all_of([opposite, otherwise])])


def _negated(rewriter: Rewriter, schema: Schema, given: Any, at: str, keyword: str) -> Schema:
    try:
        return negated(schema, rewriter.deref)
    except NoNegation as error:
        refuse(
            at,
            keyword,
            given,
            f"cannot be enforced: there is no opposite of {error}",
            "say with anyOf, enum or properties what is wanted instead",
        )


def exclusive(rewriter: Rewriter, branches: list[Schema], at: str) -> Schema:
    """A oneOf as an anyOf whose branches exclude each other, by negation if necessary.

    A tag, a property with different constants in each branch, becomes required in every branch: the
    tags of pydantic have a default and are therefore optional, and without its tag a value may fit
    several branches.
    """
    branches = [branch for branch in branches if branch is not False]
    tag = _tag(rewriter, branches)
    if tag is not None:
        return any_of(_with_tag(rewriter, branch, tag, at) for branch in branches)
    options = []
    for i, branch in enumerate(branches):
        overlap = [
            other
            for j, other in enumerate(branches)
            if i != j and not are_disjoint(branch, other, rewriter.deref)
        ]
        try:
            others = [negated(other, rewriter.deref) for other in overlap]
        except NoNegation as error:
            refuse(
                at,
                "oneOf",
                f"of {len(branches)} schemas",
                f"has two that the same value may fit, and there is no opposite of {error}",
                "use anyOf, or give all a required property with another constant in each",
            )
        rewriter.count(at, len(others) + 1)
        options.append(all_of([branch, *others]))
    return any_of(options)


def _tag(rewriter: Rewriter, branches: list[Schema]) -> str | None:
    """A property with a few constants in each branch and no constant in two branches."""
    if len(branches) < 2:
        return None
    names = [_tagged(rewriter, branch) for branch in branches]
    for name in names[0]:
        if all(name in found for found in names):
            seen = list(itertools.chain(*(found[name] for found in names)))
            if len(seen) == len(set(seen)):
                return name
    return None


def _tagged(rewriter: Rewriter, branch: Schema, depth: int = 0) -> dict[str, set[str]]:
    """The properties with only a few constants in a schema of objects, with their constants."""
    found: dict[str, set[str]] = {}
    if depth > 8:
        return found
    for part in members(branch, rewriter.deref):
        for name, schema in part.get("properties", {}).items():
            few = values(schema, rewriter.deref)
            if few is not None:
                found.setdefault(name, set(few)).intersection_update(few)
        for options in options_of(part):
            tags = [_tagged(rewriter, option, depth + 1) for option in options]
            for name in set(tags[0]).intersection(*tags[1:]):
                found.setdefault(name, set().union(*(option[name] for option in tags)))
    return found if _is_object(rewriter, branch) else {}


def _is_object(rewriter: Rewriter, branch: Schema) -> bool:
    return kinds(branch, rewriter.deref) == {"object"} or any(
        part.get("properties") for part in members(branch, rewriter.deref)
    )


def _with_tag(rewriter: Rewriter, branch: Schema, tag: str, at: str) -> Schema:
    """The branch, restricted to objects that have the tag."""
    known = members(branch, rewriter.deref)
    if any(tag in part.get("required", ()) and part.get("type") == "object" for part in known):
        return branch
    wanted: Schema = {"type": "object", "required": [tag]}
    whole = rewriter.deref(branch)
    if isinstance(whole, dict) and "properties" in whole and isinstance(branch, dict):
        required = dict.fromkeys([*whole.get("required", []), tag])
        whole = whole | {"type": "object", "required": list(required)}
        if "$ref" in branch:
            name = branch["$ref"].removeprefix("#/$defs/")
            return rewriter.define(whole, rewriter.pointers[name], f"{name}-{tag_name(tag)}")
        return whole
    if isinstance(whole, dict) and len(whole) == 1 and options_of(whole):
        options = [_with_tag(rewriter, option, tag, at) for option in options_of(whole)[0]]
        return any_of(options) if "anyOf" in whole else rewriter.one_of(options, at)
    return all_of([branch, wanted])


def tag_name(tag: str) -> str:
    """A tag in a form that fits into a definition's name."""
    return tag.encode().hex()
