"""Frames between the processes: what is sent is what arrives."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

from compiledllm.sampling_params import RepetitionDetectionParams, SamplingParams
from compiledllm.server.wire import (
    Add,
    Failed,
    Finish,
    Grown,
    Ready,
    Start,
    Stats,
    Stepped,
    add_of,
    frame,
    receive,
    receive_async,
    request_of,
)
from compiledllm.types import Request, TokenLogprobs

STATS = Stats(1, 2, 0.5, 3, 0, 0, 0.01, 7, 100, 50)
LOGPROBS: TokenLogprobs = ((5, 6), (-0.5, -1.5), 1, 1)


@pytest.mark.parametrize(
    "message",
    [
        Start({"model": "m", "block_size": 16, "dtype": "auto", "enforce_eager": True}, "/tmp/x"),
        Add("r", [1, 2, 2**30], {"temperature": 0.5}, 7, [2], -(2**63)),
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
        Stepped(
            {"a": 7}, [Grown("r", [1, 2], "stop", "END", 3, [LOGPROBS], [LOGPROBS] * 2)], STATS
        ),
        Stepped({}, [], STATS),
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
    first = Request("0_r", [1, 2, 3], params, 9, frozenset({7}), 11, cache_salt="s")
    second = Request("1_r", [1, 2, 3], params, 9, frozenset({7}), 12, sibling=first)
    first.bad_words = second.bad_words = ((4, 5), (6,))
    there = request_of(add_of(first), {})
    other = request_of(add_of(second), {"0_r": there})
    assert other.sibling is there and other.seed == 12
    for name in ("request_id", "prompt_token_ids", "max_tokens", "stop_token_ids", "seed"):
        assert getattr(there, name) == getattr(first, name)
    assert (there.bad_words, there.cache_salt) == (first.bad_words, "s")
    got = there.sampling_params
    for name in ("temperature", "top_k", "logit_bias", "allowed_token_ids", "logprobs"):
        assert getattr(got, name) == getattr(params, name)
    for name in ("prompt_logprobs", "min_tokens", "repetition_detection", "presence_penalty"):
        assert getattr(got, name) == getattr(params, name)
    assert got.stop == [] and got.bad_words  # text is the server's business


def test_functions_do_not_leave_their_process() -> None:
    params = SamplingParams(logits_processors=[lambda logits: logits])
    with pytest.raises(AssertionError, match="functions do not leave"):
        add_of(Request("r", [1], params, 1))
