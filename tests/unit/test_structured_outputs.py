"""Forms of outputs: what is refused, and that masks allow exactly what the form does."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from compiledllm import SamplingParams, StructuredOutputsParams
from compiledllm.grammars import grammar as grammar_module
from compiledllm.grammars import library
from compiledllm.grammars.grammar import Grammars
from compiledllm.grammars.library import Vocabulary
from compiledllm.remote import served_text
from compiledllm.runner.rule import Draw
from compiledllm.runner.structured import GrammarRows
from compiledllm.structured_outputs import MAX_BYTES, ReasoningTokens
from compiledllm.types import NewRequest
from tests.support.requests import make_new_request

EOS = 1
VOCAB = 300  # more than the tokenizer has
# All bytes are tokens, and some of these merges; so are the markers of tool calls, as special ones.
MERGES = ["t r", "tr u", "tru e", "r e", "re d", "g re", "gre e", "gree n", "b l", "bl u", "blu e"]
MERGES += ["1 2", "a b", '" :', '{ "']
MARKERS = ["<tool_call>", "</tool_call>", "[TOOL_CALLS]"]


def make_tokenizer() -> Tokenizer:
    vocab = {"<pad>": 0, "<eos>": EOS}
    merges = [tuple(merge.split()) for merge in MERGES]
    for piece in [*sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]:
        vocab[piece] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text) for text in ("<pad>", "<eos>")])
    tokenizer.add_tokens([AddedToken(text) for text in MARKERS])
    return tokenizer


TOKENIZER = make_tokenizer()
TEXTS = {
    i: TOKENIZER.decode([i], skip_special_tokens=False) for i in range(TOKENIZER.get_vocab_size())
}
TOKEN_OF = {text: i for i, text in TEXTS.items()}
MARKER_IDS = {TOKEN_OF[marker] for marker in MARKERS}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(Vocabulary(TOKENIZER.to_str(), VOCAB, (EOS,)))


def request(
    grammar: Any, output: list[int] | None = None, reasoning: ReasoningTokens | None = None
) -> NewRequest:
    tokens = [5, 6, 7, *(output or [])]
    more: dict[str, Any] = {"reasoning": reasoning, "stop_token_ids": frozenset({EOS})}
    return make_new_request("r", tokens, 3, grammar=grammar, **more)


def draw_of(*rows: int) -> Draw:
    return Draw(np.array(rows), np.zeros(len(rows), np.int64))


def allowed(rows: GrammarRows, numbers: list[int]) -> list[set[int]]:
    """Token ids that the rows allow next, by edits of logits; all that stays must be untouched."""
    before = torch.arange(len(numbers) * VOCAB, dtype=torch.float32).view(len(numbers), VOCAB)
    logits = before.clone()
    assert rows.apply(logits, draw_of(*numbers)) == {}
    found = []
    for old, new in zip(before, logits, strict=True):
        kept = torch.isfinite(new)
        assert torch.equal(new[kept], old[kept]) or set(kept.nonzero().flatten().tolist()) == {EOS}
        found.append(set(kept.nonzero().flatten().tolist()))
    return found


def write(
    grammars: Grammars, form: StructuredOutputsParams | str, seed: int, most: int = 300
) -> str | None:
    """An output drawn evenly from what is allowed; None if it did not end."""
    draw, rows = random.Random(seed), GrammarRows(VOCAB, CPU)
    rows.fill(0, request(grammars.compile(form)))
    output: list[int] = []
    for _ in range(most):
        (choices,) = allowed(rows, [0])
        token_id = draw.choice(sorted(choices))
        if token_id == EOS:
            return str(TOKENIZER.decode(output, skip_special_tokens=False))
        assert token_id in TEXTS, "tokens that only the model has are never allowed"
        output.append(token_id)
        rows.record(0, token_id)
    return None


# -- masks against slow references ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "outputs"),
    [
        ({"choice": ["red", "green", 'a"b\\c/d\n', "é☃"]}, {"red", "green", 'a"b\\c/d\n', "é☃"}),
        ({"regex": "(ab|red)x?"}, {"ab", "abx", "red", "redx"}),
        ({"json": {"enum": [1, "a", None, True]}}, {"1", '"a"', "null", "true"}),
        ({"grammar": 'start: x x\nx: "1" | "12"'}, {"11", "112", "121", "1212"}),
        ({"grammar": 'root ::= "1" x\nx ::= "a" | "b"'}, {"1a", "1b"}),
        ({"json": '{"type": "boolean"}'}, {"true", "false"}),
        ({"choice": ["<tool_call>a", "b</tool_call>"]}, {"<tool_call>a", "b</tool_call>"}),
    ],
)
def test_masks_lead_to_every_output_and_nowhere_else(
    form: dict[str, Any], outputs: set[str], grammars: Grammars
) -> None:
    """All ways through the masks: each is the beginning of an output, and all outputs are there.

    Where the text is forced, llguidance allows only the tokens that a tokenizer would take for it.
    """
    grammar, targets = grammars.compile(StructuredOutputsParams(**form)), set()
    todo: list[list[int]] = [[]]
    while todo:
        output = todo.pop()
        text = TOKENIZER.decode(output)
        rows = GrammarRows(VOCAB, CPU)
        rows.fill(0, request(grammar, output))
        (found,) = allowed(rows, [0])
        assert found and (EOS in found) == (text in outputs), text
        targets |= {text} if EOS in found else set()
        for token_id in found - {EOS}:
            longer = TOKENIZER.decode([*output, token_id]).rstrip("\ufffd")
            assert any(target.startswith(longer) for target in outputs), longer
            todo.append([*output, token_id])
    assert targets == outputs


def random_schema(draw: random.Random, depth: int = 0) -> dict[str, Any]:
    kinds = ["integer", "boolean", "enum", "string", "null"] + ["object", "array", "anyOf"] * (
        depth < 3
    )
    kind = draw.choice(kinds)
    if kind == "enum":
        return {"enum": draw.sample(["a", "bc", 1, 2, None, True, 'q"'], draw.randint(1, 4))}
    if kind == "integer":
        return {"type": "integer", "minimum": draw.randint(-20, 0), "maximum": draw.randint(0, 200)}
    if kind == "string":
        more = draw.choice([{"maxLength": 3}, {"pattern": "^[a-c]{1,3}$"}, {"format": "date"}])
        return {"type": "string"} | more
    if kind == "array":
        items = random_schema(draw, depth + 1)
        return {"type": "array", "items": items, "minItems": draw.randint(0, 1), "maxItems": 2}
    if kind == "anyOf":
        return {"anyOf": [random_schema(draw, depth + 1) for _ in range(2)]}
    if kind == "object":
        names = draw.sample(["a", "b", "name"], draw.randint(1, 3))
        properties = {name: random_schema(draw, depth + 1) for name in names}
        required = [name for name in names if draw.random() < 0.7]
        fixed = {"type": "object", "additionalProperties": False}
        return fixed | {"properties": properties, "required": required}
    return {"type": kind}


@given(st.integers(0, 10**6))
def test_outputs_validate_against_random_schemas(seed: int) -> None:
    schema = random_schema(random.Random(seed))
    text = write(GRAMMARS, StructuredOutputsParams(json=schema, disable_any_whitespace=True), seed)
    assert text is not None
    jsonschema.validate(json.loads(text), schema, format_checker=jsonschema.FormatChecker())
    assert json.dumps(json.loads(text), separators=(",", ":")).count(" ") == text.count(" ")


GRAMMARS = Grammars(Vocabulary(TOKENIZER.to_str(), VOCAB, (EOS,)))


def test_white_space_between_jsons_tokens_is_bounded(grammars: Grammars) -> None:
    schema = {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 2}
    for form, limit in (({}, 32), ({"whitespace_pattern": " {0,2}"}, 2)):
        texts = [write(grammars, StructuredOutputsParams(json=schema, **form), s) for s in range(6)]
        for text in texts:
            assert text is not None and len(json.loads(text)) == 2
            longest = max(
                len(part) for part in "".join(c if c.isspace() else "x" for c in text).split("x")
            )
            assert longest <= limit
        assert any(" " in (text or "") for text in texts)


def test_additional_properties_can_be_closed(grammars: Grammars) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a"]}
    compact = {"json": schema, "disable_any_whitespace": True}
    closed = StructuredOutputsParams(**compact, disable_additional_properties=True)
    assert {write(grammars, closed, seed) for seed in range(5)} == {'{"a":null}'}
    opened = [write(grammars, StructuredOutputsParams(**compact), seed, 60) for seed in range(5)]
    assert set(opened) != {'{"a":null}'}
    assert "additionalProperties" not in schema


def test_json_object_is_an_object(grammars: Grammars) -> None:
    texts = [write(grammars, StructuredOutputsParams(json_object=True), seed) for seed in range(20)]
    ended = [json.loads(text) for text in texts if text is not None]
    assert ended and all(isinstance(value, dict) for value in ended)


def test_structural_tags_hold_behind_their_trigger(grammars: Grammars) -> None:
    form = StructuredOutputsParams(
        structural_tag={
            "structures": [
                {"begin": "<f>", "schema": {"enum": [1]}, "end": "</f>"},
                {"begin": "<g>", "schema": {"enum": [2]}, "end": "!"},
            ],
            "triggers": ["<"],
        }
    )
    matcher = grammars.compile(form).matcher([])
    for char in "free <g>2! and <f>1":
        assert matcher.consume_token(TOKEN_OF[char]), char
    rows = GrammarRows(VOCAB, CPU)
    written = [TOKEN_OF[char] for char in "free <g>2! and <f>1"]
    rows.fill(0, request(grammars.compile(form), written))
    assert allowed(rows, [0]) == [{TOKEN_OF["<"]}]  # of </f>


def test_reasoning_comes_before_the_form(grammars: Grammars) -> None:
    """The masks behind each token of an output, and that they follow from the output alone."""
    end, start, space, call = (TOKEN_OF[text] for text in ("!", "?", "\n", "[TOOL_CALLS]"))
    tokens = ReasoningTokens(end, start, call, (space,))
    grammar = grammars.compile(StructuredOutputsParams(grammar=f'start: <[{call}]> "\\n"? | "re"'))
    everything, first = set(range(VOCAB)), {TOKEN_OF["r"], TOKEN_OF["re"], call}
    outputs: list[tuple[str, list[set[int]]]] = [
        ("re", [first | {start}, {TOKEN_OF["e"]}, {EOS}]),
        ("?re?!", [first | {start}, *[everything] * 4, first | {space}]),
        ("?!\n\nr", [first | {start}, everything, *[first | {space}] * 2, first, {TOKEN_OF["e"]}]),
        ("?[TOOL_CALLS]\n", [first | {start}, everything, {space, EOS}, {EOS}]),
    ]
    for text, expected in outputs:
        pieces = [TOKEN_OF[piece] for piece in re.findall(r"\[TOOL_CALLS\]|(?s:.)", text)]
        rows = GrammarRows(VOCAB, CPU)
        rows.fill(0, request(grammar, reasoning=tokens))
        for number, piece in enumerate(pieces):
            assert allowed(rows, [0]) == [expected[number]], (text, number)
            rows.record(0, piece)
            rows.fill(1, request(grammar, pieces[: number + 1], tokens))
            assert allowed(rows, [0, 1]) == [expected[number + 1]] * 2, (text, number)


def test_white_space_that_the_form_begins_with_is_of_the_form(grammars: Grammars) -> None:
    end, space = TOKEN_OF["!"], TOKEN_OF["\n"]
    grammar = grammars.compile(StructuredOutputsParams(regex=r"\n{3}|a"))
    rows = GrammarRows(VOCAB, CPU)
    rows.fill(0, request(grammar, [end, space, space], ReasoningTokens(end, spaces=(space,))))
    assert allowed(rows, [0]) == [{space}]


def test_rows_stand_where_their_outputs_do(grammars: Grammars) -> None:
    """Several rows at once, in any order, with rows between them that have no grammar."""
    grammar = grammars.compile(StructuredOutputsParams(choice=["red", "green", "blue"]))

    def alone(*texts: str) -> set[int]:
        rows = GrammarRows(VOCAB, CPU)
        rows.fill(0, request(grammar, [TOKEN_OF[text] for text in texts]))
        return allowed(rows, [0])[0]

    rows = GrammarRows(VOCAB, CPU)
    rows.fill(2, request(grammar))
    rows.fill(0, request(grammar, [TOKEN_OF["g"]]))
    rows.fill(1, make_new_request("x", [3]))
    assert allowed(rows, [2, 1, 0]) == [alone(), set(range(VOCAB)), alone("g")]
    rows.record(2, TOKEN_OF["red"])
    rows.record(2, -1)  # no token could be drawn
    assert allowed(rows, [2]) == [{EOS}]
    rows.release(2)
    rows.fill(2, request(grammar, [TOKEN_OF["b"]]))
    assert allowed(rows, [2, 0]) == [alone("b"), alone("g")]
    assert alone("b") != alone("g") != alone()


def test_a_complete_output_ends_whatever_other_rules_say(grammars: Grammars) -> None:
    rows = GrammarRows(VOCAB, CPU)
    rows.fill(
        0, request(grammars.compile(StructuredOutputsParams(choice=["red"])), [TOKEN_OF["red"]])
    )
    logits = torch.full((1, VOCAB), -torch.inf)
    assert rows.apply(logits, draw_of(0)) == {}
    assert torch.isfinite(logits).nonzero().tolist() == [[0, EOS]]
    for spoilt in (torch.nan, torch.inf):  # by the model: no token may be drawn
        rows.apply(logits.fill_(spoilt), draw_of(0))
        assert not torch.isfinite(logits).any()


def test_an_output_too_complex_to_go_on_fails_alone(grammars: Grammars) -> None:
    rows = GrammarRows(VOCAB, CPU)
    hard = StructuredOutputsParams(regex="((a{1,100}){1,100}){1,100}")
    rows.fill(0, request(grammars.compile(hard)))
    rows.fill(1, request(grammars.compile(StructuredOutputsParams(regex="a*"))))
    for _ in range(1000):
        errors = rows.apply(torch.zeros(2, VOCAB), draw_of(0, 1))
        if errors:
            break
        rows.record(0, TOKEN_OF["a"])
        rows.record(1, TOKEN_OF["a"])
    assert list(errors) == [0] and errors[0].startswith("structured_outputs: lexer error")
    assert "<" not in errors[0]


# -- compiling ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"regex": "(?=a)b"}, "look-around"),
        ({"regex": "(a"}, "regex"),
        ({"json": {"type": "nope"}}, "nope"),
        ({"json": {"uniqueItems": True}}, "uniqueItems"),
        ({"json": {"$ref": "http://localhost/x"}}, "the schema at #: .ref .*leads to nothing"),
        ({"json": {"type": "integer", "minimum": 3, "maximum": 1}}, "Unsatisfiable"),
        ({"grammar": "start: x"}, 'unknown name: "x"'),
        ({"grammar": "start: <nope>"}, "unknown special token"),
        ({"grammar": "root ::= ("}, "."),
    ],
)
def test_bad_grammars_are_value_errors(
    form: dict[str, Any], message: str, grammars: Grammars
) -> None:
    with pytest.raises(ValueError, match=message):
        grammars.compile(StructuredOutputsParams(**form))
    assert grammars.compile(StructuredOutputsParams(regex="a")).text


HOSTILE = [
    *("start:", "root ::=", " x", '"a"', "/a/", "(", ")", "|", "*", "+", "?", "{1,99}", "[a-z]"),
    *(
        "\\n",
        "%json",
        "{",
        "}",
        '{"type": "object"}',
        "<",
        ">",
        "<[5]>",
        "<eos>",
        "\n",
        "%llguidance",
    ),
    *(
        "%import",
        "common.X",
        ":",
        "::=",
        "[^",
        "]",
        "\\p{L}",
        "(?i)",
        "^",
        "$",
        "é",
        "\ud800",
        "@x",
    ),
]
KEYS = ["type", "properties", "items", "anyOf", "allOf", "enum", "pattern", "$ref", "minimum", "x"]
LEAVES = st.sampled_from(
    ["object", "array", "string", "#", "#/$defs/a", "(a", None, True, -1, 1e99]
)
SCHEMAS = st.recursive(
    LEAVES,
    lambda inner: (
        st.dictionaries(st.sampled_from(KEYS), inner, max_size=4) | st.lists(inner, max_size=3)
    ),
    max_leaves=12,
)


@given(st.lists(st.sampled_from(HOSTILE), max_size=12).map("".join), SCHEMAS)
def test_whatever_a_form_is_it_compiles_or_is_a_value_error(text: str, schema: Any) -> None:
    """And then it gives masks, or says what is wrong; nothing else is raised."""
    for form in ({"regex": text}, {"grammar": text}, {"choice": [text]}, {"json": schema}):
        try:
            grammar = GRAMMARS.compile(StructuredOutputsParams(**form))  # type: ignore[arg-type]
        except ValueError as error:
            assert str(error).startswith("structured_outputs")
            continue
        rows = GrammarRows(VOCAB, CPU)
        rows.fill(0, request(grammar))
        for _ in range(4):
            logits = torch.zeros(1, VOCAB)
            errors = rows.apply(logits, draw_of(0))
            assert errors or torch.isfinite(logits).any()
            if errors:
                break
            rows.record(0, int(logits[0].argmax()))


def test_the_cache_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_module, "MAX_CACHED", 3)
    grammars = Grammars(Vocabulary(TOKENIZER.to_str(), VOCAB, (EOS,)))
    form = StructuredOutputsParams(regex="a")
    first = grammars.compile(form)
    assert grammars.compile(form) is first
    assert grammars.remake(first.text) is grammars.remake(first.text)
    for i in range(3):
        grammars.compile(StructuredOutputsParams(regex=f"b{i}"))
    assert grammars.compile(form) is not first and len(grammars._cache) == 3
    monkeypatch.setattr(grammar_module, "MAX_CACHED_BYTES", 100)
    grammars.compile(StructuredOutputsParams(regex="c" * 90))
    assert not grammars._cache and grammars._cached_bytes == 0


def test_a_vocabulary_larger_than_the_models_is_cut(grammars: Grammars) -> None:
    small = Grammars(Vocabulary(TOKENIZER.to_str(), 40, (EOS,)))
    rows = GrammarRows(40, CPU)
    rows.fill(0, request(small.compile(StructuredOutputsParams(regex="[a-z0-9]"))))
    logits = torch.zeros(1, 40)
    rows.apply(logits, draw_of(0))
    kept = set(torch.isfinite(logits[0]).nonzero().flatten().tolist())
    assert kept == {
        i for i in range(2, 40) if TEXTS[i].isalnum() and TEXTS[i].islower() or TEXTS[i].isdigit()
    }


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "is_installed", lambda: False)
    with pytest.raises(ValueError, match=r"pip install 'compiledllm\[structured\]'"):
        Grammars(Vocabulary("", 1, (1,)))


# -- the edge -------------------------------------------------------------------------------------

DEEP: Any = {}
for _ in range(65):
    DEEP = {"items": DEEP}
TAG = {"begin": "<f>", "schema": {}, "end": ""}


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({}, "exactly one of json, regex, choice, .* got none"),
        ({"regex": "a", "choice": ["b"]}, "got regex and choice"),
        ({"regex": ""}, "regex must be a non-empty string, got ''"),
        ({"regex": "a" * (MAX_BYTES + 1)}, f"at most {MAX_BYTES} bytes, got {MAX_BYTES + 1}"),
        ({"choice": []}, "1 to 1024 non-empty strings"),
        ({"choice": ["a", ""]}, "1 to 1024 non-empty strings"),
        ({"choice": "red"}, "1 to 1024 non-empty strings"),
        ({"json": "{"}, "json is not JSON"),
        ({"json": "[" * 9000}, "json is not JSON"),
        ({"json": "3"}, "must be a JSON schema"),
        ({"json": "true"}, "must be a JSON schema"),
        ({"json": {"const": float("nan")}}, "is no JSON schema"),
        ({"json": {"const": {1, 2}}}, "is no JSON schema"),
        ({"json": DEEP}, "nested at most 64 deep"),
        ({"json_object": False}, "json_object must be True"),
        ({"structural_tag": {}}, "lists 'structures' and 'triggers'"),
        ({"structural_tag": {"structures": [TAG], "triggers": []}}, "triggers must be"),
        ({"structural_tag": {"structures": [], "triggers": ["<"]}}, "a list of 1 to"),
        ({"structural_tag": {"structures": [TAG], "triggers": ["x"]}}, "begin must be text after"),
        ({"structural_tag": {"structures": [{"begin": "<"}], "triggers": ["<"]}}, "begin and end"),
        ({"regex": "a", "disable_any_whitespace": True}, "goes with json or json_object only"),
        ({"json": {}, "disable_any_whitespace": True, "whitespace_pattern": " "}, "not both"),
        ({"json": {}, "disable_any_whitespace": 1}, "must be True or False"),
        ({"jsn": {}}, "unknown structured outputs field 'jsn'; did you mean 'json'"),
    ],
)
def test_the_edge_names_field_and_value(form: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(structured_outputs=form)  # type: ignore[arg-type]


def test_some_fields_do_not_go_together() -> None:
    form = StructuredOutputsParams(regex="a")
    for more in ({"min_tokens": 2}, {"ignore_eos": True}):
        with pytest.raises(ValueError, match="does not go with structured_outputs"):
            SamplingParams(structured_outputs=form, **more)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a StructuredOutputsParams or None, got 'a'"):
        SamplingParams(structured_outputs="a")  # type: ignore[arg-type]


def test_a_tokenizer_that_the_library_does_not_know_is_named_and_a_server_goes_without(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = Vocabulary(Tokenizer(models.WordLevel({"a": 0, "b": 1}, "a")).to_str(), 2, (1,))
    with pytest.raises(ValueError, match="llguidance does not know this kind of tokenizer"):
        Grammars(words).compiler.start()

    class Requests:
        def grammars(self) -> Grammars:
            return Grammars(words)

    monkeypatch.setattr("compiledllm.log.log.propagate", True)
    with caplog.at_level("INFO", logger="compiledllm"):
        assert served_text.load_vocabulary(Requests()) is None  # type: ignore[arg-type]
    assert "none (structured_outputs: llguidance does not know" in caplog.text
