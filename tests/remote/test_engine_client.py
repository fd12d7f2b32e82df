"""The server's side of the engine, without an engine: frames in, outputs out."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

pytest.importorskip("msgspec")

from compiledllm.engine.request_state import Completion, RequestState
from compiledllm.outputs import CompletionOutput, RequestOutput
from compiledllm.remote.engine_client import EngineClient
from compiledllm.remote.errors import DeadlineExceeded, EngineError, Overloaded
from compiledllm.remote.limits import Limits
from compiledllm.remote.live_request import LiveRequest
from compiledllm.remote.live_requests import LiveRequests
from compiledllm.remote.wire import Add, Finish, Stats, StepOutputs
from compiledllm.sampling_params import RequestOutputKind, SamplingParams
from compiledllm.types import RequestSpec, RequestUpdate, StepNews, TokenLogprobs
from tests.support.fakes import Letters

STATS = Stats(1, 0, 0.5, 0, 0, 0, 0.01, 1, 0, 0)
DELTA, WHOLE = RequestOutputKind.DELTA, RequestOutputKind.FINAL_ONLY


class Bench:
    """A client with requests let in; what it sends to the engine is kept."""

    def __init__(self, *lives: LiveRequest, seconds: float = 9) -> None:
        self.client = EngineClient({}, Limits(9, 99, seconds, stuck_s=9), Path())
        self.sent: list[Any] = []
        self.client.live = LiveRequests(self.sent.append)
        for live in lives:
            self.client.live._put(live)

    def told(self) -> list[str]:
        return [message.spec.request_id for message in self.sent if isinstance(message, Add)]

    def step(self, tokens: dict[str, str], *updates: RequestUpdate) -> None:
        """A step that gives each of these requests its letter."""
        token_ids = {request_id: ord(letter) for request_id, letter in tokens.items()}
        self.client._handle(StepOutputs(StepNews(token_ids, updates=list(updates)), STATS))


def live_request(name: str = "r", n: int = 1, **params: Any) -> LiveRequest:
    """A stream of deltas, if nothing else is said, of a prompt of one token."""
    asked = SamplingParams(n=n, **({"output_kind": DELTA} | params))
    names = [name] if n == 1 else [f"{i}_{name}" for i in range(n)]
    specs = [RequestSpec(each, [1], asked, 99) for each in names]
    tokenizer = cast(Any, Letters())
    completions = [Completion(i, spec, asked, tokenizer) for i, spec in enumerate(specs)]
    return LiveRequest(RequestState(name, asked, completions))


def ended(name: str, letters: str, reason: Any = "length") -> RequestUpdate:
    return RequestUpdate(name, [ord(letter) for letter in letters], reason)


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
            bench.step({"other": letter}, RequestUpdate("r", [ord(letter)], logprobs=found[-1:]))
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
        assert bench.sent == [Finish(["r", "slow"], "stop")]
        assert not bench.client.live and not bench.client.live.engine_ids

    asyncio.run(run())


def test_tokens_behind_a_stop_string_in_one_message_are_dropped() -> None:
    live = live_request(stop=["END"], logprobs=0)
    bench = Bench(live)
    found: list[TokenLogprobs] = [((ord(letter),), (-1.0,), 1, 0) for letter in "aENDxy"]
    bench.step({}, RequestUpdate("r", [ids[0] for ids, *_ in found], logprobs=found))
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
        assert bench.client.live.on_engine_end("it broke", {"seen", "unseen"})
        assert only(await readers[0]).text == "b"  # it had come
        with pytest.raises(EngineError, match="it broke"):
            await seen.take()
        bench.client.live.replay()
        bench.step({"unseen": "c"})
        assert only(await readers[1]).text == "c"

    asyncio.run(run())


def test_who_ran_at_a_crash_is_tried_alone_and_all_others_wait() -> None:
    names = ["a", "b", "c", "queued"]
    lives = {name: live_request(name, output_kind=WHOLE) for name in names}
    bench = Bench(*lives.values())
    live = bench.client.live
    assert live.on_engine_end("first", {"a", "b", "c"})
    live.replay()
    assert bench.told() == ["a"]
    late = live.add(live_request("late", output_kind=WHOLE).state)
    bench.step({"a": "x"})
    bench.step({"a": "x"})
    assert bench.told() == ["a"]
    bench.step({"a": "x"})  # harmless
    assert bench.told() == ["a", "b"]
    assert live.on_engine_end("second", {"a", "b"})  # while b was on trial
    with pytest.raises(EngineError, match="second time while it ran this request: second"):
        asyncio.run(lives["b"].take())
    assert not any(lives[name].error for name in "ac")
    bench.sent.clear()
    live.replay()  # the culprit is found: nobody else is a suspect any more
    assert bench.told() == ["a", "c", "queued", "late"]
    assert not any(each.ran_at_crash for each in (late, *lives.values()) if each.error is None)


def test_a_suspect_whose_client_leaves_holds_nobody_up() -> None:
    lives = [live_request(name) for name in "abc"]
    bench = Bench(*lives)
    live = bench.client.live
    live.on_engine_end("it broke", {"a", "b", "c"})
    live.replay()
    live.abort(lives[0])
    live.abort(lives[1])
    bench.step({})
    assert bench.told() == ["a", "c"]
    bench.step({}, ended("c", "x"))
    assert not live


def test_a_crash_costs_none_of_those_that_only_waited() -> None:
    waiting = live_request("waiting")
    live = Bench(waiting).client.live
    for _ in range(9):
        assert not live.on_engine_end("it broke", {"another", "that is over"})
        live.replay()
    assert waiting.error is None and not waiting.ran_at_crash


def test_a_second_crash_behind_the_trial_ends_those_that_ran_at_both() -> None:
    first, later = live_request("first", output_kind=WHOLE), live_request("later")
    bench = Bench(first)
    bench.client.live.on_engine_end("it broke", {"first"})
    bench.client.live.replay()
    for _ in range(3):
        bench.step({"first": "x"})
    bench.client.live._put(later)
    bench.client.live.on_engine_end("it broke", {"first", "later"})
    assert isinstance(first.error, EngineError) and later.error is None


def test_a_text_that_cannot_be_made_costs_one_request() -> None:
    broken, whole = live_request("broken", n=2), live_request("whole")
    bench = Bench(broken, whole)
    too_large = 0x110000  # no character

    async def run() -> None:
        reader = await started(whole)
        stats = StepOutputs(StepNews({"0_broken": too_large, "whole": ord("a")}), STATS)
        bench.client._handle(stats)
        assert only(await reader).text == "a"
        with pytest.raises(EngineError, match="ValueError"):
            while True:
                await broken.take()

    asyncio.run(run())
    assert bench.sent == [Finish(["0_broken", "1_broken"], "abort")]
    assert bench.client.live.engine_ids == ["whole"]


def test_frames_that_have_come_are_all_read_before_anything_is_shown() -> None:
    live = live_request()
    client = Bench(live).client
    steps = [StepOutputs(StepNews({"r": ord(letter)}), STATS) for letter in "abcd"]
    arrived: list[Any] = list(steps[:3])
    more = asyncio.Event()

    async def receive() -> Any:
        if not arrived:
            more.clear()
            await more.wait()
        return arrived.pop(0)

    async def run() -> None:
        seen: list[Any] = []
        client.observe = seen.append
        reader = await started(live)
        child = SimpleNamespace(receive=receive, send=lambda message: None)
        attending = asyncio.create_task(client._read_messages(cast(Any, child)))
        assert only(await reader).text == "abc"
        assert seen == steps[:3]
        reader = await started(live)
        arrived.append(steps[3])
        more.set()
        assert only(await reader).text == "d"
        arrived.append(None)
        more.set()
        await attending

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
    client = EngineClient({}, Limits(9, 20, request_s=9, stuck_s=9), Path())
    client.state, client.requests = "ready", cast(Any, object())
    client.ready = cast(Any, SimpleNamespace(options={"max_num_seqs": 4}))
    monkeypatch.setattr(client.live, "_send_request", lambda live: None)
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
    specs = [
        RequestSpec(f"{name}{n}", [1] * 5, SamplingParams(), 9) for n in range(num_completions)
    ]
    completions = [SimpleNamespace(spec=spec, is_finished=False) for spec in specs]
    return SimpleNamespace(request_id=name, completions=completions)
