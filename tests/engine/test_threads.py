"""Threads that share an engine: each call gets what it would get alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from tqdm import tqdm

from compiledllm import Engine, SamplingParams
from compiledllm.engine.turns import Turns
from compiledllm.outputs import RequestOutput
from compiledllm.sampling_params import BeamSearchParams, RequestOutputKind
from compiledllm.types import SchedulerOutput, StepNews

PROMPTS: list[Any] = [{"prompt_token_ids": [5 + i] * (4 + i)} for i in range(6)]
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture(scope="module")
def engine(tiny_llama: Callable[..., Any]) -> Engine:
    return Engine(
        tiny_llama(),
        skip_tokenizer_init=True,
        dtype="float32",
        num_kv_blocks=64,
        enforce_eager=True,
    )


def together(*calls: Callable[[], Any]) -> list[Any]:
    """The results of calls that begin at once, each in a thread of its own."""
    barrier = threading.Barrier(len(calls))

    def run(call: Callable[[], Any]) -> Any:
        barrier.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result(60) for future in [pool.submit(run, call) for call in calls]]


def test_calls_of_all_kinds_at_once_get_their_own_outputs(engine: Engine) -> None:
    expected = tokens(engine.generate(PROMPTS, GREEDY))
    beams = BeamSearchParams(beam_width=2, max_tokens=4)
    best = engine.beam_search(PROMPTS[0], beams)[0].sequences[0].tokens
    deltas = SamplingParams(
        temperature=0, max_tokens=24, ignore_eos=True, output_kind=RequestOutputKind.DELTA
    )

    def generate() -> list[list[int]]:
        return [tokens(engine.generate(PROMPTS[i], GREEDY))[0] for i in range(6)]

    def stream() -> list[list[int]]:
        found: list[list[int]] = []
        for prompt in PROMPTS:
            outputs = list(engine.stream(prompt, deltas))
            found.append([i for output in outputs for i in output.outputs[0].token_ids])
        return found

    def step() -> list[list[int]]:
        ids = [engine.add_request(prompt, GREEDY, f"mine-{i}") for i, prompt in enumerate(PROMPTS)]
        last: dict[str, RequestOutput] = {}
        while engine.has_unfinished_requests():
            last |= {output.request_id: output for output in engine.step()}
        return tokens([last[request_id] for request_id in ids])

    def abort() -> list[list[int]]:
        for prompt in PROMPTS:
            for _ in range(3):
                stream = engine.stream(prompt, GREEDY)
                next(stream)
                del stream  # dropped half way
        return expected

    def search() -> list[list[int]]:
        return [engine.beam_search(PROMPTS[0], beams)[0].sequences[0].tokens]

    results = together(generate, generate, stream, step, abort, search)
    assert results == [expected] * 5 + [[best]]
    assert not engine._shared.states and not engine.has_unfinished_requests()
    engine.core.scheduler.check_invariants()


def test_calls_at_once_run_in_one_batch(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    launch = engine.core.runner.launch

    def counted(step: SchedulerOutput) -> Any:
        sizes.append(len(step.scheduled))
        return launch(step)

    monkeypatch.setattr(engine.core.runner, "launch", counted)
    calls = [lambda prompt=prompt: engine.generate(prompt, GREEDY) for prompt in PROMPTS]
    together(*calls)
    assert max(sizes) > 1 and len(sizes) < 6 * 24


def test_calls_need_no_lock_of_a_hidden_progress_bar(engine: Engine) -> None:
    """A Ctrl-C may have left tqdm's lock with the main thread."""
    with tqdm.get_lock():
        (outputs,) = together(lambda: engine.generate(PROMPTS[:1], GREEDY))
    assert len(outputs) == 1


def test_a_step_that_fails_raises_in_the_calls_that_it_ends_and_in_no_other(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    lone = tokens(engine.generate(PROMPTS[2], GREEDY))
    engine.add_request(PROMPTS[1], GREEDY, "added")
    step = engine.core.step

    def failing() -> StepNews:
        if engine.core.finish("added", "error", "this one"):
            raise RuntimeError("this one")
        return step()

    monkeypatch.setattr(engine.core, "step", failing)
    assert tokens(engine.generate(PROMPTS[2], GREEDY)) == lone  # it made the step
    with pytest.raises(RuntimeError, match="this one"):
        engine.step()
    (output,) = engine.step()
    assert (output.request_id, output.outputs[0].finish_reason) == ("added", "error")
    assert not engine.has_unfinished_requests()


def test_whoever_comes_gets_the_next_turn() -> None:
    turns, order = Turns(), []
    arrived = threading.Event()

    def other() -> None:
        arrived.set()
        with turns.taken():
            order.append("other")

    with turns.taken():
        thread = threading.Thread(target=other)
        thread.start()
        arrived.wait(10)
        while not turns._gate.locked():
            pass
    for _ in range(3):
        with turns.taken():
            order.append("again")
    thread.join(10)
    assert order[0] == "other"


def test_what_a_finalizer_asks_for_is_done_at_the_end_of_the_turn() -> None:
    turns, done = Turns(), []
    with turns.taken():
        turns.run_soon(lambda: done.append(1))
        assert not done
    assert done == [1]
    turns.run_soon(lambda: done.append(2))
    assert done == [1, 2]


def test_postponed_work_that_fails_ends_its_turn() -> None:
    turns, done = Turns(), threading.Event()

    def fail() -> None:
        raise KeyboardInterrupt  # as a second Ctrl-C does

    with pytest.raises(KeyboardInterrupt), turns.taken():
        turns.run_soon(fail)
    turns.run_soon(done.set)
    assert done.is_set()
