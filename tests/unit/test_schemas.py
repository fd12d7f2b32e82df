"""JSON schemas: what others write works, what they forbid is not written, what is refused is named.

Outputs are drawn at random from what the masks allow, and validated by jsonschema.
"""

from __future__ import annotations

import datetime
import decimal
import enum
import ipaddress
import json
import pathlib
import random
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Optional, Union

import jsonschema
import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import AnyUrl, BaseModel, ConfigDict, Field, RootModel, TypeAdapter, conint, constr
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from compiledllm.grammars.library import Vocabulary, make_tokenizer
from compiledllm.grammars.matcher import error_of, initial_matcher
from compiledllm.grammars.schemas.refusal import SchemaRefused
from compiledllm.grammars.schemas.rewrite import rewrite
from compiledllm.grammars.text import Writer
from compiledllm.structured_outputs import StructuredOutputsParams

EOS = 0
MERGES = [("t", "r"), ("tr", "u"), ("tru", "e"), ("1", "2"), ("a", "b"), ('"', ":"), ("{", '"')]


def make() -> Tokenizer:
    """Bytes, and some that merge."""
    vocab = {"<eos>": EOS}
    for piece in [*sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, MERGES)]:
        vocab[piece] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab, MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    return tokenizer


TOKENIZER = make()
LIBRARY = make_tokenizer(Vocabulary(TOKENIZER.to_str(), TOKENIZER.get_vocab_size(), (EOS,)))
TEXTS = [TOKENIZER.decode([i]) for i in range(TOKENIZER.get_vocab_size())]
CLOSING = [TEXTS.index(text) for text in ('"', "}", "]")]


def start(schema: Any) -> Any:
    form = StructuredOutputsParams(json=schema, disable_any_whitespace=True)
    return initial_matcher(Writer(LIBRARY).text_of(form), LIBRARY)


def allows(schema: Any, value: Any) -> bool:
    """Whether a JSON text, or a value's, is an output."""
    text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
    token_ids = LIBRARY.tokenize_str(text)
    matcher = start(schema)
    return matcher.try_consume_tokens(token_ids) == len(token_ids) and matcher.is_accepting()


def write(first: Any, seed: int, most: int = 300) -> str | None:
    """An output; those that close soon are likelier. None if it did not end."""
    matcher, draw, output = first.deep_copy(), random.Random(seed), []
    haste = draw.choice([0.2, 0.5, 0.9])
    for _ in range(most):
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        assert not matcher.is_error(), (TOKENIZER.decode(output), error_of(matcher))
        assert mask, TOKENIZER.decode(output)
        choices = [i for i in range(mask.bit_length()) if mask >> i & 1]
        closing = [i for i in CLOSING if i in choices]
        if EOS in choices and (len(choices) == 1 or draw.random() < haste):
            return str(TOKENIZER.decode(output))
        readable = [i for i in choices if TEXTS[i].isascii() and i != EOS]
        hurry = closing if closing and draw.random() < haste else readable
        output.append(draw.choice(hurry or choices))
        if output[-1] == EOS:
            return str(TOKENIZER.decode(output[:-1]))
        assert matcher.consume_token(output[-1])
    return None


def outputs(schema: Any, count: int = 8) -> Iterator[str]:
    first = start(schema)
    found = (write(first, seed) for seed in range(count))
    yield from (text for text in found if text is not None)


def check(schema: Any, count: int = 8) -> int:
    """How many outputs ended; all of those fit the schema."""
    kind = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
    validator, ended = kind(schema, format_checker=kind.FORMAT_CHECKER), 0
    for text in outputs(schema, count):
        validator.validate(json.loads(text))
        ended += 1
    return ended


# -- pydantic --------------------------------------------------------------------------------------


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Cat(BaseModel):
    kind: Literal["cat"] = "cat"
    lives: int = 9


class Dog(BaseModel):
    kind: Literal["dog"] = "dog"
    barks: bool = True


class Fish(BaseModel):
    kind: Literal["fish"]
    name: constr(max_length=3)  # type: ignore[valid-type]


class LandPet(RootModel[Any]):
    root: Annotated[Union[Cat, Dog], Field(discriminator="kind")]  # noqa: UP007


class Node(BaseModel):
    value: int
    children: list[Node] = []


class Sum(BaseModel):
    op: Literal["sum"] = "sum"
    of: list[Annotated[Sum | Leaf, Field(discriminator="op")]] = Field(max_length=2)


class Leaf(BaseModel):
    op: Literal["leaf"] = "leaf"
    value: bool


class Linked(BaseModel):
    next: Linked | None = None


class Closed(BaseModel):
    model_config = ConfigDict(extra="forbid")
    a: int
    b: Optional[Literal["x"]] = None  # noqa: UP045


class Open(BaseModel):
    model_config = ConfigDict(extra="allow")
    a: int


class Named(BaseModel):
    x: int = Field(alias="theX", description="d", examples=[1], json_schema_extra={"x-order": 1})
    y: Colour = Field(Colour.RED, title="T", deprecated=True)


class Pair(NamedTuple):
    a: int
    b: bool = True


SHORT = constr(max_length=3)
PYDANTIC: dict[str, Any] = {
    "optional": Optional[SHORT],  # noqa: UP045
    "union": Union[bool, SHORT, None],  # noqa: UP007
    "literal": Literal["a", 1, True, None],
    "enum": Colour,
    "dict": dict[str, int],
    "dict_of_literals": dict[Literal["a", "b"], int],
    "dict_of_enums": dict[Colour, bool],
    "dict_of_patterns": dict[constr(pattern="^[a-z]{1,3}$"), int],
    "dict_of_short_names": dict[constr(min_length=1, max_length=2), bool],
    "dict_of_uuids": dict[uuid.UUID, bool],
    "filled_dict": Annotated[dict[str, int], Field(min_length=1)],
    "list": list[SHORT],
    "set_of_literals": set[Literal["a", "b", "c"]],
    "frozenset_of_enums": frozenset[Colour],
    "tuple": tuple[int, SHORT],
    "long_tuple": tuple[bool, ...],
    "empty_tuple": tuple[()],
    "any": Any,
    "bare_list": list,
    "bare_dict": dict,
    "constr": constr(min_length=1, max_length=4, pattern=r"^[a-z]+$"),
    "conint": conint(gt=0, lt=10),
    "int64": conint(ge=-(2**63), le=2**63 - 1),
    "confloat": pydantic.confloat(ge=0.5, le=2.5),
    "multiple": conint(multiple_of=7, ge=0, le=70),
    "decimal": decimal.Decimal,
    "condecimal": pydantic.condecimal(max_digits=6, decimal_places=2),
    "datetime": datetime.datetime,
    "date": datetime.date,
    "time": datetime.time,
    "timedelta": datetime.timedelta,
    "uuid": uuid.UUID,
    "uuid4": pydantic.UUID4,
    "secret": pydantic.SecretStr,
    "path": pathlib.Path,
    "bytes": bytes,
    "url": AnyUrl,
    "ipv4": ipaddress.IPv4Address,
    "ipv6": ipaddress.IPv6Address,
    "network": ipaddress.IPv4Network,
    "json": pydantic.Json[list[int]],
    "json_value": pydantic.JsonValue,
    "base64": pydantic.Base64Bytes,
    "discriminated": Annotated[Union[Cat, Dog, Fish], Field(discriminator="kind")],  # noqa: UP007
    "discriminated_twice": Annotated[Union[LandPet, Fish], Field(discriminator="kind")],  # noqa: UP007
    "union_of_models": Union[Cat, Dog],  # noqa: UP007
    "recursive": Node,
    "recursive_discriminated": Sum,
    "linked": Linked,
    "closed": Closed,
    "open": Open,
    "named": Named,
    "pair": Pair,
    "root": RootModel[list[bool]],
}
PARSED = ("datetime", "date", "time", "uuid", "uuid4", "ipv4", "ipv6", "discriminated", "closed")
PARSED += ("dict_of_uuids", "recursive_discriminated", "set_of_literals", "int64", "tuple", "named")


@pytest.mark.parametrize("name", PYDANTIC)
def test_schemas_of_pydantic(name: str) -> None:
    adapter = TypeAdapter(PYDANTIC[name])
    schemas = [adapter.json_schema(mode=m) for m in ("validation", "serialization")]
    for schema in schemas[: 1 + (schemas[0] != schemas[1])]:
        assert check(schema)
    if name in PARSED:
        for text in outputs(schemas[0]):
            adapter.validate_json(text)


# -- zod, and others -------------------------------------------------------------------------------

ZOD = json.loads((Path(__file__).parent / "zod_schemas.json").read_text())


def test_schemas_of_zod() -> None:
    """Of zod 4.6's toJSONSchema, for drafts 2020-12, 7 and 4."""
    ended = {name: check(schema, 4) for name, schema in ZOD.items()}
    assert sum(count > 0 for count in ended.values()) > 0.9 * len(ended)


def tool(parameters: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": parameters, "required": list(parameters)}


DRAFT_7 = "http://json-schema.org/draft-07/schema#"
STRICT = {"additionalProperties": False}
OTHERS: dict[str, Any] = {
    "openai_strict": tool({"city": {"type": ["string", "null"], "maxLength": 3}}) | STRICT,
    "mcp": tool({"path": {"type": "string", "format": "path", "maxLength": 4}})
    | {"$schema": DRAFT_7, "title": "read", "x-order": ["path"]},
    "zod_3": {"$ref": "#/definitions/a", "definitions": {"a": tool({"n": {"type": "integer"}})}},
    "by_path": tool({"a": {"enum": ["x"]}, "b": {"$ref": "#/properties/a"}}),
    "by_anchor": {"$ref": "#n", "$defs": {"m": {"$anchor": "n", "type": "boolean"}}},
    "by_id": {
        "$id": "https://a.b/c.json",
        "$ref": "d.json#/$defs/e",
        "$defs": {"f": {"$id": "d.json", "$defs": {"e": {"$ref": "#g"}, "h": {"$anchor": "g"}}}},
    },
    "by_escapes": {"$ref": "#/$defs/a~1b%25", "$defs": {"a/b%": {"const": 1}}},
    "dynamic": {
        "$dynamicAnchor": "node",
        "type": "object",
        "properties": {"next": {"$dynamicRef": "#node"}},
        **STRICT,
    },
    "old_tuple": {"$schema": DRAFT_7, "type": "array", "minItems": 2, "items": [{"const": 1}, {}]}
    | {"additionalItems": False},
    "all_of_ref": {"allOf": [{"$ref": "#/$defs/a"}], "$defs": {"a": {"type": "null"}}},
    "merged": {"allOf": [tool({"a": {"type": "null"}}), tool({"b": {"type": "null"}})]},
    "either_name": {"type": "object", "properties": {"a": {"const": 1}, "b": {"const": 2}}}
    | {"oneOf": [{"required": ["a"]}, {"required": ["b"]}], **STRICT},
    "conditional": {"type": "object", "properties": {"k": {"enum": ["x", "y"]}, "v": {}}, **STRICT}
    | {"if": {"properties": {"k": {"const": "x"}}, "required": ["k"]}, "then": {"required": ["v"]}},
}


@pytest.mark.parametrize("name", OTHERS)
def test_schemas_of_others(name: str) -> None:
    schema = OTHERS[name]
    if name == "by_id":  # jsonschema resolves "d.json" elsewhere
        assert list(outputs(schema, 3))
    else:
        assert check(schema)


@pytest.mark.parametrize("draft", ["draft-04", "draft-06", "draft-07", "draft/2019-09"])
def test_any_spelling_of_a_draft_is_taken(draft: str) -> None:
    for scheme in ("http", "https"):
        for end in ("", "#"):
            address = f"{scheme}://json-schema.org/{draft}/schema{end}"
            assert allows({"$schema": address, "type": "null"}, None)
    assert allows({"$schema": "http://json-schema.org/schema#", "type": "null"}, None)
    assert allows({"$schema": "https://example.com/mine", "type": "null"}, None)


# -- every keyword, one by one ---------------------------------------------------------------------

KEYS: list[tuple[dict[str, Any], list[Any], list[Any]]] = [
    ({"type": "integer"}, [3, -1], [1.5, "a", None]),
    ({"type": ["string", "null"]}, ['"a"', None], [1]),
    ({"const": {"a": [1]}}, [{"a": [1]}], [{"a": [2]}, {}]),
    ({"enum": ["a", 1]}, ['"a"', 1], ['"b"', 2]),
    ({"type": "string", "minLength": 2}, ['"ab"'], ['"a"']),
    ({"type": "string", "maxLength": 1}, ['"a"', '"é"'], ['"ab"']),
    ({"type": "string", "pattern": "b$"}, ['"ab"'], ['"ba"']),
    ({"type": "string", "pattern": "^(?!a)[[&]"}, ['"["', '"&x"'], ['"a["', '"b"']),
    ({"type": "string", "pattern": "^(?=.*1)a.+$"}, ['"a1"', '"ab1"'], ['"ab"', '"1"']),
    ({"type": "string", "format": "date"}, ['"2024-02-29"'], ['"2023-02-29"', '"2023-13-01"']),
    ({"type": "number", "minimum": 1.5}, [1.5, 2], [1]),
    ({"type": "number", "maximum": 3}, [3], [4]),
    ({"type": "integer", "exclusiveMinimum": 3}, [4], [3]),
    ({"type": "integer", "minimum": 3, "exclusiveMinimum": True}, [4], [3]),
    ({"type": "integer", "maximum": 3, "exclusiveMaximum": True}, [2], [3]),
    ({"type": "integer", "maximum": 3, "exclusiveMaximum": False}, [3], [4]),
    ({"type": "integer", "multipleOf": 3}, [6, 0], [7]),
    ({"type": "integer", "maximum": 2**63 - 1}, [2**62], [2**63]),
    ({"items": {"const": 1}, "type": "array"}, [[], [1, 1]], [[2]]),
    ({"prefixItems": [{"const": 1}], "items": False, "type": "array"}, [[1], []], [[2], [1, 1]]),
    ({"items": [{"const": 1}], "additionalItems": {"const": 2}}, [[1, 2]], [[1, 1]]),
    ({"type": "array", "items": {}, "minItems": 1}, [[1]], [[]]),
    ({"type": "array", "items": {}, "maxItems": 1}, [[1]], [[1, 1]]),
    ({"items": {"enum": [1, 2]}, "uniqueItems": True, "type": "array"}, [[2, 1], []], [[1, 1]]),
    ({"type": "array", "contains": {}}, [[1]], [[]]),
    ({"type": "array", "contains": {"const": 1}, "minContains": 0}, [[], [2]], [1]),
    ({"type": "array", "prefixItems": [{}], "unevaluatedItems": False}, [[1]], [[1, 1]]),
    ({"type": "object", "properties": {"a": {"const": 1}}}, [{}, {"a": 1}, {"b": 2}], [{"a": 2}]),
    ({"type": "object", "required": ["a"]}, [{"a": 1}], [{}, {"b": 1}]),
    ({"type": "object", "additionalProperties": {"const": 1}}, [{"a": 1}], [{"a": 2}]),
    ({"type": "object", "properties": {"a": {}}, **STRICT}, [{}, {"a": 1}], [{"b": 1}]),
    ({"type": "object", "patternProperties": {"^a": {"const": 1}}}, [{"ab": 1}, {}], [{"ab": 2}]),
    ({"type": "object", "propertyNames": {"pattern": "^a"}}, [{"ab": 1}], [{"b": 1}]),
    ({"type": "object", "propertyNames": {"maxLength": 1}}, [{"b": 1}], [{"ab": 1}]),
    ({"type": "object", "propertyNames": {"enum": ["a"]}}, [{"a": 1}], [{"b": 1}]),
    ({"type": "object", "propertyNames": {"type": "string"}}, [{"a": 1}], [1]),
    ({"type": "object", "minProperties": 1}, [{"a": 1}], [{}]),
    ({"type": "object", "maxProperties": 1}, [{"a": 1}], [{"a": 1, "b": 1}]),
    (tool({"a": {}, "b": {}}) | {"required": [], "minProperties": 1, **STRICT}, [{"b": 1}], [{}]),
    ({"type": "object", "properties": {"a": {}, "b": {}}, "dependentRequired": {"a": ["b"]}},)
    + ([{"b": 1}, {"a": 1, "b": 1}], [{"a": 1}]),
    ({"type": "object", "dependentSchemas": {"a": {"required": ["b"]}}}, [{"b": 1}], [{"a": 1}]),
    ({"type": "object", "dependencies": {"a": ["b"]}}, [{}], [{"a": 1}]),
    ({"type": "object", "properties": {"a": {}}, "unevaluatedProperties": False}, [{}], [{"b": 1}]),
    ({"allOf": [{"type": "integer"}, {"minimum": 3}]}, [3], [2]),
    ({"anyOf": [{"const": 1}, {"const": 2}]}, [1, 2], [3]),
    ({"oneOf": [{"minimum": 2, "type": "number"}, {"maximum": 3, "type": "number"}]}, [4, 1], [2]),
    ({"not": {"type": "string"}}, [1], ['"a"']),
    ({"type": "string", "not": {"enum": ["a", "b"]}}, ['"c"', '"ab"'], ['"a"', '"b"']),
    ({"if": {"type": "number"}, "then": {"minimum": 3}, "else": {"type": "null"}}, [3], [2]),
    ({"$ref": "#/$defs/a", "$defs": {"a": {"const": 1}}}, [1], [2]),
    ({"$ref": "#/$defs/a", "minimum": 3, "$defs": {"a": {"type": "integer"}}}, [3], [2]),
    ({"type": "string", "nullable": True, "maxLength": 1}, ['"a"', None], ['"ab"']),
]


@pytest.mark.parametrize(("schema", "good", "bad"), KEYS, ids=[str(k[0])[:50] for k in KEYS])
def test_every_keyword_is_enforced(schema: dict[str, Any], good: list[Any], bad: list[Any]) -> None:
    for value in good:
        assert allows(schema, value), value
    for value in bad:
        assert not allows(schema, value), value


def test_a_name_does_not_come_again_in_other_letters() -> None:
    schema = {"type": "object", "properties": {"a": {"const": 1}}, "additionalProperties": {}}
    assert allows(schema, '{"a":1,"b":2}')
    assert not allows(schema, '{"a":1,"\\u0061":2}')


def test_what_only_annotates_is_left_out_and_what_nobody_knows_is_named() -> None:
    notes = {"title": "t", "description": "d", "default": 1, "examples": [2], "deprecated": True}
    notes |= {"readOnly": True, "$comment": "c", "contentEncoding": "base64", "example": 3}
    notes |= {"discriminator": {"propertyName": "a"}, "externalDocs": {}, "xml": {}, "$id": "x:y"}
    found = rewrite({"type": "null", "uniqueItems": False} | notes)
    assert found.schema == {"type": "null"} and not found.ignored
    found = rewrite({"type": "string", "format": "color", "x-order": 1, "errorMessage": "no"})
    assert found.schema == {"type": "string"}
    assert found.ignored == ("format 'color'", "keyword 'errorMessage'", "keyword 'x-order'")


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"items": {"type": "string"}, "uniqueItems": True}, "at #: uniqueItems true .* enum"),
        (tool({"a": {"contains": {"const": 1}}}), "at #/properties/a: contains .* give items"),
        ({"anyOf": [{"not": {"multipleOf": 2}}]}, "at #/anyOf/0: not .*opposite of multipleOf"),
        ({"oneOf": [{"multipleOf": 2}, {"multipleOf": 3}]}, "oneOf .*use anyOf"),
        ({"$ref": "other.json"}, 'at #: .ref "other.json" leads to nothing .*; put its target'),
        ({"$ref": "#/$defs/a"}, "leads to nothing"),
        ({"type": "text"}, 'at #: type "text" must be one of null, boolean'),
        ({"type": "string", "pattern": r"a\b"}, "a word boundary, which cannot be enforced"),
        ({"type": "string", "pattern": r"(a)\1"}, "a back reference"),
        ({"type": "string", "pattern": "(?<=a)b"}, "look-behind"),
        ({"type": "string", "pattern": "("}, "without its"),
        ({"const": 2**53 + 1}, "beyond 9007199254740992; give it as a string"),
        ({"minLength": -1}, "minLength -1 must be an integer from 0"),
        ({"required": "a"}, 'required "a" must be a list of names'),
        ({"minProperties": 2}, "may come twice"),
        ({"allOf": [{}], "unevaluatedProperties": False}, "unevaluatedProperties false"),
        (tool({f"p{i}": {} for i in range(9)}) | {"required": [], "minProperties": 2, **STRICT},)
        + ("more than 6 optional properties; make them required",),
        ({"enum": 3}, "enum 3 must be a list"),
        ({"properties": [1]}, r"properties \[1\] must be an object"),
        ({"items": 3}, "at #/items: is 3 and a schema is an object"),
        ({"anyOf": []}, "anyOf .* must be a list of 1 to"),
    ],
)
def test_what_cannot_be_had_is_refused_by_its_place(schema: Any, message: str) -> None:
    with pytest.raises(SchemaRefused, match=message):
        rewrite(schema)


LIST = {"type": "object", "properties": {"next": {"$ref": "#/$defs/a"}}, "required": ["next"]}
DEAD: list[Any] = [
    {"$ref": "#"},
    {"$ref": "#/$defs/a", "$defs": {"a": LIST}},
    {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
    {"type": "array", "minItems": 1, "items": {"$ref": "#"}},
    {"enum": []},
    {"not": {}},
    {"type": "string", "minLength": 3, "maxLength": 2},
    {"type": "integer", "minimum": 3, "maximum": 2},
    {"type": "integer", "exclusiveMinimum": 3, "exclusiveMaximum": 4},
    {"type": "array", "minItems": 2, "maxItems": 1, "items": {}},
    {"type": "array", "minItems": 2, "prefixItems": [{}], "items": False},
    {"type": "object", "required": ["a"], "properties": {"a": False}},
    {"type": "object", "required": ["a"], **STRICT},
    {"type": "object", "required": ["a"], "propertyNames": {"pattern": "^b"}},
    {"type": "string", "pattern": "^a$", "allOf": [{"pattern": "^b$"}]},
    {"type": "string", "pattern": "a^"},
    {"allOf": [{"type": "string"}, {"type": "null"}]},
    {"const": "a", "type": "integer"},
    {"type": "object", "minProperties": 2, "maxProperties": 1},
]


@pytest.mark.parametrize("schema", DEAD, ids=str)
def test_what_nothing_fits_is_refused_when_it_is_made(schema: Any) -> None:
    with pytest.raises(ValueError, match="structured_outputs") as caught:
        start(schema)
    assert "NoExtension" not in str(caught.value) and "verbose" not in str(caught.value)


def test_options_without_an_end_are_left_out() -> None:
    """A choice, a property or an item that cannot be completed is never begun."""
    schema = {
        "$defs": {"a": LIST},
        "type": "object",
        "properties": {"a": {"$ref": "#/$defs/a"}, "b": {"anyOf": [{"$ref": "#/$defs/a"}, {}]}},
        "patternProperties": {"^b$": {"type": "null"}, "^c$": {"$ref": "#/$defs/a"}},
        **STRICT,
    }
    assert set(outputs(schema, 20)) == {"{}", '{"b":null}'}
    assert set(
        outputs({"type": "array", "items": {"$ref": "#/$defs/a"}, "$defs": {"a": LIST}})
    ) == {"[]"}


def test_patterns_of_names_lead_to_no_dead_end() -> None:
    digit = {"type": "integer", "minimum": 0, "maximum": 9}
    closed = {"type": "object", "properties": {"a": digit}, **STRICT}
    for more in ({"required": ["a"]}, {}):
        for pattern in ("^a$", "^[ab]$", "^a"):
            assert check(closed | more | {"patternProperties": {pattern: {"minimum": 5}}}, 20)


# -- at random -------------------------------------------------------------------------------------


def random_schema(draw: random.Random, depth: int = 0) -> dict[str, Any]:
    simple = ["number", "string", "enum", "type"]
    nested = ["object", "object", "array", "union", "tagged", "not", "ref"]
    kind = draw.choice(simple + nested * (depth < 3))

    def inner() -> dict[str, Any]:
        return random_schema(draw, depth + 1)

    def some(**options: Any) -> dict[str, Any]:
        return {name: value for name, value in options.items() if draw.random() < 0.3}

    if kind == "number":
        more = some(minimum=draw.randint(-5, 5), maximum=draw.choice([6, 7.5]), multipleOf=0.5)
        return {"type": draw.choice(["integer", "number"])} | more
    if kind == "string":
        pattern = draw.choice(["^a", "b$", "^(?!b)[ab]*$", "a|^b$", "^(?=.*a)[ab]+$"])
        return {"type": "string"} | some(minLength=1, maxLength=3, pattern=pattern)
    if kind == "enum":
        values = ["a", 1, None, True, 'q"', 1.5, [1], {"a": 1}, "é"]
        return {"enum": draw.sample(values, draw.randint(1, 4))}
    if kind == "object":
        names = draw.sample(["a", "b", "ab", "c"], draw.randint(0, 3))
        fixed = {"type": "object", "properties": {name: inner() for name in names}}
        fixed["required"] = [name for name in names if draw.random() < 0.4]
        return fixed | some(
            additionalProperties=draw.choice([False, {"type": "null"}]),
            patternProperties={draw.choice(["^a", "b$"]): inner(), "x": inner()},
            propertyNames=draw.choice([{"enum": ["a", "b"]}, {"pattern": "^[a-d]+$"}]),
            minProperties=draw.randint(0, 1),
            maxProperties=draw.randint(0, 3),
            dependentRequired={"a": ["b"]},
        )
    if kind == "array":
        items = {"items": inner(), "maxItems": 2} | some(prefixItems=[inner()], uniqueItems=True)
        return {"type": "array"} | items | some(minItems=1)
    if kind == "union":
        keyword = draw.choice(["anyOf", "oneOf", "allOf"])
        return {keyword: [inner() for _ in range(draw.randint(1, 3))]}
    if kind == "tagged":
        tags = [{"properties": {"k": {"const": c}, "v": inner()}} for c in "xy"]
        return {"type": "object", "oneOf": [tag | {"type": "object"} for tag in tags]}
    if kind == "not":
        unwanted = [{"type": "string"}, {"required": ["a"]}, {"enum": [1, "a"]}, {"pattern": "^a"}]
        return inner() | {"not": draw.choice(unwanted)}
    if kind == "ref":
        return {"$ref": f"#/$defs/{draw.choice('AB')}"}
    return {"type": draw.choice(["null", "boolean", ["integer", "null"]])}


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.integers(0, 10**6))
def test_random_schemas_are_kept_or_refused(seed: int) -> None:
    draw = random.Random(seed)
    schema = random_schema(draw)
    schema |= {"$defs": {"A": random_schema(draw, 2), "B": random_schema(draw, 1)}}
    try:
        check(schema, 4)
    except ValueError as error:
        assert str(error).startswith("structured_outputs"), error
