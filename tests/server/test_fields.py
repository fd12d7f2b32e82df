"""Each field that is accepted has its effect in every form of answer, or is refused in it."""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

pytest.importorskip("msgspec")

from compiledllm.server.openai.bodies import fields_of
from compiledllm.server.openai.protocol import ChatRequest, CompletionRequest

pytestmark = pytest.mark.real_model  # its tokenizer

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
FORMS = [(CHAT, False), (CHAT, True), (TEXT, False), (TEXT, True)]
BASE = {"max_tokens": 6, "temperature": 0, "ignore_eos": True}
ASKED: dict[str, dict[str, Any]] = {
    CHAT: BASE | {"messages": [{"role": "user", "content": "Tell me a story."}]},
    TEXT: BASE | {"prompt": "Once upon a time"},
}


@dataclass
class Answer:
    """One answer, whole or put together from a stream's events."""

    status: int
    error: dict[str, Any]
    choices: dict[int, dict[str, Any]]  # text, and every other field that was shown
    events: list[dict[str, Any]]
    id: str
    usage: dict[str, Any] | None
    ignored: str

    @property
    def text(self) -> str:
        return str(self.choices[0]["text"])


def ask(server: Any, path: str, streams: bool, **fields: Any) -> Answer:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
    body = ASKED[path] | {"stream": streams} | fields
    body = {name: value for name, value in body.items() if value is not ...}
    connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
    response = connection.getresponse()
    raw, ignored = response.read().decode(), response.getheader("x-ignored-fields") or ""
    connection.close()
    if response.status != 200:
        return Answer(response.status, json.loads(raw)["error"], {}, [], "", None, ignored)
    if not streams:
        events = [json.loads(raw)]
    else:
        lines = [line.removeprefix("data: ") for line in raw.split("\n\n") if line]
        assert lines.pop() == "[DONE]"
        events = [json.loads(line) for line in lines]
    assert not any("error" in event for event in events), events
    answer = Answer(200, {}, {}, events, events[0]["id"], None, ignored)
    for event in events:
        answer.usage = event.get("usage") or answer.usage
        for choice in event["choices"]:
            add(answer.choices.setdefault(choice["index"], {"text": ""}), choice)
    return answer


def add(whole: dict[str, Any], choice: dict[str, Any]) -> None:
    message = choice.get("message") or choice.get("delta") or {}
    whole["text"] += choice.get("text") or message.get("content") or ""
    for name in ("finish_reason", "stop_reason", "prompt_logprobs", "prompt_token_ids"):
        if choice.get(name) is not None:
            assert name not in whole or name in ("finish_reason", "stop_reason"), f"{name} twice"
            whole[name] = choice[name]
    whole["token_ids"] = whole.get("token_ids", []) + (choice.get("token_ids") or [])
    found = choice.get("logprobs") or {}
    for name in ("content", "tokens", "token_logprobs", "top_logprobs", "text_offset"):
        whole[name] = whole.get(name, []) + (found.get(name) or [])


Check = Callable[[Any, str, bool, Answer], bool]


def differs(server: Any, path: str, streams: bool, answer: Answer) -> bool:
    return answer.text != ask(server, path, streams).text


def is_greedy(server: Any, path: str, streams: bool, answer: Answer) -> bool:
    return not differs(server, path, streams, answer)


def said(what: str) -> Check:
    """Refused, with these words."""
    return lambda server, path, streams, answer: (
        answer.status == 400 and what in answer.error["message"] and bool(answer.error["param"])
    )


def shows(check: Callable[[Answer], Any]) -> Check:
    return lambda server, path, streams, answer: answer.status == 200 and bool(check(answer))


def of_ids(*expected: int) -> Check:
    return shows(lambda a: set(a.choices[0]["token_ids"]) == set(expected))


def of_tokens(count: int) -> Check:
    return shows(lambda a: len(a.choices[0]["token_ids"]) == count)


def entries(answer: Answer) -> int:
    """Tokens with log probabilities."""
    return len(answer.choices[0]["content"] or answer.choices[0]["token_logprobs"])


def has_prompt_scores(answer: Answer) -> bool:
    choice = answer.choices[0]
    return len(choice["prompt_logprobs"]) == len(choice["prompt_token_ids"])


def has_all_ids(answer: Answer) -> bool:
    choice = answer.choices[0]
    return len(choice["token_ids"]) == 6 and len(choice["prompt_token_ids"]) > 2


IDS = {"return_token_ids": True}
ONLY = {"logit_bias": {"504": 100}}  # this token
ENDS = {"logit_bias": {"2": 100}, "ignore_eos": False}  # at once
REPEATS = {"repetition_detection": {"max_pattern_size": 2, "min_count": 3}}
SCHEMA = {"type": "json_schema", "json_schema": {"schema": {"enum": ["a"]}}}
TAKEN = shows(lambda a: True)

# Fields to send, and what has to be seen of them.
BOTH: dict[str, tuple[dict[str, Any], Check]] = {
    "model": ({"model": "none"}, lambda s, p, st, a: a.status == 404),
    "frequency_penalty": ({"frequency_penalty": 2, "max_tokens": 30}, TAKEN),
    "presence_penalty": ({"presence_penalty": 2, "max_tokens": 30}, TAKEN),
    "repetition_penalty": ({"repetition_penalty": 50, "max_tokens": 12}, differs),
    "logit_bias": (ONLY | IDS, of_ids(504)),
    "n": ({"n": 3, "temperature": 1}, shows(lambda a: sorted(a.choices) == [0, 1, 2])),
    "seed": ({"seed": 5, "temperature": 1}, differs),
    "stream": ({}, TAKEN),  # the form itself
    "stream_options": (
        {"stream_options": {"include_usage": True}},
        shows(lambda a: a.usage["completion_tokens"] == 6),
    ),
    "temperature": ({"temperature": 2, "seed": 3}, differs),
    "top_p": ({"top_p": 1e-6, "temperature": 2, "seed": 3}, is_greedy),
    "top_k": ({"top_k": 1, "temperature": 2, "seed": 3}, is_greedy),
    "min_p": ({"min_p": 1, "temperature": 2, "seed": 3}, is_greedy),
    "user": ({"user": "me"}, TAKEN),  # OpenAI's own, for its statistics
    "stop_token_ids": (
        ONLY | {"stop_token_ids": [504]},
        shows(lambda a: a.choices[0]["stop_reason"] == 504),
    ),
    "stop": (
        ONLY | {"stop": "The"},
        shows(lambda a: a.choices[0]["stop_reason"] == "The"),
    ),
    "include_stop_str_in_output": (
        ONLY | {"stop_token_ids": [504], "include_stop_str_in_output": True},
        shows(lambda a: a.text != ""),
    ),
    "ignore_eos": (ENDS, shows(lambda a: a.choices[0]["finish_reason"] == "stop")),
    "min_tokens": (ENDS | {"min_tokens": 4} | IDS, of_tokens(5)),
    "skip_special_tokens": (
        ENDS | {"ignore_eos": True, "skip_special_tokens": False},
        shows(lambda a: "<|im_end|>" in a.text),
    ),
    "spaces_between_special_tokens": (
        {"spaces_between_special_tokens": False},
        said("must be True"),
    ),
    "truncate_prompt_tokens": (
        {"truncate_prompt_tokens": 2, **IDS},
        shows(lambda a: len(a.choices[0]["prompt_token_ids"]) == 2),
    ),
    "prompt_logprobs": ({"prompt_logprobs": 1, **IDS}, shows(has_prompt_scores)),
    "allowed_token_ids": ({"allowed_token_ids": [505], **IDS}, of_ids(505)),
    "bad_words": (
        ONLY | IDS | {"bad_words": ["The"]},
        shows(lambda a: 504 not in a.choices[0]["token_ids"]),
    ),
    "response_format": (
        {"response_format": SCHEMA, "ignore_eos": False},
        shows(lambda a: a.text == '"a"'),
    ),
    "structured_outputs": (
        {"structured_outputs": {"choice": ["yes"]}, "ignore_eos": False},
        shows(lambda a: a.text == "yes"),
    ),
    "repetition_detection": (ONLY | REPEATS | IDS | {"max_tokens": 50}, of_tokens(3)),
    "priority": ({"priority": 1}, said("priority=1 has no effect")),
    "request_id": ({"request_id": "mine"}, shows(lambda a: a.id.endswith("-mine"))),
    "cache_salt": ({"cache_salt": "new"}, TAKEN),  # `test_salts_keep_prefixes_apart`
    "return_token_ids": (IDS, shows(has_all_ids)),
}
OF_TEXT: dict[str, tuple[dict[str, Any], Check]] = {
    "prompt": ({"prompt": ["a", "b"]}, shows(lambda a: sorted(a.choices) == [0, 1])),
    "max_tokens": (
        {"max_tokens": 0, **IDS},
        shows(lambda a: a.text == "" and a.choices[0]["token_ids"] == []),
    ),
    "logprobs": ({"logprobs": 2}, shows(lambda a: entries(a) == 6)),
    "logprob_token_ids": (
        {"logprob_token_ids": [9]},
        said("logprob_token_ids needs logprobs of at least 1"),
    ),
    "echo": ({"echo": True}, shows(lambda a: a.text.startswith("Once upon a time"))),
    "best_of": (
        {"best_of": 3, "temperature": 1},
        lambda s, p, streams, a: a.status == (400 if streams else 200),
    ),
    "suffix": ({"suffix": "x"}, said("suffix is not supported")),
    "add_special_tokens": ({"add_special_tokens": False}, TAKEN),
}
OF_CHAT: dict[str, tuple[dict[str, Any], Check]] = {
    "messages": ({"messages": [{"role": "user", "content": "Other."}]}, differs),
    "max_tokens": ({"max_tokens": 3, **IDS}, of_tokens(3)),
    "max_completion_tokens": ({"max_completion_tokens": 2, **IDS}, of_tokens(2)),
    "logprobs": ({"logprobs": True}, shows(lambda a: entries(a) == 6)),
    "top_logprobs": (
        {"logprobs": True, "top_logprobs": 3},
        shows(lambda a: len(a.choices[0]["content"][0]["top_logprobs"]) == 3),
    ),
    "logprob_token_ids": (
        {"logprob_token_ids": [9]},
        shows(lambda a: a.choices[0]["content"][0]["top_logprobs"]),
    ),
    "tools": ({"tools": [{"type": "function", "function": {"name": "f"}}]}, said("knows no tools")),
    "tool_choice": ({"tool_choice": "required"}, said("tool_choice needs tools")),
    "parallel_tool_calls": ({"parallel_tool_calls": False}, TAKEN),  # without tools: none
    "reasoning_effort": (
        {"reasoning_effort": "low"},
        shows(lambda a: a.ignored == "reasoning_effort"),
    ),
    "add_generation_prompt": ({"add_generation_prompt": False, **IDS}, differs),
    "continue_final_message": ({"continue_final_message": True, **IDS}, differs),
    "chat_template": ({"chat_template": "x"}, said("is not allowed")),
    "chat_template_kwargs": ({"chat_template_kwargs": {"self": 1}}, said("must not have ['self']")),
}


def test_the_table_has_every_field() -> None:
    names = {field.name for field in fields_of(CompletionRequest).values()}
    assert names == BOTH.keys() | OF_TEXT.keys()
    names = {field.name for field in fields_of(ChatRequest).values()}
    assert names == BOTH.keys() | OF_CHAT.keys()


@pytest.mark.parametrize(("path", "streams"), FORMS, ids=lambda value: str(value))
def test_fields_have_their_effect_or_are_refused(path: str, streams: bool, server: Any) -> None:
    for name, (fields, check) in (BOTH | (OF_CHAT if path == CHAT else OF_TEXT)).items():
        answer = ask(server, path, streams, **fields)
        assert answer.status < 500 and check(server, path, streams, answer), (name, answer)


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_usage_is_shown_with_every_event_if_asked_for(path: str, server: Any) -> None:
    answer = ask(server, path, True, stream_options={"continuous_usage_stats": True})
    counts = [e["usage"]["completion_tokens"] for e in answer.events if e.get("usage")]
    assert counts[-1] == 6 and counts == sorted(counts) and len(counts) >= len(answer.events) - 1


def test_prompts_that_were_cut_are_echoed_as_they_were_used(server: Any) -> None:
    answer = ask(server, TEXT, False, echo=True, truncate_prompt_tokens=2, max_tokens=0)
    assert answer.text == " a time"


def test_more_than_the_context_is_refused_with_the_numbers(server: Any) -> None:
    for path, name in ((TEXT, "max_tokens"), (CHAT, "max_completion_tokens")):
        error = ask(server, path, False, **{name: 2048}).error
        assert error["param"] == name and "max_model_len=2048, got 2048" in error["message"]
    error = ask(server, TEXT, False, prompt=[5] * 2048).error
    assert error["param"] == "prompt" and error["message"].endswith("shorten it")
    assert ask(server, TEXT, False, prompt=[5] * 2040, max_tokens=...).status == 200
    many = ask(server, TEXT, False, prompt=[[5]] * 128, n=128).error
    assert "16384 sequences, and at most 1088 may" in many["message"]


def test_more_than_the_kv_cache_is_refused_with_the_numbers(start_server: Any) -> None:
    small = start_server("--num-kv-blocks", "8", "--block-size", "16").wait_until_ready()
    error = ask(small, TEXT, False, prompt=[5] * 100, max_tokens=40).error
    assert "a prompt of 100 tokens with max_tokens=40" in error["message"]
    assert "max_tokens <= 29 would fit" in error["message"] and error["param"] == "prompt"
    assert ask(small, TEXT, False, prompt=[5] * 100, max_tokens=29).status == 200
    assert "shorten the prompt" in ask(small, TEXT, False, prompt=[5] * 200).error["message"]
    small.stop()
