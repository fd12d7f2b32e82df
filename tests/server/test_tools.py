"""Tools, reasoning and forms of answers, through the real `openai` client.

The model is random noise, and still calls what it has to: the grammar leaves it no choice.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jsonschema
import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel

pytestmark = pytest.mark.real_model  # its tokenizer

# As Hermes and Qwen have it, in short; a message's own keys show that they arrive.
TEMPLATE = """{% if tools %}<|im_start|>system
# Tools in <tool_call></tool_call>: {{ tools | tojson }}<|im_end|>
{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}{% for call in message.tool_calls or [] %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if reasoning_effort %}effort {{ reasoning_effort }} {% endif %}
{% if add_generation_prompt %}<|im_start|>assistant
{% if thinks %}<think>
{% endif %}{% endif %}{# </think> #}"""

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Paris", "Rome"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
CLOCK = {"type": "object", "properties": {"utc": {"type": "boolean"}}, "required": ["utc"]}
CLOCK["additionalProperties"] = False
SCHEMAS = {"get_weather": WEATHER, "clock": CLOCK}
TOOLS: Any = [
    {"type": "function", "function": {"name": name, "description": "It.", "parameters": schema}}
    for name, schema in SCHEMAS.items()
]
THINK_END = 3  # the token </think>
MESSAGES: Any = [{"role": "user", "content": "What is the weather?"}]


@pytest.fixture(scope="module")
def server(
    start_server: Callable[..., Any],
    tiny_chat_model: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Any:
    model = tmp_path_factory.mktemp("tools") / "model"
    shutil.copytree(tiny_chat_model, model)
    (model / "chat_template.jinja").write_text(TEMPLATE)
    text = (model / "tokenizer.json").read_text()
    tokenizer = json.loads(text.replace('"<repo_name>"', '"</think>"'))
    tokenizer["added_tokens"][THINK_END]["special"] = False  # as Qwen has it
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    return start_server("--responses-store", "3", model=model).wait_until_ready()


@pytest.fixture(scope="module")
def client(server: Any) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def chat(client: OpenAI, **fields: Any) -> Any:
    fixed = {"model": "tiny", "messages": MESSAGES, "max_completion_tokens": 200, "seed": 3}
    return client.chat.completions.create(**(fixed | fields))


def check_calls(calls: Any) -> None:
    assert calls
    for call in calls:
        assert call.id and call.type == "function"
        jsonschema.validate(json.loads(call.function.arguments), SCHEMAS[call.function.name])


@pytest.mark.parametrize("temperature", [0, 1])
def test_required_tools_are_called_as_their_schemas_say(temperature: int, client: OpenAI) -> None:
    for seed in range(2):
        answer = chat(
            client,
            tools=TOOLS,
            tool_choice="required",
            temperature=temperature,
            seed=seed,
            parallel_tool_calls=False,
        )
        (choice,) = answer.choices
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None and len(choice.message.tool_calls) == 1
        check_calls(choice.message.tool_calls)


@pytest.mark.parametrize("is_streamed", [False, True])
def test_anthropics_client_gets_calls_and_sends_results(is_streamed: bool, server: Any) -> None:
    from anthropic import Anthropic

    client = Anthropic(base_url=server.url, api_key="none", max_retries=0)
    fields: Any = {"model": "tiny", "messages": MESSAGES, "max_tokens": 200}
    fields["tools"] = [{"name": name, "input_schema": schema} for name, schema in SCHEMAS.items()]
    choice: Any = {"type": "tool", "name": "get_weather"}
    if is_streamed:
        with client.messages.stream(**fields, tool_choice=choice) as stream:
            answer: Any = stream.get_final_message()
    else:
        answer = client.messages.create(**fields, tool_choice=choice)
    (call,) = answer.content
    assert answer.stop_reason == "tool_use" and (call.type, call.name) == (
        "tool_use",
        "get_weather",
    )
    jsonschema.validate(call.input, WEATHER)
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}
    more = [
        {"role": "assistant", "content": answer.content},
        {"role": "user", "content": [result]},
    ]
    first = client.messages.count_tokens(model="tiny", messages=MESSAGES, tools=fields["tools"])
    fields |= {"messages": MESSAGES + more, "max_tokens": 4}
    usage = client.messages.create(**fields, tool_choice={"type": "none"}).usage
    without = client.messages.count_tokens(model="tiny", messages=fields["messages"]).input_tokens
    assert usage.input_tokens + usage.cache_read_input_tokens == without
    assert (
        first.input_tokens
        > client.messages.count_tokens(model="tiny", messages=MESSAGES).input_tokens
    )


FUNCTIONS: Any = [
    {"type": "function", "name": name, "parameters": schema, "strict": True}
    for name, schema in SCHEMAS.items()
]


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_response_calls_tools_and_takes_their_results(is_streamed: bool, client: OpenAI) -> None:
    asked: Any = {"model": "tiny", "input": "Weather?", "tools": FUNCTIONS}
    asked["tool_choice"] = {"type": "function", "name": "get_weather"}
    if is_streamed:
        with client.responses.stream(**asked) as stream:
            kinds = [event.type for event in stream]
            answer: Any = stream.get_final_response()
        assert "response.function_call_arguments.delta" in kinds
    else:
        answer = client.responses.create(**asked)
    (call,) = answer.output
    assert answer.status == "completed" and (call.type, call.name) == (
        "function_call",
        "get_weather",
    )
    jsonschema.validate(json.loads(call.arguments), WEATHER)
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    more: Any = {"model": "tiny", "tools": FUNCTIONS, "max_output_tokens": 4}
    whole = client.responses.create(
        input=[{"role": "user", "content": "Weather?"}, call, result], **more
    )
    rest = client.responses.create(input=[result], previous_response_id=answer.id, **more)
    assert rest.usage is not None and whole.usage is not None
    assert rest.usage.input_tokens == whole.usage.input_tokens > answer.usage.total_tokens


def test_kept_responses_are_found_until_they_are_deleted_or_old(client: OpenAI) -> None:
    fields: Any = {"model": "tiny", "input": "hi", "max_output_tokens": 1}
    first, unkept, *others = [
        client.responses.create(**fields, store=number != 1) for number in range(5)
    ]
    for missing in (first, unkept):  # three are kept, and there were four
        with pytest.raises(openai.NotFoundError, match="the server keeps the last 3"):
            client.responses.retrieve(missing.id)
    for response in others:
        assert client.responses.retrieve(response.id).output_text == response.output_text
    client.responses.delete(others[0].id)
    with pytest.raises(openai.NotFoundError):
        client.responses.delete(others[0].id)


def test_reasoning_of_a_response(client: OpenAI) -> None:
    """The tiny model never ends its reasoning, so the answer is nothing else."""
    fields: Any = {"model": "tiny", "input": "hi", "max_output_tokens": 6}
    thinks: Any = {"chat_template_kwargs": {"thinks": True}}
    for summary in (None, "auto"):
        answer: Any = client.responses.create(
            **fields, reasoning={"effort": "low", "summary": summary}, extra_body=thinks
        )
        (item,) = answer.output
        (shown,) = item.summary or item.content
        assert item.type == "reasoning" and bool(item.summary) == bool(summary) and shown.text
        assert answer.usage.output_tokens_details.reasoning_tokens == 6


def test_a_named_tool_is_the_one_that_is_called(client: OpenAI) -> None:
    for name in SCHEMAS:
        chosen: Any = {"type": "function", "function": {"name": name}}
        answer = chat(client, tools=TOOLS, tool_choice=chosen, n=3)
        for choice in answer.choices:
            (call,) = choice.message.tool_calls
            assert call.function.name == name
            check_calls([call])


def test_several_calls_may_come_and_streams_add_up_to_them(client: OpenAI) -> None:
    most = 0
    fields: dict[str, Any] = {"tools": TOOLS, "tool_choice": "required", "temperature": 1}
    for seed in range(3):
        fields |= {"seed": seed, "max_completion_tokens": 80}
        whole = chat(client, **fields).choices[0]
        streamed: dict[int, dict[str, str]] = {}
        reason, content = None, ""
        for chunk in chat(client, stream=True, **fields):
            (choice,) = chunk.choices
            reason = choice.finish_reason or reason
            content += choice.delta.content or ""
            for call in choice.delta.tool_calls or ():
                if call.index not in streamed:
                    assert call.id and call.type == "function" and call.function.name
                    streamed[call.index] = {"name": call.function.name, "arguments": ""}
                else:
                    assert call.id is None and call.function.name is None
                streamed[call.index]["arguments"] += call.function.arguments or ""
        assert reason == whole.finish_reason
        calls = whole.message.tool_calls
        assert [streamed[i] for i in range(len(streamed))] == [
            {"name": c.function.name, "arguments": c.function.arguments} for c in calls
        ]
        assert content == (whole.message.content or "")  # of a call that was cut off at its name
        if reason == "tool_calls":
            check_calls(calls)
            assert not content
        most = max(most, len(calls))
    assert most > 1


def test_a_call_that_is_cut_off_shows_nothing_of_its_markup(client: OpenAI) -> None:
    """Wherever that is: in a marker, in the name or in the arguments."""
    fields: dict[str, Any] = {"tools": TOOLS, "tool_choice": "required", "temperature": 0}
    for limit in (1, 2, 3, 4, 6, 8, 11, 15, 20):
        (choice,) = chat(client, max_completion_tokens=limit, **fields).choices
        assert choice.finish_reason == "length"
        assert not choice.message.content
        for call in choice.message.tool_calls or ():
            assert call.function.name in SCHEMAS and call.function.arguments.startswith("{")


def test_the_clients_own_stream_puts_calls_together(client: OpenAI) -> None:
    strict = [{**one, "function": {**one["function"], "strict": True}} for one in TOOLS]
    with client.chat.completions.stream(
        model="tiny",
        messages=MESSAGES,
        tools=strict,
        tool_choice="required",
        parallel_tool_calls=False,
        seed=1,
    ) as stream:
        kinds = {event.type for event in stream}
        (choice,) = stream.get_final_completion().choices
    assert "tool_calls.function.arguments.delta" in kinds
    assert choice.finish_reason == "tool_calls"
    check_calls(choice.message.tool_calls)


def test_auto_leaves_the_model_its_words(client: OpenAI) -> None:
    answer = chat(client, tools=TOOLS, max_completion_tokens=12)
    (choice,) = answer.choices
    assert choice.finish_reason == "length"
    assert choice.message.content and choice.message.tool_calls is None
    without = chat(client, max_completion_tokens=12)
    assert answer.usage.prompt_tokens > without.usage.prompt_tokens + 50  # the tools
    none = chat(client, tools=TOOLS, tool_choice="none", max_completion_tokens=12)
    assert none.usage.prompt_tokens == without.usage.prompt_tokens
    assert none.choices[0].message.content == without.choices[0].message.content


def test_a_conversation_with_calls_and_results_goes_on(client: OpenAI, server: Any) -> None:
    call = {"id": "call_1", "type": "function"}
    call["function"] = {"name": "clock", "arguments": '{"utc": true}'}
    messages = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "noon"},
    ]
    answer = chat(client, messages=messages, tools=TOOLS, max_completion_tokens=4)
    assert answer.usage.completion_tokens == 4
    status, ids = server.post("/tokenize", {"messages": messages})
    assert status == 200
    _, text = server.post("/detokenize", {"tokens": ids["tokens"]})
    assert '{"name": "clock", "arguments": {"utc": true}}' in text["prompt"]  # an object again
    assert "<|im_start|>tool\nnoon" in text["prompt"]


def test_reasoning_effort_reaches_the_template(client: OpenAI) -> None:
    plain = chat(client, max_completion_tokens=1).usage.prompt_tokens
    assert chat(client, max_completion_tokens=1, reasoning_effort="low").usage.prompt_tokens > plain


def test_reasoning_is_told_apart(client: OpenAI) -> None:
    """The prompt ends with <think>, and noise never closes it."""
    thinks = {"extra_body": {"chat_template_kwargs": {"thinks": True}}, "max_completion_tokens": 9}
    message = chat(client, **thinks).choices[0].message
    assert message.content == "" and message.reasoning
    reasoning = ""
    for chunk in chat(client, stream=True, **thinks):
        assert not chunk.choices[0].delta.content
        reasoning += getattr(chunk.choices[0].delta, "reasoning", None) or ""
    assert reasoning == message.reasoning


# -- reasoning before forms ----------------------------------------------------------------------


THINKS: Any = {
    "chat_template_kwargs": {"thinks": True},
    "logit_bias": {str(THINK_END): 9},  # as likely as all the other tokens together, or nearly
    "temperature": 1,
    "seed": 4,
}


@pytest.mark.parametrize("is_called", [False, True])
def test_a_form_holds_after_the_reasoning(is_called: bool, client: OpenAI) -> None:
    """Noise, then </think>, then the form."""
    schema = {"type": "json_schema", "json_schema": {"name": "r", "schema": WEATHER}}
    form: Any = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}
    form = form if is_called else {"response_format": schema}
    answer = chat(client, extra_body=THINKS, n=3, **form)
    thoughts: dict[int, str] = {}
    for choice in answer.choices:
        message = choice.message
        thoughts[choice.index] = getattr(message, "reasoning", None) or ""
        if is_called:
            assert choice.finish_reason == "tool_calls" and message.content is None
            check_calls(message.tool_calls)
        else:
            jsonschema.validate(json.loads(message.content), WEATHER)
    assert max(map(len, thoughts.values())) > 10
    streamed = dict.fromkeys(thoughts, "")
    for chunk in chat(client, extra_body=THINKS, n=3, stream=True, **form):
        (part,) = chunk.choices
        streamed[part.index] += getattr(part.delta, "reasoning", None) or ""
    assert streamed == thoughts
    (cut,) = chat(
        client, extra_body=THINKS | {"logit_bias": {}}, max_completion_tokens=5, **form
    ).choices
    assert cut.finish_reason == "length" and cut.message.reasoning
    assert not cut.message.content and not cut.message.tool_calls


# -- forms of answers -----------------------------------------------------------------------------


class Report(BaseModel):
    kind: Literal["sun", "rain"]
    certain: bool
    degrees: list[Literal[1, 2, 3]]


def test_parse_returns_the_callers_class(client: OpenAI) -> None:
    for seed in range(2):
        answer = client.chat.completions.parse(
            model="tiny", messages=MESSAGES, response_format=Report, seed=seed, max_tokens=300
        )
        assert answer.choices[0].finish_reason == "stop"
        assert isinstance(answer.choices[0].message.parsed, Report)


def test_a_format_of_the_answer_leaves_calls_possible(client: OpenAI) -> None:
    """With tools and a schema the answer is one or the other."""
    seen = set()
    schema = {"type": "json_schema", "json_schema": {"name": "r", "schema": CLOCK}}
    for seed in range(8):
        answer = chat(client, tools=TOOLS, response_format=schema, seed=seed, temperature=2)
        message = answer.choices[0].message
        seen.add(message.tool_calls is None)
        if message.tool_calls is None:
            jsonschema.validate(json.loads(message.content), CLOCK)
        elif answer.choices[0].finish_reason == "tool_calls":
            check_calls(message.tool_calls)
    assert seen == {True, False}


def test_other_servers_forms_work_for_chats_and_texts(client: OpenAI) -> None:
    form = {"structured_outputs": {"choice": ["red", "green"]}}
    assert chat(client, extra_body=form).choices[0].message.content in ("red", "green")
    text = client.completions.create(model="tiny", prompt="x", extra_body=form, n=4)
    assert {choice.text for choice in text.choices} <= {"red", "green"}
    assert {choice.finish_reason for choice in text.choices} == {"stop"}
    pattern = {"structured_outputs": {"regex": "[0-9]{3}-[0-9]{2}"}}
    streamed = client.completions.create(
        model="tiny", prompt=["x", "y"], extra_body=pattern, stream=True
    )
    texts = ["", ""]
    for chunk in streamed:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert all(len(text) == 6 and text[3] == "-" for text in texts)


TAG = {"begin": "<f>", "schema": CLOCK, "end": "</f>"}
DEEP: Any = {"type": "object"}
for _ in range(70):
    DEEP = {"type": "array", "items": DEEP}


def tool(name: str = "f", **schema: Any) -> Any:
    return {"type": "function", "function": {"name": name, "parameters": schema}}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tool_choice": "required"}, "tool_choice needs tools"),
        ({"tools": TOOLS, "tool_choice": tool("nope")}, "names 'nope'; the tools are get_weather"),
        ({"tools": [tool("a b")]}, "tools.0.function.name"),
        ({"tools": [tool()] * 2}, "tools has 'f' twice"),
        ({"tools": [tool(f"f{i}") for i in range(129)]}, "at most 128 items"),
        ({"tools": [tool(x="y" * 2**18)]}, "must be at most 262144 bytes of JSON"),
        ({"tools": [tool(**DEEP)]}, "nested at most 64 deep"),
        (
            {"tools": [tool(uniqueItems=True)], "tool_choice": "required"},
            "tools: the schema at #: uniqueItems true cannot be enforced",
        ),
        ({"response_format": {"type": "nope"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "needs a json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": DEEP}}},
            "nested at most 64 deep",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}},
            'response_format: the schema at #: type "x" must be one of',
        ),
        ({"response_format": {"type": "structural_tag", "format": {}}}, "'structures' and 'trigge"),
        (
            {
                "response_format": {"type": "json_object"},
                "extra_body": {"structured_outputs": {"regex": "a"}},
            },
            "not both",
        ),
        ({"extra_body": {"structured_outputs": {}}}, "exactly one of json, regex, .*got none"),
        ({"extra_body": {"structured_outputs": {"regex": "(?=a)b"}}}, "look-around"),
        ({"extra_body": {"structured_outputs": {"grammar": "start: x"}}}, 'unknown name: "x"'),
        (
            {"extra_body": {"structured_outputs": {"regex": "a"}, "min_tokens": 3}},
            "min_tokens does not go with structured_outputs",
        ),
        ({"extra_body": {"chat_template_kwargs": {"tools": []}}}, "must not have .*tools"),
    ],
)
def test_bad_fields_are_answered_with_their_name(
    fields: dict[str, Any], message: str, client: OpenAI
) -> None:
    with pytest.raises(openai.BadRequestError, match=message) as refused:
        chat(client, **fields)
    assert refused.value.type == "invalid_request_error"
    assert chat(client, max_completion_tokens=1).choices  # it goes on


@pytest.mark.parametrize("depth", [70, 500, 100_000])
def test_bodies_nested_without_end_are_refused(depth: int, server: Any) -> None:
    """As raw JSON, which a client's library would not even write."""
    deep = '{"items":' * depth + "{}" + "}" * depth
    ask = '{"messages":[{"role":"user","content":"x"}],"max_tokens":1,'
    function = f'{{"type":"function","function":{{"name":"f","parameters":{deep}}}}}'
    for field in (
        f'"tools":[{function}]',
        f'"structured_outputs":{{"json":{deep}}}',
        f'"structured_outputs":{{"json":{json.dumps(deep)}}}',
        f'"response_format":{{"type":"json_schema","json_schema":{{"schema":{deep}}}}}',
        f'"response_format":{{"type":"structural_tag","triggers":["<"],"structures":[{deep}]}}',
    ):
        status, answer = server.post("/v1/chat/completions", (ask + field + "}").encode())
        assert status == 400, answer
        assert answer["error"]["type"] == "invalid_request_error"
