"""The Responses API: what a body asks of a chat, and the items and events of its answer."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace
from typing import Any, cast

import pytest

pytest.importorskip("fastapi")

from compiledllm.config import ConfigError
from compiledllm.outputs import CompletionOutput, RequestOutput
from compiledllm.sampling_params import SamplingParams
from compiledllm.server.openai import response_store
from compiledllm.server.openai.answer import AnswerSettings, Context
from compiledllm.server.openai.bodies import parse
from compiledllm.server.openai.errors import ApiError
from compiledllm.server.openai.reasoning_count import ReasoningCount
from compiledllm.server.openai.reasoning_formats import THINK, Mode, Reasoning
from compiledllm.server.openai.response_store import ResponseStore, StoredResponse
from compiledllm.server.openai.responses_answer import ResponsesAnswer
from compiledllm.server.openai.responses_input import chat_request
from compiledllm.server.openai.responses_protocol import ResponsesRequest
from compiledllm.server.openai.tool_protocol import NamedTool

USER = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "name": "f", "description": "It.", "parameters": {"type": "object"}}
CALL = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"a": 1}'}
TEMPLATE = "tools <tool_call> </tool_call> </think> reasoning_effort"


def body(**fields: Any) -> ResponsesRequest:
    return parse(ResponsesRequest, json.dumps({"input": "hi"} | fields).encode())


def chat(ignored: list[str] | None = None, **fields: Any) -> Any:
    return chat_request(body(**fields), [], [] if ignored is None else ignored)


def part(kind: str, text: str) -> dict[str, str]:
    return {"type": kind, "text": text}


# -- bodies ----------------------------------------------------------------------------------------


def test_a_text_and_instructions_become_messages() -> None:
    made = chat(instructions="Be brief.", max_output_tokens=9, reasoning={"effort": "low"})
    assert [(m.role, m.content) for m in made.messages] == [("system", "Be brief."), ("user", "hi")]
    assert made.requested_max_tokens[1] == 9 and made.reasoning_effort == "low"


def test_items_of_one_answer_become_one_message() -> None:
    thought = {"type": "reasoning", "summary": [], "content": [part("reasoning_text", "hm")]}
    said = {"type": "message", "role": "assistant", "content": [part("output_text", "I look.")]}
    result = {"type": "function_call_output", "call_id": "c1", "output": [part("input_text", "3")]}
    more = CALL | {"call_id": "c2"}
    made = chat(input=[USER, thought, said, CALL, more, result, thought, said, USER]).messages
    assert [m.role for m in made] == ["user", "assistant", "tool", "assistant", "user"]
    first = made[1].plain()
    assert first["content"] == "I look." and first["reasoning_content"] == "hm"
    assert [call["id"] for call in first["tool_calls"]] == ["c1", "c2"]
    assert first["tool_calls"][0]["function"] == {"name": "f", "arguments": '{"a": 1}'}
    assert made[2].plain() == {"role": "tool", "content": "3", "tool_call_id": "c1"}
    assert made[3].plain() == {
        "role": "assistant",
        "content": "I look.",
        "reasoning_content": "hm",
    }


def test_reasoning_is_read_from_summaries_too_and_unreadable_reasoning_is_nothing() -> None:
    shown = {"type": "reasoning", "summary": [part("summary_text", "a"), part("summary_text", "b")]}
    sealed = {"type": "reasoning", "summary": [], "encrypted_content": "x"}
    made = chat(input=[USER, shown, CALL, USER, sealed]).messages
    assert made[1].more == {"reasoning_content": "a\nb"} and made[1].tool_calls
    assert [m.role for m in made] == ["user", "assistant", "user"]


def test_leading_instructions_are_one_system_message() -> None:
    developer = {"type": "message", "role": "developer", "content": [part("input_text", "b")]}
    late = {"role": "system", "content": "c"}
    made = chat(instructions="a", input=[developer, developer, USER, late]).messages
    contents = [(m.role, m.content) for m in made]
    assert contents == [("system", "a\n\nb\n\nb"), ("user", "hi"), ("system", "c")]


def test_tools_of_other_types_and_fields_without_effect_are_named() -> None:
    ignored: list[str] = []
    tools = [{"type": "web_search"}, TOOL, {"type": "namespace", "name": "n", "tools": []}]
    made = chat(
        ignored,
        input=[USER, {"type": "web_search_call", "id": "w"}],
        tools=tools,
        include=["reasoning.encrypted_content", "message.output_text.logprobs"],
        text={"verbosity": "low"},
        truncation="auto",
        max_tool_calls=3,
    )
    assert [tool.function.name for tool in made.tools] == ["f"] and made.logprobs
    assert sorted(ignored) == [
        "include:reasoning.encrypted_content",
        "input.1:web_search_call",
        "max_tool_calls",
        "text.verbosity",
        "tools.0:web_search",
        "tools.2:namespace",
        "truncation",
    ]
    assert len(made.messages) == 1


def test_tool_choices() -> None:
    other = TOOL | {"name": "g"}
    assert chat(tools=[TOOL], tool_choice="required").tool_choice == "required"
    named = chat(tools=[TOOL], tool_choice={"type": "function", "name": "f"}).tool_choice
    assert isinstance(named, NamedTool) and named.function.name == "f"
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [TOOL]}
    made = chat(tools=[TOOL, other], tool_choice=allowed)
    assert made.tool_choice == "required" and [t.function.name for t in made.tools] == ["f"]


def test_formats_of_text() -> None:
    schema = {"type": "object"}
    given = {"format": {"type": "json_schema", "name": "x", "schema": schema, "strict": True}}
    assert chat(text=given).response_format.json_schema.schema_ == schema
    assert chat(text={"format": {"type": "json_object"}}).response_format.type == "json_object"
    assert chat(text={"verbosity": "medium"}).response_format is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"background": True}, "background is not supported; leave it out"),
        ({"conversation": "conv_1"}, "conversation is not supported; send the whole"),
        ({"conversation": {"id": "conv_1"}}, "conversation is not supported"),
        ({"prompt": {"id": "p"}}, "prompt is not supported; send the text"),
        ({"input": [{"type": "item_reference", "id": "a"}]}, "input.0.type .* 'item_reference'"),
        ({"input": [{"role": "user"}]}, "input.0.content is missing; type 'message' needs it"),
        ({"input": [{"content": "a"}]}, "input.0.role is missing"),
        ({"input": [CALL | {"call_id": None}]}, "input.0.call_id is missing"),
        ({"input": [USER | {"content": [{"type": "input_image"}]}]}, "only text .* 'input_image'"),
        ({"tools": [{"type": "function"}]}, "tools.0.name is missing"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice.type .* got 'web_search'"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema is missing"),
    ],
)
def test_what_is_refused_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ApiError, match=message) as refused:
        chat(**fields)
    assert refused.value.status == 400 and refused.value.param


# -- answers ---------------------------------------------------------------------------------------


def answer(
    mode: Mode = "off", kept_in: ResponseStore | None = None, owner: str = "", **fields: Any
) -> ResponsesAnswer:
    tokenizer = SimpleNamespace(
        chat_template_text=TEMPLATE, token_id=lambda text: 7 if text == "</think>" else None
    )
    requests = SimpleNamespace(
        require_tokenizer=lambda what: tokenizer, defaults=SamplingParams(), tokenizer=tokenizer
    )
    settings = AnswerSettings(response_store=kept_in or ResponseStore())
    context = Context("resp-1", "m", cast(Any, requests), settings, owner)
    made = ResponsesAnswer(body(**fields), context)
    made._chat._reasoning = Reasoning(THINK, mode)  # `prompts` reads it off the prompt
    return made


def output(text: str, reason: Any = None, token_ids: list[int] | None = None) -> RequestOutput:
    completion = CompletionOutput(0, text, token_ids or [1, 1], finish_reason=reason)
    return cast(
        RequestOutput,
        SimpleNamespace(prompt_token_ids=[1] * 10, num_cached_tokens=4, outputs=[completion]),
    )


def events_of(raw: bytes) -> list[Any]:
    events = []
    for block in raw.decode().strip().split("\n\n"):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}" and event["sequence_number"] == len(events)
        events.append(event)
    return events


def streamed(made: ResponsesAnswer, pieces: list[str], reason: Any = "stop") -> list[Any]:
    raw = made.begin()
    for i, piece in enumerate(pieces):
        grown = output(piece, reason if i == len(pieces) - 1 else None)
        raw += made.grow(0, grown, grown.outputs[0])
    return events_of(raw + made.end())


def kinds(events: list[Any]) -> list[str]:
    """The types of events, without the prefix, and each run of deltas as one."""
    found = [event["type"].removeprefix("response.") for event in events]
    return [kind for i, kind in enumerate(found) if i == 0 or kind != found[i - 1]]


CALLED = (
    "<think>\nhm, so\n</think>\nI look."
    '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
)


def events_of_item(kind: str, part: str | None = "content_part") -> list[str]:
    inner = [f"{kind}.delta", f"{kind}.done"]
    if part is not None:
        inner = [f"{part}.added", *inner, f"{part}.done"]
    return ["output_item.added", *inner, "output_item.done"]


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize("summary", [None, "auto"])
def test_events_of_reasoning_text_and_calls(size: int, summary: str | None) -> None:
    pieces = [CALLED[i : i + size] for i in range(0, len(CALLED), size)]
    events = streamed(answer("leading", tools=[TOOL], reasoning={"summary": summary}), pieces)
    reasoning = events_of_item("reasoning_text")
    if summary:
        reasoning = events_of_item("reasoning_summary_text", "reasoning_summary_part")
    call = events_of_item("function_call_arguments", None)
    text = events_of_item("output_text")
    start = ["created", "in_progress"]
    assert kinds(events) == [*start, *reasoning, *text, *call, *call, "completed"]
    for event in events[:2]:
        assert event["response"]["status"] == "in_progress" and event["response"]["output"] == []
    grown: dict[str, str] = {}
    for event in events:
        if event["type"].endswith(".delta"):
            grown[event["item_id"]] = grown.get(event["item_id"], "") + event["delta"]
    items = events[-1]["response"]["output"]
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == items and [item["id"] for item in items] == list(grown)
    thought, said, first, second = items
    shown = thought["summary"] if summary else thought["content"]
    assert shown[0]["text"] == grown[thought["id"]] == "hm, so"
    assert said["content"][0]["text"] == grown[said["id"]] == "I look."
    assert json.loads(first["arguments"]) == {"a": 1} and second["arguments"] == "{}"
    assert first["call_id"] != second["call_id"] and {i["status"] for i in items} == {"completed"}


@pytest.mark.parametrize("size", range(1, 60))
def test_text_behind_a_call_leaves_the_call_whole(size: int) -> None:
    text = CALLED.partition("</think>")[2] + "\nThat was all."
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    items = streamed(answer(tools=[TOOL]), pieces)[-1]["response"]["output"]
    calls = [json.loads(item["arguments"]) for item in items if item["type"] == "function_call"]
    said = "".join(i["content"][0]["text"] for i in items if i["type"] == "message")
    assert calls == [{"a": 1}, {}] and said.split() == ["I", "look.", "That", "was", "all."]


@pytest.mark.parametrize("text", [CALLED, CALLED + "\nThat was all."])
def test_a_whole_answer_has_the_items_of_the_stream(text: str) -> None:
    whole = answer("leading", tools=[TOOL]).whole([output(text, "stop")], 2)
    last = streamed(answer("leading", tools=[TOOL]), list(text))[-1]["response"]

    def without_ids(response: dict[str, Any]) -> str:
        return re.sub(r'"[a-z]+_[0-9a-f]{24,}"', "", json.dumps(response["output"]))

    assert without_ids(whole) == without_ids(last)
    assert set(whole) == set(last) and whole["status"] == last["status"] == "completed"
    assert whole["usage"]["input_tokens_details"]["cached_tokens"] == 4
    assert last["usage"]["output_tokens"] == 2 * len(text)


def test_a_truncated_answer_is_incomplete() -> None:
    events = streamed(answer(), ["It", " is"], "length")
    response = events[-1]["response"]
    assert events[-1]["type"] == "response.incomplete" and response["status"] == "incomplete"
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert response["output"][0]["status"] == "incomplete"
    assert response["output"][0]["content"][0]["text"] == "It is"


def test_a_response_repeats_what_was_asked_for() -> None:
    choice = {"type": "function", "name": "f"}
    fields: dict[str, Any] = {"tool_choice": choice, "metadata": {"a": "b"}, "temperature": 0.5}
    given = {"type": "json_schema", "name": "x", "schema": {"type": "object"}}
    made = answer(tools=[TOOL, {"type": "web_search"}], text={"format": given}, **fields)
    response = made.whole([output("a", "stop")], 1)
    assert {name: response[name] for name in fields} == fields
    assert response["tools"] == [TOOL | {"strict": None}] and response["text"] == {"format": given}


def test_an_answer_without_a_word_has_an_empty_message() -> None:
    response = answer().whole([output("", "stop")], 1)
    assert [part["text"] for part in response["output"][0]["content"]] == [""]
    assert "output_text.delta" not in kinds(streamed(answer(), [""]))


def test_an_error_in_a_stream_ends_the_open_item_and_the_response() -> None:
    made, grown = answer(), output("It")
    raw = made.begin() + made.grow(0, grown, grown.outputs[0]) + made.fail(ApiError(503, "later"))
    events = events_of(raw)
    assert kinds(events)[-2:] == ["output_item.done", "failed"] and made.last_event == b""
    response = events[-1]["response"]
    assert response["status"] == "failed" and response["output"][0]["status"] == "incomplete"
    assert response["error"] == {"code": "server_error", "message": "later"}


def test_errors_of_the_chat_name_the_fields_of_the_body() -> None:
    made = answer()
    made._chat.prompts = lambda chat: (_ for _ in ()).throw(  # type: ignore[method-assign]
        ApiError(400, "messages must be shorter", "messages")
    )
    with pytest.raises(ApiError, match="input must be shorter") as refused:
        made.prompts(body())
    assert refused.value.param == "input"


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        ([("a", [1, 2]), ("b", [3])], 3),  # never ends
        ([("", [1]), ("a", [2, 7]), (None, [3])], 3),  # with the token that ends it
        ([("a", [1, 2, 7, 4, 5])], 3),  # all in one piece
        ([(None, [1, 2])], 0),  # without reasoning
    ],
)
def test_tokens_of_reasoning(pieces: list[tuple[str | None, list[int]]], expected: int) -> None:
    count = ReasoningCount(7)
    for text, token_ids in pieces:
        count.add(token_ids, {"content": "c"} if text is None else {"reasoning": text})
    assert count.total == expected


# -- responses that are kept -----------------------------------------------------------------------


def kept(num_bytes: int) -> StoredResponse:
    return StoredResponse(b"x" * num_bytes, b"")


def test_the_store_keeps_the_responses_that_were_used_last(monkeypatch: Any) -> None:
    monkeypatch.setattr(response_store, "MAX_STORED_BYTES", 10)
    store = ResponseStore(3)
    for name in "abc":
        store.add("", name, kept(3))
    store.get("", "a")
    store.add("", "d", kept(1))
    with pytest.raises(ApiError, match="'b' is not kept; the server keeps the last 3") as missing:
        store.get("", "b")
    assert missing.value.status == 404
    store.add("", "e", kept(9))  # only with `d` it fits
    for name, size in (("d", 1), ("e", 9)):
        assert len(store.get("", name).response) == size
    with pytest.raises(ApiError):
        store.get("", "a")
    store.remove("", "e")
    store.add("", "f", kept(9))
    assert len(store.get("", "d").response) == 1
    store.add("", "g", kept(11))  # too large for the store
    with pytest.raises(ApiError):
        store.get("", "g")


def test_stores_refuse_negative_sizes() -> None:
    with pytest.raises(ConfigError, match="responses_store must be at least 0, got -1"):
        ResponseStore(-1)


def test_a_response_continues_a_kept_one_of_the_same_key() -> None:
    store = ResponseStore(2)
    first = answer(kept_in=store, owner="k", tools=[TOOL], instructions="Be brief.")
    response = first.whole([output(CALLED.partition("</think>")[2], "stop")], 2)
    assert response["store"] and json.loads(store.get("k", response["id"]).response) == response
    result = {"type": "function_call_output", "call_id": "x", "output": "3"}
    fields = {"input": [result], "previous_response_id": response["id"], "store": False}
    second = answer(kept_in=store, owner="k", **fields)
    assert second._chat_body is not None
    messages = second._chat_body.messages
    assert [m.role for m in messages] == ["user", "assistant", "tool"]  # no earlier instructions
    assert len(messages[1].tool_calls or []) == 2 and messages[1].content == "\nI look."
    shown = second.whole([output("a", "stop")], 1)
    assert not shown["store"] and shown["previous_response_id"] == response["id"]
    with pytest.raises(ApiError, match="previous_response_id: response .* is not kept") as refused:
        answer(kept_in=store, owner="other", **fields)
    assert (refused.value.status, refused.value.param) == (400, "previous_response_id")


def test_without_a_store_nothing_is_kept_and_the_refusal_says_how() -> None:
    response = answer().whole([output("a", "stop")], 1)
    assert response["store"] is False
    with pytest.raises(ApiError, match="--responses-store N"):
        answer(previous_response_id=response["id"])
