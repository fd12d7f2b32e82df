"""The server's side of the engine, without an engine: frames in, outputs out."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

pytest.importorskip("msgspec")

from compiledllm.engine.request_state import Completion, RequestState
from compiledllm.outputs import CompletionOutput, RequestOutput
from compiledllm.sampling_params import RequestOutputKind, SamplingParams
from compiledllm.server.engine_client import EngineClient
from compiledllm.server.live_request import DeadlineExceeded, Limits, LiveRequest, Overloaded
from compiledllm.server.live_requests import LiveRequests
from compiledllm.server.wire import Failed, Finish, Grown, Stats, Stepped, frame
from compiledllm.types import Request, TokenLogprobs

STATS = Stats(1, 0, 0.5, 0, 0, 0, 0.01, 1, 0, 0)
DELTA = RequestOutputKind.DELTA


class Letters:
    """A tokenizer whose token ids are characters."""

    def stream(self, prompt_token_ids: list[int], skip_special_tokens: bool) -> Any:
        return SimpleNamespace(push=chr, finish=str)

    def token_text(self, token_id: int) -> str:
        return chr(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        return chr(token_id).encode()


class Bench:
    """A client with requests let in; what it sends to the engine is kept."""

    def __init__(self, *lives: LiveRequest, seconds: float = 9) -> None:
        self.client = EngineClient({}, Limits(9, 99, seconds, stuck_seconds=9), Path())
        self.sent: list[Any] = []
        self.client.live = LiveRequests(self.sent.append)
        for live in lives:
            self.client.live._put(live)

    def step(self, tokens: dict[str, str], *grown: Grown) -> None:
        """A step that gives each of these requests its letter."""
        token_ids = {request_id: ord(letter) for request_id, letter in tokens.items()}
        self.client._handle(Stepped(token_ids, list(grown), STATS))


def live_request(name: str = "r", n: int = 1, **params: Any) -> LiveRequest:
    """A stream of deltas, if nothing else is said, of a prompt of one token."""
    asked = SamplingParams(n=n, **({"output_kind": DELTA} | params))
    names = [name] if n == 1 else [f"{i}_{name}" for i in range(n)]
    requests = [Request(each, [1], asked, 99) for each in names]
    tokenizer = cast(Any, Letters())
    completions = [Completion(i, request, tokenizer) for i, request in enumerate(requests)]
    return LiveRequest(RequestState(name, asked, completions))


def ended(name: str, letters: str, reason: Any = "length") -> Grown:
    return Grown(name, [ord(letter) for letter in letters], reason)


def only(output: RequestOutput) -> CompletionOutput:
    (completion,) = output.outputs
    return completion


async def started(live: LiveRequest) -> asyncio.Task[RequestOutput]:
    """Somebody who waits for the next output, and has come as far as to wait."""
    task = asyncio.create_task(live.take())
    await asyncio.sleep(0)
    return task


def test_who_waits_gets_each_token_at_once() -> None:
    live = live_request()
    bench = Bench(live)

    async def run() -> None:
        for letter in "abc":
            reader = await started(live)
            bench.step({"r": letter})
            output = await reader
            assert (only(output).text, only(output).token_ids) == (letter, [ord(letter)])
            assert not output.finished
        assert live.was_shown

    asyncio.run(run())


def test_what_came_while_the_reader_was_late_is_one_output() -> None:
    live, other = live_request(logprobs=1), live_request("other")
    bench = Bench(live, other)

    async def run() -> None:
        readers = await started(live), await started(other)
        found: list[TokenLogprobs] = []
        for letter in "abc":
            found.append(((ord(letter), 5), (-ord(letter) / 100, -2.0), 1, 1))
            bench.step({"other": letter}, Grown("r", [ord(letter)], logprobs=found[-1:]))
        completion = only(await readers[0])
        assert (completion.text, completion.token_ids) == ("abc", [97, 98, 99])
        assert completion.logprobs is not None
        assert [list(entry)[0] for entry in completion.logprobs] == [97, 98, 99]
        assert completion.cumulative_logprob == pytest.approx(-0.97 - 0.98 - 0.99)
        assert only(await readers[1]).text == "abc"
        bench.step({"other": "d"})
        assert only(await other.take()).text == "d"

    asyncio.run(run())


def test_an_end_among_what_came_is_shown_once() -> None:
    live = live_request()
    bench = Bench(live)

    async def run() -> None:
        reader = await started(live)
        bench.step({"r": "a"})
        bench.step({}, ended("r", "b"))
        bench.step({"r": "c"})  # of a step that was under way
        output = await reader
        assert output.finished and only(output).finish_reason == "length"
        assert only(output).text == "ab"
        assert live.state.next_output() is None
        assert not bench.client.live and not bench.client.live.engine_ids and not bench.sent

    asyncio.run(run())


def test_a_stop_string_may_be_spread_over_what_came() -> None:
    live, slow = live_request(stop=["END"]), live_request("slow", stop=["END"])
    bench = Bench(live, slow)

    async def run() -> None:
        reader = await started(live)
        for letter in "aE":
            bench.step({"r": letter, "slow": letter})
        assert only(await reader).text == "a"  # the E may be a stop string's
        for letter in "NDxy":
            bench.step({"r": letter, "slow": letter})
        for each, text, ids in ((live, "", "ND"), (slow, "a", "aEND")):
            output = await each.take()
            completion = only(output)
            assert output.finished and (completion.text, completion.stop_reason) == (text, "END")
            assert completion.token_ids == [ord(letter) for letter in ids]
        assert bench.sent == [Finish(["r"], "stop"), Finish(["slow"], "stop")]
        assert not bench.client.live and not bench.client.live.engine_ids

    asyncio.run(run())


def test_tokens_behind_a_stop_string_in_one_message_are_dropped() -> None:
    live = live_request(stop=["END"], logprobs=0)
    bench = Bench(live)
    found: list[TokenLogprobs] = [((ord(letter),), (-1.0,), 1, 0) for letter in "aENDxy"]
    bench.step({}, Grown("r", [ids[0] for ids, *_ in found], logprobs=found))
    completion = only(asyncio.run(live.take()))
    assert (completion.text, len(completion.token_ids)) == ("a", 4)
    assert completion.logprobs is not None and len(completion.logprobs) == 4
    assert bench.sent == [Finish(["r"], "stop")]


def test_completions_of_one_prompt_come_in_one_output() -> None:
    live = live_request(n=2)
    bench = Bench(live)

    async def run() -> None:
        reader = await started(live)
        bench.step({"0_r": "a", "1_r": "x"})
        bench.step({"0_r": "b"}, ended("1_r", "y"))
        output = await reader
        assert [(c.index, c.text, c.finish_reason) for c in output.outputs] == [
            (0, "ab", None),
            (1, "xy", "length"),
        ]
        assert bench.client.live and not output.finished
        reader = await started(live)
        bench.step({"0_r": "c"})
        bench.step({}, ended("0_r", "d"))
        output = await reader
        assert output.finished and [(c.index, c.text) for c in output.outputs] == [(0, "cd")]
        assert not bench.client.live

    asyncio.run(run())


def test_nobody_is_woken_before_there_is_something_to_show() -> None:
    streamed = live_request("s", stream_interval=3)
    whole = live_request("w", output_kind=RequestOutputKind.FINAL_ONLY)
    best = live_request("b", n=2, output_kind=RequestOutputKind.FINAL_ONLY)
    bench = Bench(streamed, whole, best)

    async def run() -> None:
        readers = [await started(live) for live in (streamed, whole, best)]
        bench.step({"s": "a", "w": "a", "0_b": "a", "1_b": "a"})
        assert only(await readers[0]).text == "a"  # the first at once
        readers[0] = await started(streamed)
        bench.step({"s": "b", "w": "b", "0_b": "b"}, ended("1_b", "b"))
        bench.step({"s": "c", "w": "c", "0_b": "c"})
        await asyncio.sleep(0)
        assert not any(reader.done() for reader in readers)
        bench.step({"s": "d"}, ended("w", "d"), ended("0_b", "d"))
        assert only(await readers[0]).text == "bcd"
        assert only(await readers[1]).text == "abcd"
        assert [c.text for c in (await readers[2]).outputs] == ["abcd", "ab"]

    asyncio.run(run())


def test_what_was_booked_and_not_taken_starts_over_after_a_crash() -> None:
    seen, unseen = live_request("seen"), live_request("unseen")
    bench = Bench(seen, unseen)

    async def run() -> None:
        readers = await started(seen), await started(unseen)
        bench.step({"seen": "a"})
        await readers[0]
        readers = await started(seen), readers[1]
        bench.step({"seen": "b", "unseen": "b"})
        bench.client._sort_out(Failed("it broke"))
        assert only(await readers[0]).text == "b"  # it had come
        with pytest.raises(Exception, match="it broke"):
            await seen.take()
        bench.step({"unseen": "c"})
        assert only(await readers[1]).text == "c"

    asyncio.run(run())


def test_frames_that_have_come_are_all_read_before_anything_is_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    live = live_request()
    client = Bench(live).client
    ours, theirs = socket.socketpair()
    seen: list[Any] = []
    client.observe = seen.append

    async def spawn() -> socket.socket:
        client.process = cast(Any, SimpleNamespace(wait=exit_status))
        return ours

    async def exit_status() -> int:
        return 1

    async def run() -> None:
        reader = await started(live)
        steps = [Stepped({"r": ord(letter)}, [], STATS) for letter in "abcd"]
        theirs.sendall(b"".join(map(frame, steps[:3])))
        supervisor = asyncio.create_task(client._keep_running())
        assert only(await reader).text == "abc"
        assert seen == steps[:3]
        reader = await started(live)
        theirs.sendall(frame(steps[3]))
        assert only(await reader).text == "d"
        theirs.close()
        await supervisor
        assert client.state == "dead"

    monkeypatch.setattr(client, "_spawn", spawn)
    asyncio.run(run())


def test_the_deadline_ends_a_request_that_nobody_reads() -> None:
    live = live_request()
    bench = Bench(live, seconds=0.1)

    async def run() -> None:
        with bench.client.following(live):
            bench.step({"r": "a"})
            assert only(await live.take()).text == "a"
            bench.step({"r": "b"})  # while the reader is busy with the first
            await asyncio.sleep(0.2)
            assert bench.sent == [Finish(["r"], "abort")]
            assert not bench.client.live
            for _ in range(50):  # of steps that were under way
                bench.step({"r": "c"})
            assert only(await live.take()).text == "b"
            with pytest.raises(DeadlineExceeded):
                await live.take()
        assert len(bench.sent) == 1

    asyncio.run(run())


def test_prompts_are_let_in_up_to_so_many_tokens_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    client = EngineClient({}, Limits(9, 20, request_seconds=9, stuck_seconds=9), Path())
    client.state, client.requests = "ready", cast(Any, object())
    client.ready = cast(Any, SimpleNamespace(options={"max_num_seqs": 4}))
    monkeypatch.setattr(client.live, "tell", lambda live: None)
    monkeypatch.setattr(client.live, "_send", lambda message: None)
    first, second, third = (_state_of(name, num_completions=2) for name in "abc")
    for _ in range(3):  # as often as one likes: what is over does not count
        lives = client.admit([first, second])
        with pytest.raises(Overloaded, match="prompts of 20 tokens"):
            client.admit([third])
        client.release(lives[:1])
        lives += client.admit([third])
        client.release(lives[1:])


def _state_of(name: str, num_completions: int) -> Any:
    """A request of five tokens for each completion."""
    requests = [
        SimpleNamespace(request_id=f"{name}{n}", is_finished=False, num_prompt_tokens=5)
        for n in range(num_completions)
    ]
    completions = [SimpleNamespace(request=request) for request in requests]
    return SimpleNamespace(request_id=name, completions=completions)
