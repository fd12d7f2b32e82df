"""Bodies: what is taken, what is refused and how, and that reading them costs little."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("msgspec")

from compiledllm.server.anthropic.protocol import BODIES as ANTHROPIC_BODIES
from compiledllm.server.anthropic.protocol import CountTokensRequest, MessagesRequest
from compiledllm.server.openai.bodies import Body, fields_of, parse
from compiledllm.server.openai.body_budget import MAX_FREE_BYTES
from compiledllm.server.openai.errors import ApiError
from compiledllm.server.openai.pooling_protocol import BODIES as POOLING_BODIES
from compiledllm.server.openai.pooling_protocol import EmbeddingRequest, RerankRequest, ScoreRequest
from compiledllm.server.openai.protocol import BODIES as OPENAI_BODIES
from compiledllm.server.openai.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Message,
    TokenizeRequest,
)
from compiledllm.server.openai.responses_protocol import BODIES as RESPONSES_BODIES
from compiledllm.server.openai.responses_protocol import ResponsesRequest
from compiledllm.server.openapi import components

BODIES = OPENAI_BODIES | RESPONSES_BODIES | ANTHROPIC_BODIES | POOLING_BODIES
USER = {"role": "user", "content": "x"}
LEAST: dict[type[Body], dict[str, Any]] = {
    ChatRequest: {"messages": [USER]},
    CompletionRequest: {"prompt": "x"},
    TokenizeRequest: {"prompt": "x"},
    DetokenizeRequest: {"tokens": [1]},
    EmbeddingRequest: {"input": "x"},
    ScoreRequest: {"queries": "x", "documents": "y"},
    RerankRequest: {"query": "x", "documents": ["y"]},
    MessagesRequest: {"messages": [USER], "max_tokens": 1},
    CountTokensRequest: {"messages": [USER]},
    ResponsesRequest: {"input": "x"},
}
BLOCK = {"type": "text", "text": "x"}
RESULT = {"type": "tool_result", "tool_use_id": "a", "content": [BLOCK]}
INPUT = {
    "messages": [{"role": "user", "content": [RESULT]}],
    "tools": [{"name": "f", "input_schema": {}}],
    "tool_choice": {"type": "auto"},
    "thinking": {"type": "enabled"},
    "output_config": {"format": {"type": "json_schema", "schema": {}}},
}
NAMED = {"type": "function", "function": {"name": "f"}}
# What makes an optional field with fields of its own appear, and a path to each object.
WHOLE: dict[type[Body], dict[str, Any]] = {
    ChatRequest: {
        "messages": [USER | {"tool_calls": [NAMED]}],
        "stream_options": {},
        "response_format": {"json_schema": {"schema": {}}},
        "structured_outputs": {},
        "repetition_detection": {},
        "tools": [NAMED],
        "tool_choice": NAMED,
    },
    TokenizeRequest: {"messages": [USER]},
    MessagesRequest: INPUT | {"max_tokens": 1},
    CountTokensRequest: INPUT,
    ResponsesRequest: {
        "input": [USER | {"content": [BLOCK]}],
        "tools": [{"type": "function", "name": "f"}],
        "tool_choice": {"type": "function", "name": "f"},
        "reasoning": {},
        "text": {"format": {}},
        "stream_options": {},
    },
}


def read(kind: type[Body], body: Any) -> Any:
    return parse(kind, body if isinstance(body, bytes) else json.dumps(body).encode())


def refusal(kind: type[Body], body: Any) -> ApiError:
    with pytest.raises(ApiError) as refused:
        read(kind, body)
    assert refused.value.status == 400
    return refused.value


# -- null ------------------------------------------------------------------------------------------


def objects_in(kind: type[Body], value: Any, path: str = "") -> Iterator[tuple[str, type[Body]]]:
    """The bodies in a body, each with its path, as they are declared."""
    yield path, kind
    for name, field in fields_of(kind).items():
        inner = getattr(value, name)
        for index, item in enumerate(inner) if isinstance(inner, list) else [(None, inner)]:
            if isinstance(item, Body):
                place = field.name if index is None else f"{field.name}.{index}"
                yield from objects_in(type(item), item, f"{path}.{place}".lstrip("."))


def put(body: Any, path: str, name: str, value: Any) -> Any:
    """A copy of a body in which an object at a path has another field."""
    made = json.loads(json.dumps(body))
    inner = made
    for part in path.split(".") if path else ():
        inner = inner[int(part) if part.isdigit() else part]
    inner[name] = value
    return made


def optional_fields() -> Iterator[tuple[type[Body], dict[str, Any], str, str]]:
    for kind in BODIES.values():
        body = WHOLE.get(kind) or LEAST[kind]
        for path, inner in objects_in(kind, read(kind, body)):
            for field in fields_of(inner).values():
                if not field.is_required:
                    yield kind, body, path, field.name


def test_every_kind_of_object_is_among_those_that_are_tried() -> None:
    tried = {
        inner
        for kind in BODIES.values()
        for _, inner in objects_in(kind, read(kind, WHOLE.get(kind) or LEAST[kind]))
    }
    declared = {kind.__name__ for kind in all_kinds()}
    assert (
        {kind.__name__ for kind in tried}
        == declared
        == set(components(tuple(BODIES.values()))) - {"Part", "Document"}
    )


def all_kinds() -> set[type[Body]]:
    def below(kind: type[Body]) -> Iterator[type[Body]]:
        for sub in kind.__subclasses__():
            yield sub
            yield from below(sub)

    return {kind for kind in below(Body) if kind.__module__.endswith("protocol")} - {
        kind
        for kind in below(Body)
        if kind.__name__ in ("Generation", "GenerationBase", "PoolingBase", "PairsBase")
    }


@pytest.mark.parametrize("case", optional_fields(), ids=lambda c: f"{c[0].__name__}-{c[2]}.{c[3]}")
def test_null_is_the_same_as_leaving_it_out(case: tuple[type[Body], Any, str, str]) -> None:
    kind, body, path, name = case
    absent = put(body, path, name, None)
    inner = absent
    for part in path.split(".") if path else ():
        inner = inner[int(part) if part.isdigit() else part]
    del inner[name]
    try:
        expected = read(kind, absent)
    except ApiError as error:  # not optional where it stands
        assert refusal(kind, put(body, path, name, None)).message == error.message
        return
    assert read(kind, put(body, path, name, None)) == expected


def test_null_for_a_required_field_is_missing() -> None:
    assert (
        "prompt is missing; it must be text, token ids"
        in refusal(CompletionRequest, {"prompt": None}).message
    )
    error = refusal(ChatRequest, {"messages": [{"content": "x", "role": None}]})
    assert (error.param, "is missing" in error.message) == ("messages.0.role", True)


# -- what is taken ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompt", ["x", "", ["x", "y"], ["x"] * 256, [1], [1, 2], [[1], [2, 3]], [[5]] * 256]
)
def test_every_form_of_a_prompt_is_read_as_it_is(prompt: Any) -> None:
    assert read(CompletionRequest, {"prompt": prompt}).prompt == prompt
    spaced = json.dumps({"prompt": prompt}, indent=8).encode()
    assert read(CompletionRequest, spaced).prompt == prompt


def test_lists_are_read_up_to_their_limits_however_long_their_items() -> None:
    for long in ("x", "x" * 40):
        messages = [USER | {"content": long}] * 4096
        assert len(read(ChatRequest, {"messages": messages}).messages) == 4096
        assert "at most 4096" in refusal(ChatRequest, {"messages": [*messages, USER]}).message
    stops = ["é" * 1000] * 128  # more than what is read without counting
    assert read(ChatRequest, {"messages": [USER], "stop": stops}).stop == stops
    assert (
        "at most 128 items"
        in refusal(CompletionRequest, {"prompt": "x", "stop": [*stops, "x"]}).message
    )
    ids = list(range(2**17))
    assert read(CompletionRequest, {"prompt": ids}).prompt == ids
    assert read(DetokenizeRequest, {"tokens": ids}).tokens == ids


def test_a_messages_other_fields_reach_its_template() -> None:
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}", "x": 1}}
    sent = {"role": "assistant", "content": [{"type": "text", "text": "a"}, "b"], "name": "n"}
    sent |= {"tool_calls": [call], "reasoning_content": "so", "extra": {"a": [1, None]}}
    message = read(Message, sent | {"tool_call_id": None})
    assert message.plain() == sent
    assert message.unknown_fields == []


def test_whole_numbers_with_a_fraction_are_integers_but_not_in_lists() -> None:
    body = read(CompletionRequest, {"prompt": "x", "max_tokens": 16.0, "seed": -3.0})
    assert (body.max_tokens, body.seed) == (16, -3) and isinstance(body.max_tokens, int)
    for item in (1.0, True, "1", None, [1]):
        assert refusal(CompletionRequest, {"prompt": [item, 1]}).param is not None
        assert refusal(CompletionRequest, {"prompt": [1, item]}).param == "prompt.1"
        error = refusal(CompletionRequest, {"prompt": "x", "stop_token_ids": [item]})
        assert error.param == "stop_token_ids.0"


def test_unknown_fields_are_named_and_not_kept() -> None:
    body = read(CompletionRequest, {"prompt": "x", "b": [[1] * 1000], "a": {"c": 1}, "no": None})
    assert body.unknown_fields == ["a", "b"] and body.more == {}


# -- what is refused, and how ----------------------------------------------------------------------

WRONG: list[Any] = [
    5,
    5.5,
    True,
    "",
    "x" * 70_000,
    [],
    [[]],
    [5],
    [5.5],
    [True],
    [""],
    [None],
    [{}],
]
WRONG += [[{}], {}, {"a": 1}, {"a": []}, {"1": "x"}, 2**70, -(2**70), [["x"]], [[5], "x"], ["x", 5]]


@pytest.mark.parametrize("path", list(BODIES))
def test_a_wrong_value_of_any_field_is_refused_by_its_name(path: str) -> None:
    """Or taken: then it is of the field's kind. Never anything else."""
    kind = BODIES[path]
    for field in fields_of(kind).values():
        num_refused = 0
        for value in WRONG:
            try:
                read(kind, LEAST[kind] | {field.name: value})
            except ApiError as error:
                num_refused += 1
                assert error.status == 400 and error.param and error.param.startswith(field.name)
                assert error.message.startswith(field.name) and len(error.message) < 600
        assert num_refused >= 5, field.name


ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"temperature": 5}, "temperature must be a number >= 0 and <= 2, got 5"),
    ({"n": 0}, "n must be an integer >= 1 and <= 128, got 0"),
    ({"stop": ["a", ""]}, 'stop.1 must be text of at least 1 character and at most 1000, got ""'),
    ({"stop": ["a"] * 129}, "stop must be a list of texts, at most 128 items, got 129 items"),
    ({"request_id": "a\nb"}, r'request_id must be 1 to 128 printable ASCII characters, got "a\nb"'),
    ({"request_id": "a\n"}, r'request_id must be 1 to 128 printable ASCII characters, got "a\n"'),
    ({"logprobs": 1}, "logprobs must be true or false, got 1"),
    ({"chat_template_kwargs": []}, "chat_template_kwargs must be an object, got []"),
    (
        {"messages": [{**USER, "role": 1}]},
        "messages.0.role must be text of at least 1 character and at most 64, got 1",
    ),
    (
        {"response_format": {"type": "x"}},
        "response_format.type must be one of 'text', 'json_object', 'json_schema', "
        "'structural_tag', got \"x\"",
    ),
    (
        {"logit_bias": {"1": 500}},
        "logit_bias must be an object, at most 1024 entries, each a number >= -100 and <= 100, "
        'got {"1": 500}',
    ),
]


@pytest.mark.parametrize(("fields", "message"), ERRORS, ids=lambda case: str(case)[:30])
def test_errors_name_field_limit_and_value(fields: dict[str, Any], message: str) -> None:
    error = refusal(ChatRequest, LEAST[ChatRequest] | fields)
    assert error.message == message
    assert error.param == message.split(" ")[0]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (["a"] * 257, "prompt must be a list of texts, at least 1 item and at most 256, got 257"),
        ([], "prompt must be a list of texts, at least 1 item and at most 256, got 0 items"),
        (5, "prompt must be text, token ids, or a list of 1 to 256 texts or lists of ids, got 5"),
        ([[1], []], "prompt.1 must be a list of integers, at least 1 item and at most 2097152"),
        ([1, "a"], 'prompt.1 must be an integer, got "a"'),
    ],
    ids=str,
)
def test_a_prompt_is_refused_by_the_form_it_began_with(prompt: Any, message: str) -> None:
    assert message in refusal(CompletionRequest, {"prompt": prompt}).message


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not valid JSON: it ends early"),
        (b'{"prompt": "x"', "not valid JSON: it ends early"),
        (b'{"prompt": NaN}', "invalid character (byte 11), near '{\"prompt\": NaN}'"),
        (b'{"prompt": "\\ud800"}', "half of a surrogate pair"),
        (b'{"prompt": "x"} y', "trailing characters"),
        (b"[]", "the body must be an object, got []"),
        (b'{"prompt": "x", "x": ' + b"[" * 10**5 + b"]" * 10**5 + b"}", "nested too deeply"),
        (b'{"prompt": "x", "%s": 1}' % (b"x" * 300), "a name of 300 characters"),
        (b'{"prompt": "x", "x": "%s", "%s": 1}' % (b"x" * 9999, b"x" * 300), "a name of 300"),
        (b"{" + b",".join(b'"%d":1' % i for i in range(300)) + b"}", "at most 256 fields"),
        (b"{" + b",".join(b'"%d":1' % i for i in range(10**5)) + b"}", "at most 256 fields"),
    ],
)  # fmt: skip
def test_what_is_no_body_is_said(data: bytes, message: str) -> None:
    assert message in refusal(CompletionRequest, data).message


def test_objects_of_any_form_share_a_limit() -> None:
    junk = [[]] * (MAX_FREE_BYTES // 7)  # more than half of it
    for fields in (
        {"chat_template_kwargs": {"a": junk, "b": junk}},
        {"messages": [USER | {"x": junk}] * 2},
        {"tools": [NAMED | {"function": {"name": "f", "parameters": {"x": junk}}}] * 2},
        {"chat_template_kwargs": {"a": junk}, "structured_outputs": {"json": {"a": junk}}},
    ):
        error = refusal(ChatRequest, LEAST[ChatRequest] | fields)
        assert "at most 524288 bytes of schemas, arguments" in error.message
    text = USER | {"reasoning_content": "x" * MAX_FREE_BYTES}
    assert read(ChatRequest, {"messages": [text] * 3}).messages[2].more == {
        "reasoning_content": text["reasoning_content"]
    }
    parts = USER | {"content": [{"text": ""}] * 4096}
    assert "content parts" in refusal(ChatRequest, {"messages": [parts] * 9}).message
    deep: Any = []
    for _ in range(70):
        deep = [deep]
    error = refusal(ChatRequest, LEAST[ChatRequest] | {"chat_template_kwargs": {"a": deep}})
    assert "nested at most 64 deep" in error.message


def test_schemas_say_what_is_read() -> None:
    """OpenAPI's schemas have the same fields, limits and nulls."""
    schemas = components(tuple(BODIES.values()))
    for kind in all_kinds():
        fields = {field.name: field for field in fields_of(kind).values()}
        assert schemas[kind.__name__]["properties"].keys() == fields.keys()
        required = schemas[kind.__name__].get("required", [])
        assert required == [name for name, field in fields.items() if field.is_required]
    temperature = schemas["CompletionRequest"]["properties"]["temperature"]
    assert temperature == {
        "anyOf": [{"type": "number", "minimum": 0, "maximum": 2}, {"type": "null"}]
    }
    assert json.dumps(schemas).count("#/components/schemas/") > 10
