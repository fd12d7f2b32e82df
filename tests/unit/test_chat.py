"""A chat's choices: where reasoning is looked for, its effort, messages beside their deltas."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any, cast

import pytest

from compiledllm.outputs import CompletionOutput
from compiledllm.sampling_params import SamplingParams
from compiledllm.server.anthropic.messages_answer import MessagesAnswer
from compiledllm.server.openai.answer import Answer, Context
from compiledllm.server.openai.bodies import parse
from compiledllm.server.openai.chat_answer import ChatAnswer
from compiledllm.server.openai.chat_choice import Choice
from compiledllm.server.openai.chat_prompt import effort_arguments
from compiledllm.server.openai.errors import as_api_error
from compiledllm.server.openai.reasoning_formats import THINK, Mode, Reasoning, find_reasoning
from compiledllm.server.openai.responses_answer import ResponsesAnswer
from compiledllm.server.openai.serving import failure_of
from compiledllm.server.openai.tool_formats import FORMATS
from compiledllm.server.openai.tools import ToolUse
from compiledllm.structured_outputs import ReasoningTokens, StructuredOutputsParams

ANSWER = (
    "<think>Hm.</think>So:"
    '<tool_call>{"name": "f", "arguments": {"a": [1, 2]}}</tool_call>'
    '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
)


def use(name: str = "hermes", max_calls: int | None = None) -> ToolUse:
    return ToolUse(FORMATS[name], {"f": None}, [], None, max_calls)


@pytest.mark.parametrize(
    ("parser", "template", "prompt", "mode"),
    [
        ("auto", "no word of it", "<think>\n", "off"),
        ("auto", "... </think>", "assistant\n", "leading"),
        ("auto", "... </think>", "assistant\n<think>\n", "begun"),
        ("auto", "... </think>", "assistant\n<think>\n\n</think>\n\n", "off"),
        ("none", "... </think>", "assistant\n<think>\n", "off"),
        ("qwen3", "", "assistant\n", "leading"),
        ("deepseek_r1", "", "assistant\n", "begun"),
        ("deepseek_r1", "", "assistant\n</think>\n", "off"),
    ],
)
def test_reasoning_is_looked_for_where_it_may_be(
    parser: str, template: str, prompt: str, mode: str
) -> None:
    form = find_reasoning(parser, template)
    assert (form.mode(prompt) if form else "off") == mode


THINK_IDS = {"<think>": 3, "</think>": 4, "<tool_call>": 5}
CONVERSATION: Any = [{"role": "user", "content": "hi"}]
SCHEMA = {"type": "object"}
CHAT_BODY = {
    "messages": CONVERSATION,
    "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}},
}
FORM = {"type": "json_schema", "name": "s", "schema": SCHEMA}
RESPONSES_BODY = {"input": "hi", "text": {"format": FORM}}
FUNCTION = {"name": "f", "input_schema": SCHEMA}
MESSAGES_BODY = {"messages": CONVERSATION, "max_tokens": 9, "tools": [FUNCTION]}
MESSAGES_BODY["tool_choice"] = {"type": "any"}


def after_prompt(
    kind: type[Answer[Any]],
    fields: dict[str, Any],
    ids: dict[str, int],
    prompt: str,
    template: str = "tools <parameter= </think>",
) -> tuple[StructuredOutputsParams, Mode]:
    """The form and the reasoning of an answer to a prompt. ids: the tokenizer's added tokens."""
    tokenizer = SimpleNamespace(
        chat_template_text=template,
        token_id=ids.get,
        check_length=lambda *sizes: None,
        encode_chat=lambda messages, **options: (prompt, [1]),
        encode=lambda text, add_special_tokens: [7] if text == "\n\n" else [8, 8],
        decode=lambda ids: "",
    )
    requests = SimpleNamespace(
        require_tokenizer=lambda what: tokenizer,
        defaults=SamplingParams(),
        max_tokenized=lambda is_truncated: 100,
        eos_token_ids=frozenset(),
    )
    body = parse(kind.body_type, json.dumps(fields).encode())
    made = kind(body, Context("x", "m", cast(Any, requests)))
    made.prompts(body)
    chat: Any = made if isinstance(made, ChatAnswer) else made._chat  # type: ignore[attr-defined]
    assert made.params.structured_outputs is not None
    return made.params.structured_outputs, chat._reasoning.mode


@pytest.mark.parametrize(
    ("kind", "fields", "form_start"),
    [
        (ChatAnswer, CHAT_BODY, None),
        (ResponsesAnswer, RESPONSES_BODY, None),
        (MessagesAnswer, MESSAGES_BODY, 5),
    ],
)
def test_forms_wait_for_the_reasoning_that_the_prompt_shows(
    kind: type[Answer[Any]], fields: dict[str, Any], form_start: int | None
) -> None:
    for prompt, mode, start in (("<think>\n", "begun", None), ("assistant\n", "leading", 3)):
        form, found = after_prompt(kind, fields, THINK_IDS, prompt)
        assert form.reasoning == ReasoningTokens(4, start, form_start, (7,)) and found == mode
    for ids, prompt in ((THINK_IDS, "<think>\n\n</think>\n\n"), ({"<think>": 3}, "<think>\n")):
        form, found = after_prompt(kind, fields, ids, prompt)
        assert form.reasoning is None and found == "off"


def test_json_of_gpt_oss_stands_in_its_channels() -> None:
    form, mode = after_prompt(ChatAnswer, CHAT_BODY, {}, "<|start|>assistant", "<|channel|>")
    assert mode == "channels" and form.reasoning is None
    assert form.grammar is not None and "<|channel|>final" in form.grammar


@pytest.mark.parametrize(
    ("template", "effort", "expected"),
    [
        ("{{ reasoning_effort }} {{ enable_thinking }}", "none", {"reasoning_effort": "none"}),
        ("{{ enable_thinking }}", "none", {"enable_thinking": False}),
        ("{{ enable_thinking }}", "low", {}),
        ("no word of it", "none", {}),
    ],
)
def test_efforts_reach_the_variables_that_a_template_has(
    template: str, effort: str, expected: dict[str, Any]
) -> None:
    tokenizer = cast(Any, SimpleNamespace(chat_template_text=template))
    assert effort_arguments(tokenizer, effort) == expected


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_deltas_add_up_to_the_message(size: int) -> None:
    message = Choice(use(), Reasoning(THINK, "leading")).message(ANSWER)
    choice, added = Choice(use(), Reasoning(THINK, "leading")), {"content": "", "reasoning": ""}
    calls: dict[int, dict[str, str]] = {}
    pieces = [ANSWER[i : i + size] for i in range(0, len(ANSWER), size)]
    for i, piece in enumerate(pieces):
        delta = choice.delta(piece, is_last=i == len(pieces) - 1)
        for name in added:
            added[name] += delta.get(name, "")
        for call in delta.get("tool_calls", ()):
            assert ("id" in call) == ("name" in call["function"]) == (call["index"] not in calls)
            known = calls.setdefault(call["index"], {"arguments": ""})
            known["arguments"] += call["function"]["arguments"]
    assert choice.has_calls
    assert added == {"content": message["content"], "reasoning": message["reasoning"]}
    assert added == {"content": "So:", "reasoning": "Hm."}
    assert [calls[i]["arguments"] for i in (0, 1)] == ['{"a": [1, 2]}', "{}"]
    told = [call["function"] for call in message["tool_calls"]]
    assert told == [{"name": "f", "arguments": calls[i]["arguments"]} for i in (0, 1)]


def test_plain_answers_have_content_only() -> None:
    message = Choice(None, Reasoning()).message("Hi. ")
    assert message == {"role": "assistant", "content": "Hi. ", "refusal": None}
    assert Choice(None, Reasoning()).delta("", is_last=False) == {}


def test_ids_are_as_templates_want_them() -> None:
    ids = {use().new_call_id() for _ in range(100)}
    assert len(ids) == 100 and all(i.startswith("call_") and len(i) == 29 for i in ids)
    assert all(len(use("mistral").new_call_id()) == 9 for _ in range(3))
    assert use("mistral").new_call_id().isalnum()


@pytest.mark.parametrize(
    ("cause", "status"), [("structured_outputs: too many states", 400), ("the logits are NaN", 500)]
)
def test_a_grammar_that_fails_while_it_runs_is_the_clients_error(cause: str, status: int) -> None:
    ended = CompletionOutput(0, "", [], None, None, finish_reason="error", stop_reason=cause)
    error = as_api_error(failure_of(ended))
    assert (error.status, error.message) == (status, cause)
