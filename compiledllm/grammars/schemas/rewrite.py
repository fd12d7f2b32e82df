"""Rewrites JSON schemas for llguidance: the same values, in the keywords that llguidance supports.

`rewrite(schema) -> Rewritten`. Annotations are left out. Unsupported keywords are expressed by
others where possible (oneOf with exclusive branches, not, if, propertyNames, nullable, tuples of
old drafts, patterns with look-ahead) and refused with their pointer otherwise. The result never
allows a value that the schema forbids. References become names in one flat "$defs".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from compiledllm.grammars.schemas import arrays, numbers, objects, unions
from compiledllm.grammars.schemas.keywords import (
    ANNOTATIONS,
    FORMAT_PATTERNS,
    FORMATS,
    KINDS,
    QUALIFIERS,
    TYPES,
    Schema,
)
from compiledllm.grammars.schemas.patterns import conjuncts
from compiledllm.grammars.schemas.references import References, step
from compiledllm.grammars.schemas.refusal import refuse
from compiledllm.grammars.schemas.shapes import all_of, any_of
from compiledllm.grammars.schemas.viability import without_dead_ends

MAX_SCHEMAS = 20_000  # inside one schema, including those that rewriting adds
MAX_DEPTH = 200  # of nested references
_LENGTHS = ("minLength", "maxLength")


@dataclass(frozen=True, slots=True)
class Rewritten:
    """schema: for llguidance. ignored: unknown keywords and formats that were left out."""

    schema: Schema
    ignored: tuple[str, ...]


def rewrite(schema: Any) -> Rewritten:
    """Rewrite a schema. Raises ValueError with pointer, keyword, value and a way out."""
    rewriter = Rewriter(schema)
    root = rewriter.schema(schema, "#")
    rewriter.finish()
    return Rewritten(
        without_dead_ends(root, rewriter.definitions, rewriter.pointers),
        tuple(sorted(rewriter.ignored)),
    )


class Rewriter:
    """Rewrites one schema.

    definitions: name -> rewritten schema, for "$defs". pointers: name -> the pointer of the
    original. ignored: unknown keywords and formats that were left out.
    """

    def __init__(self, root: Any) -> None:
        self._references = References(root)
        self._names: dict[str, str] = {}  # pointer -> name of the definition
        self._waiting: list[str] = []  # names of definitions to rewrite
        self._open: set[str] = set()  # names of definitions that are being rewritten
        self._choices: list[tuple[dict[str, Any], str]] = []  # (schema with a oneOf, its pointer)
        self._count = 0
        self.definitions: dict[str, Schema] = {}
        self.pointers: dict[str, str] = {}
        self.ignored: set[str] = set()
        self._rules: dict[str, Rule] = {
            "string": Rewriter._strings,
            "number": numbers.bounds,
            "array": arrays.arrays,
            "object": objects.objects,
        }

    def schema(self, schema: Any, at: str) -> Schema:
        """Rewrite a schema. at: its JSON pointer."""
        self.count(at)
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, Mapping):
            refuse(at, "is", schema, "and a schema is an object or a boolean")
        found: dict[str, Any] = {}
        parts: list[Schema] = []  # schemas that must hold as well
        self._types(schema, at, found)
        for kind, rule in self._rules.items():
            if kind in _kinds(found):
                rule(self, schema, at, found, parts)
        if "const" in schema:
            found["const"] = numbers.exact(schema["const"], at, "const")
        if "enum" in schema:
            parts.append(_enum(schema["enum"], at))
        if "$ref" in schema or "$dynamicRef" in schema or "$recursiveRef" in schema:
            parts.append(self._reference(schema, at))
        unions.combine(self, schema, at, parts)
        self._ignore(schema, at)
        whole = all_of([found, *parts] if found else parts)
        return any_of([whole, {"type": "null"}]) if schema.get("nullable") is True else whole

    def count(self, at: str, number: int = 1) -> None:
        """Count schemas that rewriting makes; refuse a schema that makes too many."""
        self._count += number
        if self._count > MAX_SCHEMAS:
            refuse(at, "makes", f"more than {MAX_SCHEMAS} schemas", "make it simpler")

    def one_of(self, branches: list[Schema], at: str) -> Schema:
        """A oneOf that `finish` rewrites later, as a branch may refer to an open definition."""
        choice: dict[str, Any] = {"oneOf": branches}
        self._choices.append((choice, at))
        return choice

    def finish(self) -> None:
        """Rewrite the definitions that are referred to, and then the oneOf schemas."""
        while self._waiting:
            self._define(self._waiting.pop())
        for choice, at in self._choices:  # the list grows in the loop
            found = unions.exclusive(self, choice.pop("oneOf"), at)
            choice |= found if isinstance(found, dict) else {} if found else {"anyOf": []}

    def deref(self, schema: Schema) -> Schema:
        """The definition that a reference names, {} if unknown; any other schema unchanged."""
        for _ in range(MAX_DEPTH):
            if not isinstance(schema, dict) or set(schema) != {"$ref"}:
                return schema
            name = schema["$ref"].removeprefix("#/$defs/")
            self._define(name)
            if name not in self.definitions:  # still being rewritten: nothing is known yet
                return {}
            schema = self.definitions[name]
        return {}

    def define(self, schema: Schema, at: str, name: str) -> Schema:
        """Add a definition that rewriting made, and return a reference to it."""
        self.definitions.setdefault(name, schema)
        self.pointers.setdefault(name, at)
        return {"$ref": f"#/$defs/{name}"}

    def _define(self, name: str) -> None:
        if name in self.definitions or name in self._open:
            return
        if len(self._open) > MAX_DEPTH:
            refuse(self.pointers[name], "is", "a reference", f"more than {MAX_DEPTH} deep")
        self._open.add(name)
        at = self.pointers[name]
        self.definitions[name] = self.schema(self._references.at(at), at)
        self._open.discard(name)

    def _reference(self, schema: Mapping[str, Any], at: str) -> Schema:
        pointer = self._references.pointer(schema, at)
        if pointer not in self._names:
            name = self._names[pointer] = f"d{len(self._names)}"
            self.pointers[name] = pointer
            self._waiting.append(name)
        return {"$ref": f"#/$defs/{self._names[pointer]}"}

    def _types(self, schema: Mapping[str, Any], at: str, found: dict[str, Any]) -> None:
        if "type" not in schema:
            return
        given = schema["type"]
        types = [given] if isinstance(given, str) else given
        if not isinstance(types, list) or not types or not all(t in TYPES for t in types):
            refuse(at, "type", given, f"must be one of {', '.join(TYPES)}, or a list of them")
        found["type"] = types[0] if len(types) == 1 else list(dict.fromkeys(types))

    def _strings(
        self,
        schema: Mapping[str, Any],
        at: str,
        found: dict[str, Any],
        parts: list[Schema],
    ) -> None:
        for name in _LENGTHS:
            if name in schema:
                found[name] = numbers.size(schema, at, name)
        if "pattern" in schema:
            found["pattern"], *more = self.patterns(schema["pattern"], at)
            parts += [{"pattern": pattern} for pattern in more]
        if "format" in schema:
            self._format(schema["format"], at, parts)

    def patterns(self, pattern: Any, at: str, name: str = "pattern") -> list[str]:
        if not isinstance(pattern, str):
            refuse(at, name, pattern, "must be a regular expression")
        try:
            return conjuncts(pattern)
        except ValueError as error:
            refuse(at, name, pattern, str(error), "write it without")

    def _format(self, name: Any, at: str, parts: list[Schema]) -> None:
        """Keep a known format. Others are annotations (JSON Schema 2020-12, Validation, 7.2.1)."""
        if name in FORMATS or name in FORMAT_PATTERNS:
            parts.append({"format": name})
        else:
            self.ignored.add(f"format {name!r:.60}")

    def _ignore(self, schema: Mapping[str, Any], at: str) -> None:
        for name in schema:
            if name not in KNOWN and name not in ANNOTATIONS:
                self.ignored.add(f"keyword {name!r:.60}")


KNOWN = QUALIFIERS | {"type", "const", "enum", "$ref", "$dynamicRef", "$recursiveRef"}
KNOWN |= {"minLength", "maxLength", "pattern", "format"}
for _module in (numbers, arrays, objects, unions):
    KNOWN |= _module.KEYWORDS

# (rewriter, schema, at, found, parts): rewrites the keywords for one type of values. Adds rewritten
# keywords to `found`, and further schemas that must hold to `parts`. at: the schema's pointer.
Rule = Callable[[Rewriter, Mapping[str, Any], str, dict[str, Any], list[Schema]], None]


def _kinds(found: dict[str, Any]) -> set[str]:
    """The types that a rewritten schema allows; keywords for other types have no effect."""
    types = found.get("type", KINDS)
    return {
        "number" if t == "integer" else t for t in ([types] if isinstance(types, str) else types)
    }


def _enum(values: Any, at: str) -> Schema:
    if not isinstance(values, list):
        refuse(at, "enum", values, "must be a list of values")
    inside = step(at, "enum")
    found = [numbers.exact(value, inside, str(i)) for i, value in enumerate(values)]
    return {"enum": found} if found else False
