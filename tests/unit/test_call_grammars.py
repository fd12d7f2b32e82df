"""Grammars of tool calls: random answers that they allow are read as calls that fit the schemas."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import jsonschema
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from compiledllm import StructuredOutputsParams
from compiledllm.grammars.library import Vocabulary, make_tokenizer
from compiledllm.grammars.matcher import initial_matcher
from compiledllm.grammars.text import Writer
from compiledllm.server.openai.answer_parser import AnswerParser
from compiledllm.server.openai.call_grammars import answer_rule, call_grammar, json_in_channels
from compiledllm.server.openai.format_markers import markers_of, tags_of
from compiledllm.server.openai.reasoning_formats import CHANNELS, Reasoning
from compiledllm.server.openai.tag_reader import TagReader
from compiledllm.server.openai.tool_formats import FORMATS, ROWS, ToolFormat
from compiledllm.structured_outputs import MAX_BYTES

EOS = "<eos>"
NUM_PLAIN = 257  # tokens that are not markers
CLOSED = {"type": "object", "additionalProperties": False}
SCHEMAS: dict[str, Any] = {
    "all": CLOSED
    | {
        "properties": {
            "free": {"type": "string"},
            "unit": {"$ref": "#/$defs/Unit"},
            "number": {"type": "integer", "minimum": -5, "maximum": 20},
            "code": {"type": "string", "minLength": 2, "maxLength": 3},
            "mixed": {"enum": [1, "x", None, "y z"]},
            "flag": {"type": ["boolean", "null"]},
            "either": {"anyOf": [{"type": "string"}, {"type": "integer"}]},
            "text": {"type": ["string", "null"]},
            "maybe": {"anyOf": [{"$ref": "#/$defs/Unit"}, {"type": "null"}]},
            "list": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 2},
            "point": CLOSED
            | {"properties": {"x": {"type": "integer"}, "n": {"const": "é"}}, "required": ["x"]},
        },
        "required": ["unit", "number", "mixed"],
        "$defs": {"Unit": {"type": "string", "enum": ["c", "f"]}},
    },
    "none-1": CLOSED | {"properties": {}},
    "bare": None,
    "map": {"type": "object", "additionalProperties": {"type": "integer", "maximum": 9}},
    "free_list": CLOSED
    | {"properties": {"a": {"type": "array", "maxItems": 1}}, "required": ["a"]},
}
NODE = CLOSED | {
    "properties": {
        "value": {"type": "integer", "maximum": 9},
        "next": {"anyOf": [{"$ref": "#/$defs/Node"}, {"type": "null"}]},
    },
    "required": ["value", "next"],
}
SCHEMAS["tree"] = CLOSED | {
    "properties": {"root": {"$ref": "#/$defs/Node"}, "all": {"type": "array", "maxItems": 0}},
    "required": ["root"],
    "$defs": {"Node": NODE},
}
SCHEMAS["node"] = {"$ref": "#/$defs/Node", "$defs": {"Node": NODE}}
TOOLS = [{"name": name, "parameters": schema} for name, schema in SCHEMAS.items()]
IDS = [row.names[0] + ("_args" if "[ARGS]" in row.marks else "") for row in ROWS]


def markers(row: ToolFormat) -> list[str]:
    found = markers_of(row)
    channels = ["<|message|>", "<|end|>", "<|start|>"] if row.syntax == "channels" else []
    return [*found.openers, *found.closers, *found.inner, *channels, '<|"|>']


@cache
def tokenizer_of(row: ToolFormat, has_markers: bool) -> tuple[Tokenizer, Any]:
    """All bytes are tokens; so are the format's markers, half of them as special ones."""
    vocab = {EOS: 0}
    for piece in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[piece] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([EOS])
    if has_markers:
        single = [text for text in dict.fromkeys(markers(row)) if text.endswith((">", "]"))]
        tokenizer.add_tokens([AddedToken(text) for text in single[::2]])
        tokenizer.add_special_tokens([AddedToken(text) for text in single[1::2]])
    size = tokenizer.get_vocab_size()
    return tokenizer, make_tokenizer(Vocabulary(tokenizer.to_str(), size, (0,)))


def one_of(mask: int, draw: random.Random) -> int:
    """A random token whose bit is set."""
    if mask.bit_count() < 32:
        return draw.choice([i for i in range(mask.bit_length()) if mask >> i & 1])
    skip = draw.randrange(mask.bit_length())
    rest = mask >> skip
    return (rest & -rest).bit_length() - 1 + skip


def write(row: ToolFormat, has_markers: bool, start: Any, seed: int) -> str:
    """An answer drawn from what the grammar allows; where any text may stand, a short one."""
    tokenizer, _ = tokenizer_of(row, has_markers)
    draw, output, matcher = random.Random(seed), [], start.deep_copy()
    ends = [tokenizer.encode(end).ids for end in _ends(row)]
    rest: list[int] = []  # of an end that is being spelled
    for _ in range(3000):
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        assert mask, matcher.get_error()
        special = mask >> NUM_PLAIN << NUM_PLAIN
        if not rest and mask.bit_count() > 100 and draw.random() < 0.6:
            rest = draw.choice(ends)
        has_special = special and draw.random() < 0.2
        if mask & 1 and draw.random() < 0.3:
            return str(tokenizer.decode(output, skip_special_tokens=False))
        if rest and mask >> rest[0] & 1 and not has_special:
            token_id, rest = rest[0], rest[1:]
        else:
            token_id, rest = one_of(special if has_special else mask & ~1 or mask, draw), []
        if token_id == 0:
            return str(tokenizer.decode(output, skip_special_tokens=False))
        output.append(token_id)
        assert matcher.consume_token(token_id), tokenizer.decode(output)[-300:]
    raise AssertionError("does not end: " + ascii(tokenizer.decode(output))[-300:])


def _ends(row: ToolFormat) -> list[str]:
    """Texts that may end free text."""
    if row.syntax == "tags":
        return ['"', *tags_of(row).value_ends]
    return ['"', '<|"|>', "<|end|>"]


def grammar_of(
    row: ToolFormat, has_markers: bool, tools: list[dict[str, Any]], most: int | None
) -> Any:
    tokenizer, library = tokenizer_of(row, has_markers)
    token_id: Callable[[str], int | None] = tokenizer.token_to_id
    text = "start: calls\n" + call_grammar(row, tools, token_id, most)
    params = StructuredOutputsParams(grammar=text)
    return initial_matcher(Writer(library).text_of(params), library)


@pytest.mark.parametrize("has_markers", [True, False])
@pytest.mark.parametrize("has_calls", [True, False])
def test_json_in_channels_is_read_as_content(has_calls: bool, has_markers: bool) -> None:
    row, schema = FORMATS["openai"], CLOSED | {"properties": {"a": {"enum": [1]}}}
    tokenizer, library = tokenizer_of(row, has_markers)
    text = json_in_channels(schema, tokenizer.token_to_id)
    if has_calls:
        rules = call_grammar(row, TOOLS[:1], tokenizer.token_to_id, None)
        text = f"start: calls | final answer\n{answer_rule(schema)}\n{rules}"
    params = StructuredOutputsParams(grammar=text)
    start, seen = initial_matcher(Writer(library).text_of(params), library), set()
    for seed in range(40):
        answer = write(row, has_markers, start, seed)
        parser = AnswerParser(row, SCHEMAS, reasoning=Reasoning(CHANNELS, "channels"))
        parts = parser.feed(answer)
        parts.extend(parser.finish(is_whole=True))
        assert bool(parts.content) != bool(parts.calls), answer
        assert bool(parts.reasoning) <= ("analysis" in answer), answer
        if parts.content:
            jsonschema.validate(json.loads(parts.content), schema)
        seen.add((bool(parts.reasoning), bool(parts.calls)))
    assert seen == {(thinks, calls) for thinks in (True, False) for calls in {False, has_calls}}


@pytest.mark.parametrize("row", ROWS, ids=IDS)
@pytest.mark.parametrize("has_markers", [True, False])
def test_what_a_grammar_allows_is_read_as_calls(row: ToolFormat, has_markers: bool) -> None:
    for most in (1, None):
        start, counts, names = grammar_of(row, has_markers, TOOLS, most), set(), set()
        is_one = most == 1 or row.syntax == "channels"
        for seed in range(30):
            if seed >= 3 and len(names) > 1 and (is_one or max(counts) > 1):
                break
            answer = write(row, has_markers, start, seed)
            parser = AnswerParser(row, SCHEMAS)
            parts, more = parser.feed(answer), parser.finish(is_whole=True)
            arguments = {part.index: part for part in parts.calls}
            for part in more.calls:
                arguments[part.index].arguments += part.arguments
            assert arguments and not more.content, answer
            assert row.syntax == "channels" or not parts.content, answer
            for call in arguments.values():
                schema = SCHEMAS[call.name or ""] or {"type": "object"}
                jsonschema.validate(json.loads(call.arguments), schema)
                names.add(call.name)
            counts.add(len(arguments))
        assert counts == {1} if is_one else max(counts) > 1
        assert len(names) > 1


@pytest.mark.parametrize(
    ("name", "properties", "answer"),
    [
        (
            "deepseek_v32",
            {"a": {"type": ["string", "integer"]}},
            '<｜DSML｜function_calls>\n<｜DSML｜invoke name="f">\n<｜DSML｜parameter name="a" '
            'string="false">5</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜function_calls>',
        ),
        (
            "seed_oss",
            {},
            "<seed:tool_call>\n<function=f>\n</function>\n</seed:tool_call>\n"
            "<seed:tool_call>\n<function=f>\n</function>\n</seed:tool_call>",
        ),
        (
            "gemma4",
            {"b": {"type": "integer"}, "A": {"type": "boolean"}, "x:y": {"const": {"c,d": 1}}},
            '<|tool_call>call:f{A:true,b:5,<|"|>x:y<|"|>:{<|"|>c,d<|"|>:1}}<tool_call|>',
        ),
        (
            "qwen3_coder",
            {"a": {"type": "string", "maxLength": 2.0}},
            "<tool_call>\n<function=f>\n<parameter=a>\nxy\n</parameter>\n</function>\n</tool_call>",
        ),
    ],
)
def test_calls_as_chat_templates_write_them_are_allowed(
    name: str, properties: dict[str, Any], answer: str
) -> None:
    row = FORMATS[name]
    tool = {"name": "f", "parameters": CLOSED | {"properties": properties}}
    matcher = grammar_of(row, True, [tool], None).deep_copy()
    tokens = tokenizer_of(row, True)[0].encode(answer).ids
    assert matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()
    calls = AnswerParser(row, {"f": tool["parameters"]}).feed(answer).calls
    jsonschema.validate(json.loads(calls[0].arguments), tool["parameters"])


MALFORMED: list[dict[str, Any]] = [
    *({"type": 5}, {"type": [None]}, {"allOf": 5}, {"anyOf": {"a": 1}}, {"enum": "ab"}),
    *({"type": "object", "properties": []}, {"type": "object", "required": 1}),
    *({"type": "array", "minItems": "a"}, {"type": "string", "maxLength": "3"}, {"$ref": 5}),
    {"type": "object", "required": [1]},
]


@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_malformed_schemas_raise_value_errors_at_most(row: ToolFormat) -> None:
    for schema in MALFORMED:
        parameters = {"properties": {"a": schema}}
        for whole in (parameters, schema):
            try:
                call_grammar(row, [{"name": "f", "parameters": whole}], lambda text: None, None)
            except ValueError as error:
                assert re.search("minItems|maxLength", str(error))
            if row.syntax == "tags":
                TagReader(tags_of(row), "f", whole).feed(_parameter(row), 0)


def _parameter(row: ToolFormat) -> str:
    text = row.head.partition("{name}")[2] + row.parameter
    return text.format(key="a", value="1", is_string="false")


@pytest.mark.parametrize(("name", "key"), [("qwen3_coder", "a>"), ("lfm2", "a,b")])
def test_parameters_that_a_format_cannot_name_are_refused(name: str, key: str) -> None:
    tool = {"name": "f", "parameters": {"properties": {key: {}}}}
    with pytest.raises(ValueError, match=f'cannot name the parameter "{key}"'):
        call_grammar(FORMATS[name], [tool], lambda text: None, None)


@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_hostile_schemas_make_no_long_grammars(row: ToolFormat) -> None:
    loop: Any = {"anyOf": [{"$ref": "#/$defs/a"}] * 40, "allOf": [{"$ref": "#/$defs/a"}] * 40}
    wide = {f"p{i}": {"$ref": "#/$defs/b"} for i in range(400)}
    defs = {"a": loop, "b": CLOSED | {"properties": wide}}
    tool = {"name": "f", "parameters": CLOSED | {"properties": {"x": loop} | wide, "$defs": defs}}
    assert len(call_grammar(row, [tool], lambda text: None, None)) <= MAX_BYTES
    tools = [
        {
            "name": "f",
            "parameters": {"properties": {"x": {"enum": [f"{i:045}" for i in range(3000)]}}},
        }
    ]
    with pytest.raises(ValueError, match="their grammar is larger than"):
        call_grammar(row, [tool, *tools], lambda text: None, None)
