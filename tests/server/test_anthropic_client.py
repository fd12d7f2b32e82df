"""The real `anthropic` client against a running server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import pytest
from pydantic import BaseModel

if TYPE_CHECKING:  # importing it takes seconds of every collection of tests
    from anthropic import Anthropic

pytestmark = pytest.mark.real_model  # its tokenizer

MESSAGES: Any = [{"role": "user", "content": "Name three colours of the sky."}]
TOOL: Any = {"name": "f", "input_schema": {"type": "object"}}
SEARCH: Any = {"type": "web_search_20250305", "name": "web_search"}


@pytest.fixture(scope="module")
def client(server: Any) -> Anthropic:
    from anthropic import Anthropic

    return Anthropic(base_url=server.url, api_key="none", max_retries=0)


def ask(client: Any, **fields: Any) -> Any:
    """Newer versions of the client have no argument for the temperature."""
    fixed = {"model": "tiny", "messages": MESSAGES, "max_tokens": 8}
    fixed["extra_body"] = {"temperature": fields.pop("temperature", 0)}
    return client.messages.create(**(fixed | fields))


def num_input(usage: Any) -> int:
    """All tokens of the prompt: input_tokens leave out those of the prefix cache."""
    return int(usage.input_tokens + usage.cache_read_input_tokens)


def test_a_message_has_text_and_usage(client: Anthropic) -> None:
    answer = ask(client, system="Be brief. " * 20)
    again = ask(client, system=[{"type": "text", "text": "Be brief. " * 20}])
    assert answer.role == "assistant" and answer.stop_reason == "max_tokens"
    assert answer.content[0].type == "text" and again.content == answer.content
    assert answer.usage.output_tokens == 8 and again.usage.cache_read_input_tokens > 0
    assert num_input(again.usage) == num_input(answer.usage) > ask(client).usage.input_tokens
    assert answer._request_id


def test_streams_add_up_to_the_whole_message(client: Anthropic) -> None:
    whole = ask(client)
    fields: Any = {"model": "tiny", "messages": MESSAGES, "max_tokens": 8}
    with client.messages.stream(**fields, extra_body={"temperature": 0}) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    assert kinds[0] == "message_start" and kinds[-1] == "message_stop"
    assert final.content[0].text == whole.content[0].text
    assert final.stop_reason == "max_tokens" and final.usage.output_tokens == 8
    events = list(ask(client, stream=True))
    count = client.messages.count_tokens(model="tiny", messages=MESSAGES).input_tokens
    assert num_input(events[0].message.usage) == count == num_input(whole.usage)


class Weather(BaseModel):
    city: Literal["Paris", "Rome"]
    is_sunny: bool


def test_answers_follow_the_schema_of_a_model(client: Anthropic) -> None:
    answer = client.messages.parse(
        model="tiny", messages=MESSAGES, max_tokens=100, output_format=Weather
    )
    assert isinstance(answer.parsed_output, Weather)


def test_stop_sequences_end_the_text_and_are_named(client: Anthropic) -> None:
    text = ask(client, max_tokens=30).content[0].text
    stop = text[10:14]
    answer = ask(client, max_tokens=30, stop_sequences=[stop])
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", stop)
    assert answer.content[0].text == text[: text.index(stop)]
    *_, delta, _ = ask(client, max_tokens=30, stop_sequences=[stop], stream=True)
    assert (delta.delta.stop_reason, delta.delta.stop_sequence) == ("stop_sequence", stop)


def test_fields_without_effect_are_named(client: Anthropic) -> None:
    raw = client.messages.with_raw_response.create(
        model="tiny",
        messages=MESSAGES,
        max_tokens=1,
        tools=[SEARCH],
        thinking={"type": "enabled", "budget_tokens": 1024},
        service_tier="auto",
        output_config={"effort": "low"},
    )
    ignored = raw.headers["x-ignored-fields"].split(",")
    tools = "tools.0:web_search_20250305"
    assert ignored == ["service_tier", tools, "thinking", "output_config.effort"]
    assert raw.headers["request-id"] == raw.headers["x-request-id"]


WRONG: Any = {"type": "json_schema", "schema": {"type": "x"}}
IMAGE: Any = {"type": "image", "source": {"type": "url", "url": "http://127.0.0.1/a.png"}}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be an integer >= 1"),
        ({"temperature": 3}, "temperature must be"),
        ({"messages": []}, "messages must be"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, r"content.0.type .* got 'image'"),
        ({"tools": [{"name": "f"}]}, "tools.0.input_schema is missing"),
        ({"tools": [TOOL | {"name": "a b"}]}, "tools.0.name must be 1 to 128 letters"),
        ({"tools": [TOOL]}, "template knows no tools"),
        ({"tool_choice": {"type": "any"}}, "tool_choice needs tools"),
        ({"max_tokens": 5000}, "max_model_len=2048"),
        ({"output_config": {"format": WRONG}}, "output_config.format: the schema at #"),
    ],
)
def test_bad_fields_are_refused_by_name(
    fields: dict[str, Any], message: str, client: Anthropic
) -> None:
    import anthropic

    with pytest.raises(anthropic.BadRequestError, match=message) as refused:
        ask(client, **fields)
    body: Any = refused.value.body
    assert body["type"] == "error" and body["error"]["type"] == "invalid_request_error"


def test_max_tokens_is_required_and_models_must_exist(client: Anthropic, server: Any) -> None:
    import anthropic

    status, body = server.post("/v1/messages", {"messages": MESSAGES})
    assert status == 400 and "max_tokens is missing" in body["error"]["message"]
    with pytest.raises(anthropic.NotFoundError, match="'nope' does not exist") as refused:
        ask(client, model="nope")
    assert refused.value.body["error"]["type"] == "not_found_error"  # type: ignore[index]
    status, body = server.get("/v1/messages")
    assert status == 405 and body["type"] == "error"
