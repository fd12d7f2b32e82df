"""Frames between the processes: what is sent is what arrives."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import fields
from typing import Any

import pytest

from compiledllm.remote.wire import (
    Add,
    Failed,
    Finish,
    Ready,
    Start,
    Stats,
    StepOutputs,
    frame,
    receive,
    receive_async,
)
from compiledllm.sampling_params import RepetitionDetectionParams, SamplingParams
from compiledllm.structured_outputs import ReasoningTokens
from compiledllm.types import RequestSpec, RequestUpdate, StepNews, TokenLogprobs

STATS = Stats(1, 2, 0.5, 3, 0, 0, 0.01, 7, 100, 50)
LOGPROBS: TokenLogprobs = ((5, 6), (-0.5, -1.5), 1, 1)
UPDATE = RequestUpdate("r", [1, 2], "stop", "END", 3, [LOGPROBS], [LOGPROBS] * 2, b"\0\xff")


@pytest.mark.parametrize(
    "message",
    [
        Start({"model": "m", "block_size": 16, "dtype": "auto", "enforce_eager": True}, "/tmp/x"),
        Add(RequestSpec("r", [1, 2, 2**30], SamplingParams(), 7, frozenset({2}), -(2**63))),
        Finish(["a", "b"], "stop"),
    ],
)
def test_frames_to_the_engine(message: Any) -> None:
    ours, theirs = socket.socketpair()
    ours.sendall(frame(message) + frame(message))
    ours.close()
    assert receive(theirs) == message
    assert receive(theirs) == message
    assert receive(theirs) is None


@pytest.mark.parametrize(
    "message",
    [
        Ready({"model": None}, {"dtype": "x (y)"}, "/m", 10, [2], 64, {"total": 1.5}),
        StepOutputs(StepNews({"a": 7}, {"a": LOGPROBS}, [UPDATE]), STATS),
        StepOutputs(StepNews(), STATS),
        Failed("it broke", False, ["r"]),
    ],
)
def test_frames_to_the_server(message: Any) -> None:
    async def run() -> list[Any]:
        reader = asyncio.StreamReader()
        whole = frame(message)
        reader.feed_data(whole + whole[: len(whole) // 2])
        reader.feed_eof()
        return [await receive_async(reader), await receive_async(reader)]

    assert asyncio.run(run()) == [message, None]  # half a frame is the end


def test_a_request_arrives_as_it_was() -> None:
    params = SamplingParams(
        temperature=0.3,
        top_k=5,
        logit_bias={3: 1.5},
        stop=["END"],
        allowed_token_ids=[1, 2],
        logprobs=2,
        prompt_logprobs=1,
        min_tokens=2,
        bad_words=["x"],
        repetition_detection=RepetitionDetectionParams(3, 1, 2),
        presence_penalty=0.5,
    )
    spec = RequestSpec(
        "1_r",
        [1, 2, 3],
        params.without_text(),
        9,
        frozenset({7}),
        11,
        priority=-3,
        bad_words=((4, 5), (6,)),
        cache_salt="s",
        grammar="start: x",
        reasoning=ReasoningTokens(9, 8, 7, (5, 6)),
        sibling_id="0_r",
        waits_for_batch=True,
        pooling="mean",
    )
    assert all(getattr(spec, f.name) != f.default for f in fields(spec)), "one is not tried"
    ours, theirs = socket.socketpair()
    ours.sendall(frame(Add(spec)))
    there = receive(theirs)
    assert isinstance(there, Add) and there.spec == spec
    got = there.spec.sampling_params
    for name in ("temperature", "top_k", "logit_bias", "allowed_token_ids", "logprobs"):
        assert getattr(got, name) == getattr(params, name)
    for name in ("prompt_logprobs", "min_tokens", "repetition_detection", "presence_penalty"):
        assert getattr(got, name) == getattr(params, name)
    assert got.stop == [] and got.bad_words == []  # text is the client's business


def test_functions_do_not_leave_their_process() -> None:
    params = SamplingParams(logits_processors=[lambda logits: logits])
    with pytest.raises(TypeError, match="function"):
        frame(Add(RequestSpec("r", [1], params, 1)))
