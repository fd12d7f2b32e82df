"""Object keywords: which property names are allowed, and the schemas of the properties."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from compiledllm.grammars.schemas.keywords import FORMAT_PATTERNS, Schema
from compiledllm.grammars.schemas.numbers import size
from compiledllm.grammars.schemas.patterns import both, can_match, literal, matches, single
from compiledllm.grammars.schemas.references import step
from compiledllm.grammars.schemas.refusal import refuse
from compiledllm.grammars.schemas.shapes import all_of, any_of, members, values

if TYPE_CHECKING:
    from compiledllm.grammars.schemas.rewrite import Rewriter

KEYWORDS = {"properties", "required", "additionalProperties", "patternProperties", "propertyNames"}
KEYWORDS |= {"minProperties", "maxProperties", "dependentRequired", "dependentSchemas"}
KEYWORDS |= {"dependencies", "unevaluatedProperties"}
MAX_OPTIONAL = 6  # optional properties whose subsets may be listed to enforce their number
MAX_PATTERNS = 4  # patterns of names, if some overlap
_APPLICATORS = {"allOf", "anyOf", "oneOf", "if", "$ref", "dependentSchemas"}


def objects(
    rewriter: Rewriter,
    schema: Mapping[str, Any],
    at: str,
    found: dict[str, Any],
    parts: list[Schema],
) -> None:
    """Rewrite the keywords of objects. See `rewrite.Rule`."""
    if not KEYWORDS & set(schema):
        return
    shape = _Shape(rewriter, schema, at)
    shape.close_unevaluated()
    shape.merge_patterns()
    shape.restrict_names()
    shape.separate_patterns()
    counted = shape.counted()
    if len(counted) == 1:
        found |= counted[0]
    else:
        others = {"type": ["null", "boolean", "number", "string", "array"]}
        parts.append(any_of([*({"type": "object"} | option for option in counted), others]))
    parts += _dependencies(rewriter, schema, at)


class _Shape:
    """The properties of one object schema. Attributes: the rewritten values of its keywords."""

    def __init__(self, rewriter: Rewriter, schema: Mapping[str, Any], at: str) -> None:
        self._rewriter, self._schema, self._at = rewriter, schema, at
        self.properties = self._map("properties")
        self.patterns = self._map("patternProperties")
        self.required = _names(schema.get("required", []), at, "required")
        more = schema.get("additionalProperties", True)
        self.additional = rewriter.schema(more, step(at, "additionalProperties"))
        self.min_properties = size(schema, at, "minProperties") if "minProperties" in schema else 0
        self.max_properties = (
            size(schema, at, "maxProperties") if "maxProperties" in schema else None
        )

    def _map(self, keyword: str) -> dict[str, Schema]:
        given = self._schema.get(keyword, {})
        if not isinstance(given, Mapping):
            refuse(self._at, keyword, given, "must be an object of schemas")
        return {
            name: self._rewriter.schema(inner, step(self._at, keyword, name))
            for name, inner in given.items()
        }

    def close_unevaluated(self) -> None:
        """Enforce unevaluatedProperties, where it means the same as additionalProperties."""
        value = self._schema.get("unevaluatedProperties", True)
        if value in (True, {}) or "additionalProperties" in self._schema:
            return
        if value is not False or _APPLICATORS & set(self._schema):
            refuse(
                self._at,
                "unevaluatedProperties",
                value,
                "cannot be enforced here",
                "list all properties in one place and use additionalProperties",
            )
        self.additional = False

    def restrict_names(self) -> None:
        """Enforce propertyNames: list the names, or turn additional properties into a pattern."""
        given = self._schema.get("propertyNames", True)
        at = step(self._at, "propertyNames")
        names = self._rewriter.schema(given, at)
        if names is False:
            names = {"enum": []}
        few = values(names, self._rewriter.deref)
        if few is not None:
            self._allow_only([name for name in few.values() if isinstance(name, str)])
            return
        patterns = [
            pattern
            for part in members(names, self._rewriter.deref)
            for pattern in self._name_patterns(part, given)
        ]
        if not patterns:
            return
        for name in [*self.properties, *self.required]:
            if any(self._fits(pattern, name) is False for pattern in patterns):
                self.properties[name] = False
        self.patterns = {both([*patterns, p]): s for p, s in self.patterns.items()}
        if self.additional is not False:
            others = [*self._schema.get("patternProperties", {}), *map(literal, self.properties)]
            rest = both(patterns, others)
            self.patterns[rest] = self.additional
            self.additional = False

    def _allow_only(self, names: list[str]) -> None:
        for name in names:
            if name not in self.properties:
                self.properties[name] = self._beside_patterns(name)
        self.properties = {n: s if n in names else False for n, s in self.properties.items()}
        self.patterns, self.additional = {}, False

    def _name_patterns(self, part: dict[str, Any], given: Any) -> list[str]:
        found, unknown = [], set(part) - {"type", "allOf", "$ref", "pattern", "format"}
        if "pattern" in part:
            found.append(part["pattern"])
        if "minLength" in part or "maxLength" in part:
            found.append(f"^[^]{{{part.get('minLength', 0)},{part.get('maxLength', '')}}}$")
            unknown -= {"minLength", "maxLength"}
        if "format" in part:
            if part["format"] in FORMAT_PATTERNS:
                found.append(FORMAT_PATTERNS[part["format"]])
            else:
                self._rewriter.ignored.add(f"format {part['format']!r} of propertyNames")
        if unknown:
            refuse(
                step(self._at, "propertyNames"),
                "is",
                given,
                "and cannot be enforced",
                "use enum, pattern, minLength or maxLength",
            )
        return found

    def _fits(self, pattern: str, name: str) -> bool:
        found = matches(pattern, name)
        if found is None:
            refuse(self._at, "patternProperties", pattern, f"cannot be compared with '{name}'")
        return found

    def _beside_patterns(self, name: str) -> Schema:
        """The schema of an unlisted name: those of its patterns, or else additionalProperties."""
        fitting = [schema for p, schema in self.patterns.items() if self._fits(p, name)]
        return all_of(fitting) if fitting else self.additional

    def merge_patterns(self) -> None:
        """Apply the patterns to the names in `properties` and `required` as well."""
        if not self.patterns:
            return
        for name, schema in self.properties.items():
            fitting = [s for p, s in self.patterns.items() if self._fits(p, name)]
            self.properties[name] = all_of([schema, *fitting])
        for name in self.required:
            if name not in self.properties:
                self.properties[name] = self._beside_patterns(name)

    def separate_patterns(self) -> None:
        """Make the patterns exclude each other, and drop those that only match listed names."""
        if not self.patterns:
            return
        listed = list(map(literal, self.properties))
        apart = {p: s for p, s in self._apart().items() if can_match([p], listed)}
        self.patterns = {self._single(p): schema for p, schema in apart.items()}

    def _single(self, pattern: str) -> str:
        try:
            return single(pattern)
        except ValueError as error:
            refuse(self._at, "patternProperties", pattern, str(error), "write it without")

    def _apart(self) -> dict[str, Schema]:
        """The patterns, split so that no two match the same name."""
        given = self.patterns
        if not any(can_match(pair) for pair in itertools.combinations(given, 2)):
            return given
        if len(given) > MAX_PATTERNS:
            refuse(
                self._at,
                "patternProperties",
                list(given),
                f"are more than {MAX_PATTERNS} patterns that match the same names",
                "make them exclude each other",
            )
        found = {}
        for choice in itertools.product((True, False), repeat=len(given)):
            inside = [p for p, is_in in zip(given, choice, strict=True) if is_in]
            outside = [p for p in given if p not in inside]
            if inside and can_match(inside, outside):
                found[both(inside, outside)] = all_of(given[p] for p in inside)
        return found

    def counted(self) -> list[dict[str, Any]]:
        """The rewritten keywords; alternatives if the number of properties is restricted."""
        possible = [name for name, schema in self.properties.items() if schema is not False]
        optional = [name for name in possible if name not in self.required]
        is_free = bool(self.patterns) or self.additional is not False
        min_count = self.min_properties - len(self.required)
        max_count = (
            None if self.max_properties is None else self.max_properties - len(self.required)
        )
        if min_count <= 0 and (max_count is None or (not is_free and max_count >= len(optional))):
            return [self._written(self.required, ())]
        if max_count is not None and max_count < 0:
            return []
        if is_free and min_count > 1:
            refuse(
                self._at,
                "minProperties",
                self.min_properties,
                "cannot be enforced: names that are not listed may come twice",
                "list names in properties or required",
            )
        if len(optional) > MAX_OPTIONAL:
            if not is_free and min_count <= 1 and max_count is None:
                return [self._written(self.required, ()) | {"minProperties": self.min_properties}]
            refuse(
                self._at,
                "minProperties" if min_count > 0 else "maxProperties",
                self.min_properties if min_count > 0 else self.max_properties,
                f"cannot be enforced beside more than {MAX_OPTIONAL} optional properties",
                "make them required",
            )
        return self._choices(optional, min_count, max_count, is_free)

    def _choices(
        self, optional: list[str], min_count: int, max_count: int | None, is_free: bool
    ) -> list[dict[str, Any]]:
        found = []
        for count in range(len(optional) + 1):
            if (max_count is not None and count > max_count) or (not is_free and count < min_count):
                continue
            for chosen in itertools.combinations(optional, count):
                without = [name for name in optional if name not in chosen]
                option = self._written([*self.required, *chosen], without)
                if is_free and self.min_properties:
                    option["minProperties"] = self.min_properties
                if is_free and self.max_properties is not None:
                    option["maxProperties"] = self.max_properties
                found.append(option)
        return found

    def _written(self, required: list[str], without: Any) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if self.properties:
            found["properties"] = {
                n: False if n in without else s for n, s in self.properties.items()
            }
        if required:
            found["required"] = required
        if self.patterns:
            found["patternProperties"] = self.patterns
        if self.additional is not True and self.additional != {}:
            found["additionalProperties"] = self.additional
        return found


def _names(value: Any, at: str, keyword: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        refuse(at, keyword, value, "must be a list of names")
    return list(dict.fromkeys(value))


def _dependencies(rewriter: Rewriter, schema: Mapping[str, Any], at: str) -> list[Schema]:
    """Enforce dependencies: a name requires other names, or a schema."""
    found: list[Schema] = []
    for keyword in ("dependentRequired", "dependentSchemas", "dependencies"):
        given = schema.get(keyword, {})
        if not isinstance(given, Mapping):
            refuse(at, keyword, given, "must be an object")
        for name, wanted in given.items():
            inside = step(at, keyword, name)
            if isinstance(wanted, list):
                then: Schema = {"required": [name, *_names(wanted, inside, "is")]}
            else:
                then = all_of([{"required": [name]}, rewriter.schema(wanted, inside)])
            found.append(any_of([{"properties": {name: False}}, then]))
    return found
