"""Finds schemas that no finite value fits, such as an object that requires another of its kind."""

from __future__ import annotations

from typing import Any

from compiledllm.grammars.schemas.keywords import FORMAT_PATTERNS, Schema
from compiledllm.grammars.schemas.refusal import SchemaRefused


def without_dead_ends(
    root: Schema, definitions: dict[str, Schema], pointers: dict[str, str]
) -> Schema:
    """The schema with its definitions, without options and properties that no finite value fits.

    Some formats become patterns of our own. Raises ValueError if nothing fits the schema.
    """
    alive = _Alive(definitions)
    if not alive.has_values(root):
        dead = sorted(pointers[name] for name in definitions if name not in alive.names)
        why = f"{dead[0]} leads back to itself without an end" if dead else "it is false"
        raise SchemaRefused(f"the schema cannot be satisfied: {why}")
    found = alive.pruned(root)
    used = {name: alive.pruned(schema) for name, schema in definitions.items()}
    used = {name: schema for name, schema in used.items() if name in alive.names}
    if isinstance(found, bool):
        found = {}
    return found | {"$defs": used} if used else found


class _Alive:
    """The names of the definitions that some finite value fits, as far as the keywords show."""

    def __init__(self, definitions: dict[str, Schema]) -> None:
        self.names: set[str] = set()
        left, before = list(definitions), -1
        while len(self.names) > before:
            before = len(self.names)
            for name in left:
                if self.has_values(definitions[name]):
                    self.names.add(name)
            left = [name for name in reversed(left) if name not in self.names]

    def has_values(self, schema: Schema) -> bool:
        if isinstance(schema, bool):
            return schema
        if "$ref" in schema and schema["$ref"].removeprefix("#/$defs/") not in self.names:
            return False
        if "anyOf" in schema and not any(map(self.has_values, schema["anyOf"])):
            return False
        if not all(map(self.has_values, schema.get("allOf", ()))):
            return False
        types = schema.get("type", ["null"])
        return any(
            map(self._has_values_of, [types] if isinstance(types, str) else types, [schema] * 7)
        )

    def _has_values_of(self, kind: str, schema: dict[str, Any]) -> bool:
        if kind == "object":
            properties, rest = schema.get("properties", {}), schema.get("additionalProperties", {})
            return all(
                self.has_values(
                    properties.get(name, True if "patternProperties" in schema else rest)
                )
                for name in schema.get("required", ())
            )
        if kind == "array":
            min_items, first = schema.get("minItems", 0), schema.get("prefixItems", [])
            needed = [
                *first[:min_items],
                *([schema.get("items", {})] if min_items > len(first) else []),
            ]
            return all(map(self.has_values, needed))
        return True

    def pruned(self, schema: Schema) -> Schema:
        """The schema with false in place of every part that no finite value fits."""
        if not self.has_values(schema):
            return False
        if isinstance(schema, bool):
            return schema
        found: dict[str, Any] = {}
        for keyword, value in schema.items():
            if keyword in ("properties", "patternProperties"):
                found[keyword] = {name: self.pruned(inner) for name, inner in value.items()}
            elif keyword in ("anyOf", "allOf", "prefixItems"):
                kept = [self.pruned(inner) for inner in value]
                found[keyword] = [s for s in kept if s is not False or keyword != "anyOf"]
            elif keyword in ("items", "additionalProperties"):
                found[keyword] = self.pruned(value)
            elif keyword == "format" and value in FORMAT_PATTERNS:
                found["pattern"] = FORMAT_PATTERNS[value]  # no schema has both keywords
            else:
                found[keyword] = value
        return found
