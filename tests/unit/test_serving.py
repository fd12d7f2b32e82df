"""Streams of events, from requests that are fed by hand."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

pytest.importorskip("fastapi")

from compiledllm.engine.prompts import Prompt
from compiledllm.engine.request_state import Completion, RequestState
from compiledllm.outputs import CompletionOutput, FinishReason, RequestOutput
from compiledllm.remote.engine_client import EngineClient
from compiledllm.remote.errors import EngineError
from compiledllm.remote.limits import Limits
from compiledllm.remote.live_request import LiveRequest
from compiledllm.sampling_params import RequestOutputKind, SamplingParams
from compiledllm.server.metrics import Metrics
from compiledllm.server.openai.answer import Answer, Context
from compiledllm.server.openai.chat_answer import ChatAnswer
from compiledllm.server.openai.completion_answer import CompletionAnswer
from compiledllm.server.openai.errors import ApiError
from compiledllm.server.openai.jobs import Job
from compiledllm.server.openai.protocol import (
    MAX_IDS_AT_ONCE,
    ChatRequest,
    CompletionRequest,
    Message,
    StreamOptions,
)
from compiledllm.server.openai.serving import Serving
from compiledllm.types import RequestSpec
from tests.support.fakes import Letters

USAGE = StreamOptions(include_usage=True)
LATER = StreamOptions(include_usage=True, continuous_usage_stats=True)
USER = Message(role="user", content="x")


class Stream:
    """A job's events, and the requests behind them."""

    def __init__(
        self,
        body: CompletionRequest | ChatRequest,
        num_prompts: int = 1,
        stop: list[str] | None = None,
        kind: type[Answer[Any]] | None = None,
    ) -> None:
        params = SamplingParams(
            output_kind=RequestOutputKind.DELTA, logprobs=1 if body.logprobs else None, stop=stop
        )
        tokenizer = cast(Any, Letters())
        specs = [RequestSpec(f"r{i}", [1, 1], params, 99) for i in range(num_prompts)]
        states = [
            RequestState(spec.request_id, params, [Completion(0, spec, params, tokenizer)])
            for spec in specs
        ]
        self.live_requests = [LiveRequest(state) for state in states]
        factory: Any = SimpleNamespace(
            tokenizer=tokenizer,
            require_tokenizer=lambda what: tokenizer,
            defaults=SamplingParams(),
        )
        engine = EngineClient({}, Limits(9, 99, 9, stuck_s=9), Path())
        self.metrics = Metrics("p:", "m", engine)
        serving = Serving(engine, self.metrics)
        is_text = isinstance(body, CompletionRequest)
        kind = kind or (CompletionAnswer if is_text else ChatAnswer)
        answer = kind(body, Context("id", "m", factory))
        self._job = Job("id", answer, factory, True, states, self.live_requests)
        self.events = serving.stream(self._job)

    def grow(
        self, letters: str, ends: bool = False, prompt: int = 0, reason: FinishReason = "length"
    ) -> None:
        """Book a token for each letter, with its log probability."""
        live = self.live_requests[prompt]
        (completion,) = live.state.completions
        for letter in letters:
            completion.logprobs.append(((ord(letter),), (-0.5,), 1, 0))
            completion.push(ord(letter), 0.0)
        if ends:
            completion.end(reason)
        live.wake()

    async def next(self) -> Any:
        """The next event's JSON; the text itself if it is none."""
        task = asyncio.ensure_future(cast(Any, anext(self.events)))
        text = (await task).decode().removeprefix("data: ").strip()
        return text if text == "[DONE]" else json.loads(text.rpartition("data: ")[2])


def completion_body(**more: Any) -> CompletionRequest:
    return CompletionRequest(prompt=[1, 1], stream=True, **more)


def test_phases_and_parameters_of_a_request_are_counted() -> None:
    async def run() -> None:
        stream = Stream(completion_body())
        (live,) = stream.live_requests
        live.state.note_start(live.state.arrival_time + 0.25)
        stream.grow("ab", ends=True)
        while await stream.next() != "[DONE]":
            pass
        found = dict(
            line.replace('{model_name="m"}', "").split(" ")
            for line in stream.metrics.text().decode().splitlines()
            if line.startswith("p:request_") and "_bucket" not in line and "success" not in line
        )
        for phase in ("queue", "prefill", "decode", "inference"):
            assert found[f"p:request_{phase}_time_seconds_count"] == "1.0"
        assert float(found["p:request_queue_time_seconds_sum"]) == pytest.approx(0.25)
        assert found["p:request_params_n_sum"] == "1.0"

    asyncio.run(run())


def test_tokens_that_came_together_are_one_event() -> None:
    async def run() -> None:
        stream = Stream(completion_body(stream_options=USAGE))
        for letters in ("a", "b", "cde"):
            stream.grow(letters)
            (choice,) = (await stream.next())["choices"]
            assert (choice["text"], choice["finish_reason"]) == (letters, None)
        stream.grow("fg", ends=True)
        (choice,) = (await stream.next())["choices"]
        assert (choice["text"], choice["finish_reason"]) == ("fg", "length")
        usage = (await stream.next())["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (2, 7)
        assert await stream.next() == "[DONE]"

    asyncio.run(run())


def test_an_event_of_many_tokens_has_all_their_log_probabilities() -> None:
    async def run() -> None:
        stream = Stream(completion_body(logprobs=1, stream_options=LATER))
        offset = 0
        for letters in ("ab", "cde"):
            stream.grow(letters)
            event = await stream.next()
            found = event["choices"][0]["logprobs"]
            assert found["tokens"] == list(letters)
            assert found["token_logprobs"] == [-0.5] * len(letters)
            assert found["text_offset"] == [offset + i for i in range(len(letters))]
            offset += len(letters)
            assert event["usage"]["completion_tokens"] == offset
        await stream.events.aclose()  # type: ignore[attr-defined]

    asyncio.run(run())


def test_a_token_is_shown_once_no_stop_string_can_cut_it() -> None:
    """So the offsets of all events fit the text of all events, where its end is cut off, too."""

    async def run() -> None:
        stream = Stream(completion_body(logprobs=1), stop=["cdx"])
        tokens, offsets, text = [], [], ""
        for letters, ends in (
            ("ab", False),
            ("c", False),
            ("d", False),
            ("ecd", False),
            ("x", True),
        ):
            stream.grow(letters, ends)
            (choice,) = (await stream.next())["choices"]
            text += choice["text"]
            tokens += choice["logprobs"]["tokens"]
            offsets += choice["logprobs"]["text_offset"]
            if not ends:
                assert "".join(tokens) == text
        assert (text, tokens) == ("abcde", list("abcdecdx"))
        assert offsets == [0, 1, 2, 3, 4, 5, 5, 5]
        await stream.events.aclose()  # type: ignore[attr-defined]

    asyncio.run(run())


def test_a_chat_begins_with_its_role_however_much_came() -> None:
    async def run() -> None:
        body = ChatRequest(messages=[USER], stream=True)
        stream = Stream(body)
        stream.grow("abc", ends=True)
        first = (await anext(stream.events)).decode()
        role, content = (json.loads(part) for part in first.split("data: ")[1:])
        assert role["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert content["choices"][0]["delta"]["content"] == "abc"
        assert content["choices"][0]["finish_reason"] == "length"
        assert await stream.next() == "[DONE]"

    asyncio.run(run())


def test_prompts_of_one_body_keep_their_places() -> None:
    async def run() -> None:
        stream = Stream(completion_body(), num_prompts=2)
        reader = asyncio.create_task(stream.next())
        await asyncio.sleep(0)
        stream.grow("xy", prompt=1)
        (choice,) = (await reader)["choices"]
        assert (choice["index"], choice["text"]) == (1, "xy")
        stream.grow("ab", ends=True)
        stream.grow("z", ends=True, prompt=1)
        found = [(await stream.next())["choices"][0] for _ in range(2)]
        assert [(c["index"], c["text"]) for c in found] == [(0, "ab"), (1, "z")]
        assert await stream.next() == "[DONE]"

    asyncio.run(run())


def test_what_came_before_a_failure_is_shown() -> None:
    async def run() -> None:
        stream = Stream(completion_body())
        stream.grow("ab")
        stream.live_requests[0].fail(EngineError("it broke"))
        assert (await stream.next())["choices"][0]["text"] == "ab"
        assert "it broke" in (await stream.next())["error"]["message"]
        assert await stream.next() == "[DONE]"

    asyncio.run(run())


def test_a_stream_that_fails_is_counted() -> None:
    async def run() -> None:
        stream = Stream(completion_body())
        stream.grow("a", ends=True, reason="error")
        assert "error" in await stream.next()
        assert await stream.next() == "[DONE]"
        counted = 'p:request_success_total{finished_reason="error",model_name="m"} 1.0'
        assert counted in stream.metrics.text().decode()

    asyncio.run(run())


def test_tokens_that_came_together_share_the_gap_before_them() -> None:
    async def run() -> None:
        stream = Stream(completion_body())
        for letters in ("a", "bcd", "e"):
            stream.grow(letters)
            await stream.next()
        text = stream.metrics.text().decode()
        assert 'p:inter_token_latency_seconds_count{model_name="m"} 4' in text

    asyncio.run(run())


class LoudAnswer(Answer[CompletionRequest]):
    """An endpoint with events of its own, which no other module knows."""

    body_type = CompletionRequest
    id_prefix = "loud"
    last_event = b""

    def __init__(self, body: CompletionRequest, context: Context) -> None:
        super().__init__(body, context)
        self.params = SamplingParams()
        self._num_letters = 0

    def prompts(self, body: CompletionRequest) -> list[Prompt]:
        return [cast(Any, body.prompt)]

    def whole(self, outputs: list[RequestOutput], num_output_tokens: int) -> dict[str, Any]:
        return {"loud": [output.outputs[0].text.upper() for output in outputs]}

    def begin(self) -> bytes:
        return b"begin"

    def grow(self, prompt_index: int, output: RequestOutput, completion: CompletionOutput) -> bytes:
        self._num_letters += len(completion.text)
        return completion.text.upper().encode()

    def end(self) -> bytes:
        return b"%d letters" % self._num_letters

    def fail(self, error: ApiError) -> bytes:
        return b"%d" % error.status


def test_an_endpoint_is_one_class() -> None:
    async def run() -> None:
        whole, failing = (Stream(completion_body(), kind=LoudAnswer) for _ in range(2))
        whole.grow("abc", ends=True)
        assert [event async for event in whole.events] == [b"begin", b"ABC", b"3 letters"]
        failing.grow("a", ends=True, reason="error")
        assert [event async for event in failing.events] == [b"begin", b"500"]

    asyncio.run(run())


def test_only_what_needs_no_tokenizer_is_made_without_a_thread() -> None:
    assert CompletionRequest(prompt=[1] * MAX_IDS_AT_ONCE).is_made_at_once
    for prompt in ("", "text", ["text"], [[1, 2]], [1] * (MAX_IDS_AT_ONCE + 1)):
        assert not CompletionRequest(prompt=cast(Any, prompt)).is_made_at_once
    for more in (
        {"bad_words": ["x"]},
        {"response_format": {"type": "json_object"}},
        {"structured_outputs": {"regex": "a"}},
    ):
        assert not CompletionRequest(prompt=[1], **cast(Any, more)).is_made_at_once
    assert not CompletionRequest(prompt=[1], n=2).is_made_at_once
    assert not CompletionRequest(prompt=[1], best_of=2).is_made_at_once
    assert not ChatRequest(messages=[USER]).is_made_at_once
