"""The Messages API: what a body asks of a chat, and the blocks and events of its answer."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any, cast

import pytest

pytest.importorskip("fastapi")

from compiledllm.outputs import CompletionOutput, RequestOutput
from compiledllm.sampling_params import SamplingParams
from compiledllm.server.anthropic.conversion import chat_request
from compiledllm.server.anthropic.errors import anthropic_error_body
from compiledllm.server.anthropic.messages_answer import MessagesAnswer
from compiledllm.server.anthropic.protocol import MessagesRequest
from compiledllm.server.openai.answer import Context
from compiledllm.server.openai.bodies import parse
from compiledllm.server.openai.errors import ApiError
from compiledllm.server.openai.reasoning_formats import THINK, Mode, Reasoning
from compiledllm.server.openai.tool_protocol import NamedTool
from compiledllm.server.security import Guard

USER = {"role": "user", "content": "hi"}
TOOL = {"name": "f", "description": "It.", "input_schema": {"type": "object"}}
TEMPLATE = "tools <tool_call> </tool_call> </think> enable_thinking"


def body(**fields: Any) -> MessagesRequest:
    whole = {"messages": [USER], "max_tokens": 9} | fields
    return parse(MessagesRequest, json.dumps(whole).encode())


def chat(ignored: list[str] | None = None, template: str = TEMPLATE, **fields: Any) -> Any:
    return chat_request(body(**fields), template, [] if ignored is None else ignored)


# -- bodies ----------------------------------------------------------------------------------------


def test_blocks_become_messages_in_order() -> None:
    asked = [
        {"type": "thinking", "thinking": "hm", "signature": "s"},
        {"type": "text", "text": "I look."},
        {"type": "tool_use", "id": "c1", "name": "f", "input": {"a": 1}},
    ]
    result = {
        "type": "tool_result",
        "tool_use_id": "c1",
        "content": [{"type": "text", "text": "3"}],
    }
    told = [result, {"type": "text", "text": "and?"}]
    messages = chat(
        system=[{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
        messages=[USER, {"role": "assistant", "content": asked}, {"role": "user", "content": told}],
    ).messages
    assert [message.role for message in messages] == ["system", "user", "assistant", "tool", "user"]
    assert messages[0].content == "a\nb" and messages[4].content == "and?"
    assert messages[3].plain() == {"role": "tool", "content": "3", "tool_call_id": "c1"}
    answer = messages[2].plain()
    assert answer["content"] == "I look." and answer["reasoning_content"] == "hm"
    assert answer["tool_calls"][0]["function"] == {"name": "f", "arguments": {"a": 1}}


def test_system_messages_may_stand_among_the_others() -> None:
    late = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    roles = [(m.role, m.content) for m in chat(system="a", messages=[USER, late, USER]).messages]
    assert roles == [("system", "a"), ("user", "hi"), ("system", "Be brief."), ("user", "hi")]


@pytest.mark.parametrize(
    ("choice", "expected"), [("auto", "auto"), ("any", "required"), ("none", "none")]
)
def test_tool_choices(choice: str, expected: str) -> None:
    made = chat(tools=[TOOL], tool_choice={"type": choice, "disable_parallel_tool_use": True})
    assert made.tool_choice == expected and made.parallel_tool_calls is False
    assert made.tools[0].function.parameters == {"type": "object"}


def test_a_named_tool_and_the_last_words_of_an_answer() -> None:
    made = chat(tools=[TOOL], tool_choice={"type": "tool", "name": "f"})
    assert isinstance(made.tool_choice, NamedTool) and made.tool_choice.function.name == "f"
    assert made.add_generation_prompt and not made.continue_final_message
    begun = chat(messages=[USER, {"role": "assistant", "content": "It is"}])
    assert begun.continue_final_message and not begun.add_generation_prompt


def test_thinking_is_switched_where_the_template_can() -> None:
    ignored: list[str] = []
    made = chat(ignored, thinking={"type": "enabled", "budget_tokens": 2000})
    assert made.chat_template_kwargs == {"enable_thinking": True}
    assert ignored == ["thinking.budget_tokens"]
    assert chat(thinking={"type": "disabled"}).chat_template_kwargs == {"enable_thinking": False}
    ignored.clear()
    assert chat(ignored, "plain", thinking={"type": "enabled"}).chat_template_kwargs is None
    assert ignored == ["thinking"]


def test_efforts_and_output_schemas_are_those_of_chats() -> None:
    schema = {"type": "object"}
    form = {"type": "json_schema", "schema": schema}
    made = chat(output_config={"effort": "low", "format": form})
    assert made.reasoning_effort == "low" and made.response_format.json_schema.schema_ == schema
    assert answer(output_config={"format": form}).structured_field == "output_config.format"


@pytest.mark.parametrize("kind", ["image", "document", "thinking", "new_kind"])
def test_other_blocks_are_refused_by_place_and_type(kind: str) -> None:
    with pytest.raises(ApiError, match=f"messages.0.content.0.type must be .* got '{kind}'"):
        chat(messages=[{"role": "user", "content": [{"type": kind}]}])


# -- answers ---------------------------------------------------------------------------------------


def answer(mode: Mode = "off", **fields: Any) -> MessagesAnswer:
    tokenizer = SimpleNamespace(chat_template_text=TEMPLATE, token_id=lambda text: None)
    requests = SimpleNamespace(
        require_tokenizer=lambda what: tokenizer, defaults=SamplingParams(), tokenizer=tokenizer
    )
    made = MessagesAnswer(body(**fields), Context("msg-1", "m", cast(Any, requests)))
    made._chat._reasoning = Reasoning(THINK, mode)  # `prompts` reads it off the prompt
    return made


def output(text: str, reason: Any = None, stop: Any = None) -> RequestOutput:
    completion = CompletionOutput(0, text, [1] * 2, finish_reason=reason, stop_reason=stop)
    return cast(
        RequestOutput,
        SimpleNamespace(prompt_token_ids=[1] * 10, num_cached_tokens=4, outputs=[completion]),
    )


def streamed(made: MessagesAnswer, pieces: list[str], reason: Any = "stop") -> list[Any]:
    raw = made.begin()
    for i, piece in enumerate(pieces):
        grown = output(piece, reason if i == len(pieces) - 1 else None)
        raw += made.grow(0, grown, grown.outputs[0])
    raw += made.end()
    events = []
    for block in raw.decode().strip().split("\n\n"):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        events.append(event)
    return events


CALLED = (
    '<think>\nhm\n</think>\nI look.<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
)


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_events_of_thinking_text_and_calls(size: int) -> None:
    pieces = [CALLED[i : i + size] for i in range(0, len(CALLED), size)]
    events = streamed(answer("leading", tools=[TOOL]), pieces)
    assert [event["type"] for event in events[:2]] == ["message_start", "ping"]
    usage = events[0]["message"]["usage"]
    assert (usage["input_tokens"], usage["cache_read_input_tokens"]) == (6, 4)
    texts: dict[int, str] = {}
    starts, stops = [], []
    for event in events[2:-2]:
        index = event["index"]
        if event["type"] == "content_block_start":
            assert len(starts) == len(stops) == index
            starts.append(event["content_block"])
        elif event["type"] == "content_block_stop":
            stops.append(index)
        else:
            kind, text = event["delta"].values()
            assert kind == ("thinking_delta", "text_delta", "input_json_delta")[index]
            texts[index] = texts.get(index, "") + text
    assert [start["type"] for start in starts] == ["thinking", "text", "tool_use"]
    assert stops == [0, 1, 2] and (texts[0], texts[1]) == ("hm", "I look.")
    assert json.loads(texts[2]) == {"a": 1} and starts[2]["name"] == "f" and starts[2]["id"]
    assert events[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert events[-2]["usage"]["output_tokens"] == 2 * len(pieces)
    assert events[-1] == {"type": "message_stop"}


@pytest.mark.parametrize("size", range(1, 60))
def test_text_behind_a_call_leaves_the_call_whole(size: int) -> None:
    text = CALLED.partition("</think>")[2] + "\nThat was all."
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    texts = {"input_json_delta": "", "text_delta": ""}
    for event in streamed(answer(tools=[TOOL]), pieces):
        if event["type"] == "content_block_delta":
            kind, more = event["delta"].values()
            texts[kind] += more
    assert json.loads(texts["input_json_delta"]) == {"a": 1}
    assert texts["text_delta"].split() == ["I", "look.", "That", "was", "all."]


def test_text_behind_a_call_stays_behind_it_in_a_whole_answer() -> None:
    made = answer("leading", tools=[TOOL]).whole([output(CALLED + "\nThat was all.", "stop")], 2)
    assert [block["type"] for block in made["content"]] == ["thinking", "text", "tool_use", "text"]
    assert made["content"][-1]["text"].strip() == "That was all."


def test_a_whole_answer_has_the_same_blocks() -> None:
    made = answer("leading", tools=[TOOL]).whole([output(CALLED, "stop")], 2)
    thinking, text, call = made["content"]
    assert thinking["thinking"] == "hm" and text["text"] == "I look."
    assert call["name"] == "f" and call["input"] == {"a": 1}
    assert made["stop_reason"] == "tool_use" and made["usage"]["output_tokens"] == 2


@pytest.mark.parametrize(
    ("reason", "stop", "expected"),
    [
        ("length", None, ("max_tokens", None)),
        ("stop", None, ("end_turn", None)),
        ("stop", 2, ("end_turn", None)),
        ("stop", "END", ("stop_sequence", "END")),
        ("repetition", None, ("end_turn", None)),
    ],
)
def test_stop_reasons(reason: str, stop: Any, expected: tuple[str, str | None]) -> None:
    made = answer().whole([output("a", reason, stop)], 1)
    assert (made["stop_reason"], made["stop_sequence"]) == expected


def test_an_error_in_a_stream_is_the_last_event() -> None:
    made = answer()
    lines = made.fail(ApiError(503, "later")).decode().split("\n")
    error = {"type": "overloaded_error", "message": "later"}
    assert lines[0] == "event: error" and made.last_event == b""
    assert json.loads(lines[1].removeprefix("data: ")) == {"type": "error", "error": error}


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, "invalid_request_error"), (401, "authentication_error"), (413, "request_too_large")]
    + [(429, "rate_limit_error"), (500, "api_error"), (504, "timeout_error")],
)
def test_types_of_errors(status: int, kind: str) -> None:
    assert anthropic_error_body(ApiError(status, "x"))["error"]["type"] == kind


@pytest.mark.parametrize(
    ("headers", "is_known"),
    [
        ({b"x-api-key": b"secret"}, True),
        ({b"authorization": b"Bearer secret"}, True),
        ({b"x-api-key": b"wrong"}, False),
        ({}, False),
    ],
)
def test_keys_of_both_kinds_of_clients(headers: dict[bytes, bytes], is_known: bool) -> None:
    guard = Guard(cast(Any, None), ["secret"])
    assert (guard._key_of(headers) is not None) == is_known
