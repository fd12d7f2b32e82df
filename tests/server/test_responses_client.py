"""`/v1/responses` with the real `openai` client against a running server."""

from __future__ import annotations

from typing import Any, Literal

import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel

pytestmark = pytest.mark.real_model  # its tokenizer

QUESTION = "Name three colours of the sky."


class Weather(BaseModel):
    city: Literal["Paris", "Rome"]
    is_sunny: bool


@pytest.fixture(scope="module")
def client(server: Any) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def ask(client: OpenAI, **fields: Any) -> Any:
    fixed = {"model": "tiny", "input": QUESTION, "max_output_tokens": 8, "temperature": 0}
    return client.responses.create(**(fixed | fields))


def test_a_response_has_text_and_usage(client: OpenAI) -> None:
    answer = ask(client, instructions="Be brief. " * 20)
    chat: Any = [
        {"role": "system", "content": "Be brief. " * 20},
        {"role": "user", "content": QUESTION},
    ]
    said = client.chat.completions.create(
        model="tiny", messages=chat, max_completion_tokens=8, temperature=0
    )
    assert answer.output_text and answer.output_text == said.choices[0].message.content
    assert answer.status == "incomplete" and answer.incomplete_details.reason == "max_output_tokens"
    assert said.usage is not None and answer.usage.input_tokens == said.usage.prompt_tokens
    assert (
        answer.usage.output_tokens == 8 and answer.usage.output_tokens_details.reasoning_tokens == 0
    )
    again = ask(client, instructions="Be brief. " * 20)
    assert again.usage.input_tokens_details.cached_tokens > 0 and again.id != answer.id


def test_items_ask_for_the_same_as_a_text(client: OpenAI) -> None:
    items: Any = [{"role": "user", "content": [{"type": "input_text", "text": QUESTION}]}]
    first = ask(client)
    assert ask(client, input=items).output_text == first.output_text
    more = [*items, *first.output, {"role": "user", "content": "Why?"}]
    assert ask(client, input=more).usage.input_tokens > first.usage.total_tokens


def test_streams_add_up_to_the_whole_response(client: OpenAI) -> None:
    whole = ask(client)
    events = list(ask(client, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    start = ["created", "in_progress", "output_item.added", "content_part.added"]
    end = ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
    assert kinds[:4] == start and kinds[-4:] == end
    deltas = events[4:-4]
    assert {event.type for event in deltas} == {"response.output_text.delta"}
    assert "".join(event.delta for event in deltas) == whole.output_text
    last = events[-1].response
    assert last.output_text == whole.output_text and last.usage.output_tokens == 8


def test_the_clients_own_stream_and_parser_take_our_events(client: OpenAI) -> None:
    fields: Any = {"model": "tiny", "input": QUESTION, "temperature": 0, "text_format": Weather}
    parsed = client.responses.parse(**fields).output_parsed
    with client.responses.stream(**fields) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed"
    assert isinstance(parsed, Weather) and final.output_parsed == parsed


def test_log_probabilities_of_text(client: OpenAI) -> None:
    asked: Any = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    whole = ask(client, **asked).output[0].content[0]
    assert "".join(entry.token for entry in whole.logprobs) == whole.text
    assert len(whole.logprobs[0].top_logprobs) == 2
    deltas = [e for e in ask(client, **asked, stream=True) if e.type.endswith("text.delta")]
    streamed = [entry.logprob for event in deltas for entry in event.logprobs]
    assert streamed == [entry.logprob for entry in whole.logprobs]


def test_what_has_no_effect_is_named(client: OpenAI) -> None:
    raw = client.responses.with_raw_response.create(
        model="tiny",
        input=QUESTION,
        max_output_tokens=1,
        tools=[{"type": "web_search"}],
        reasoning={"effort": "low"},
        include=["reasoning.encrypted_content"],
        prompt_cache_retention="24h",
    )
    assert raw.headers["x-ignored-fields"].split(",") == [
        "prompt_cache_retention",
        "include:reasoning.encrypted_content",
        "tools.0:web_search",
        "reasoning.effort",
    ]
    assert raw.parse().store is False  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_output_tokens": 0}, "max_output_tokens must be an integer >= 1"),
        ({"max_output_tokens": 5000}, "max_output_tokens must be at most .* max_model_len=2048"),
        ({"input": []}, "input must be"),
        ({"input": "a " * 5000}, "2048"),
        ({"background": True}, "background is not supported"),
        ({"previous_response_id": "resp_1"}, "previous_response_id: .* --responses-store N"),
        ({"tools": [{"type": "function", "name": "f"}]}, "template knows no tools"),
        ({"tool_choice": "required"}, "tool_choice needs tools"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema is"),
        (
            {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "x"}}}},
            "text.format",
        ),
    ],
)
def test_bad_fields_are_refused_by_name(
    fields: dict[str, Any], message: str, client: OpenAI
) -> None:
    with pytest.raises(openai.BadRequestError, match=message) as refused:
        ask(client, **fields)
    body: Any = refused.value.body
    assert body["type"] == "invalid_request_error"
    assert body["param"].startswith(next(iter(fields)))


def test_without_a_store_no_response_is_found(client: OpenAI) -> None:
    response = ask(client)
    for call in (client.responses.retrieve, client.responses.delete):
        with pytest.raises(openai.BadRequestError, match="--responses-store N"):
            call(response.id)
