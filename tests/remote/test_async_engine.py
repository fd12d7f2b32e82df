"""The public asyncio engine, with one real engine process for all that do it no harm."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("msgspec")

from compiledllm import (
    AsyncEngine,
    ConfigError,
    Engine,
    EngineDeadError,
    EngineError,
    PoolingParams,
    RequestOutput,
    RequestOutputKind,
    SamplingParams,
)
from compiledllm.types import StepNews

FAKE_ENGINE = (sys.executable, str(Path(__file__).parents[1] / "server" / "fake_engine.py"))
LONG = SamplingParams(temperature=0, max_tokens=1000, ignore_eos=True)
Run = Callable[[Coroutine[Any, Any, Any]], Any]


def greedy(count: int, **more: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, **more)


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """run(coroutine) in one event loop for all tests of this file, as an engine has one."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    yield lambda work: asyncio.run_coroutine_threadsafe(work, loop).result(150)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("COMPILEDLLM_CACHE_DIR", str(folder))
        yield folder


@pytest.fixture(scope="module")
def engine(run: Run, tiny_chat_model: Path, cache: Path) -> Iterator[AsyncEngine]:
    made = AsyncEngine(
        tiny_chat_model, enforce_eager=True, kv_cache_memory_bytes=2**26, max_num_seqs=8
    )
    assert not made.is_running and not made.errored
    run(made.start())
    yield made
    run(made.__aexit__())
    assert not made.is_running


async def outputs_of(
    engine: AsyncEngine, prompt: Any, params: SamplingParams, **more: Any
) -> list[RequestOutput]:
    return [output async for output in engine.generate(prompt, params, **more)]


def test_many_callers_get_what_each_asked_for(engine: AsyncEngine, run: Run) -> None:
    async def play() -> list[list[RequestOutput]]:
        prompts = ["The capital of France is", "def fibonacci(n):", [5, 6, 7]]
        asked = [outputs_of(engine, prompt, greedy(5 + i)) for i, prompt in enumerate(prompts)]
        return await asyncio.gather(*asked)

    for index, outputs in enumerate(run(play())):
        last = outputs[-1]
        assert last.finished and not any(output.finished for output in outputs[:-1])
        assert len(last.outputs[0].token_ids) == 5 + index
        assert last.outputs[0].finish_reason == "length" and last.outputs[0].text
    assert engine.is_running and not engine.errored
    run(engine.check_health())
    assert run(engine.get_tokenizer()).decode([5]) is not None


def test_each_kind_of_output_adds_up_to_the_same(engine: AsyncEngine, run: Run) -> None:
    kinds = RequestOutputKind
    found = {
        kind: run(outputs_of(engine, "Once", greedy(12, output_kind=kind, n=2, seed=1)))
        for kind in kinds
    }
    (whole,) = found[kinds.FINAL_ONLY]
    texts = [completion.text for completion in whole.outputs]
    assert [c.text for c in found[kinds.CUMULATIVE][-1].outputs] == texts
    pieces = ["", ""]
    for output in found[kinds.DELTA]:
        for completion in output.outputs:
            pieces[completion.index] += completion.text
    assert pieces == texts


def test_an_answer_has_the_form_that_was_asked_for(engine: AsyncEngine, run: Run) -> None:
    pytest.importorskip("llguidance")
    params = SamplingParams(temperature=0, structured_outputs={"choice": ["yes", "no"]})
    assert run(outputs_of(engine, "x", params))[-1].outputs[0].text in ("yes", "no")


def test_vectors_and_scores_are_those_of_the_offline_engine(
    engine: AsyncEngine, run: Run, tiny_chat_model: Path
) -> None:
    offline = Engine(tiny_chat_model, enforce_eager=True, num_kv_blocks=64)
    params = [PoolingParams(dimensions=8), PoolingParams("mean"), PoolingParams(normalize=False)]
    prompts: list[Any] = ["The capital of France is", [5, 6, 7], {"prompt": "Once"}]

    async def ask() -> tuple[Any, Any, Any]:
        beside = asyncio.create_task(outputs_of(engine, "x", greedy(30)))
        vectors = await engine.embed(prompts, params)
        one = await engine.embed("Once")
        scores = await engine.score("France", ["Paris", "Rome", "France"])
        assert len((await beside)[-1].outputs[0].token_ids) == 30
        return vectors, one, scores

    vectors, one, scores = run(ask())
    for found, expected in zip(vectors, offline.embed(prompts, params), strict=True):
        assert found.prompt_token_ids == expected.prompt_token_ids and found.finished
        assert found.outputs.embedding == pytest.approx(expected.outputs.embedding, abs=1e-5)
    assert one[0].outputs.embedding == pytest.approx(
        offline.embed("Once")[0].outputs.embedding, abs=1e-5
    )
    expected = [o.outputs.score for o in offline.score("France", ["Paris", "Rome", "France"])]
    assert [output.outputs.score for output in scores] == pytest.approx(expected, abs=1e-5)
    assert expected[2] == pytest.approx(1, abs=1e-5)


def test_prompts_without_a_vector_are_refused_and_cancelled_ones_end(
    engine: AsyncEngine, run: Run
) -> None:
    for prompts, params, message in (
        ("", None, "the prompt is empty"),
        ([[5], [10**6]], None, "out of range"),
        ([5], PoolingParams(dimensions=10**6), "dimensions must be at most"),
        (["a", "b"], [PoolingParams()], "pooling_params has 1 entries for 2 prompts"),
    ):
        with pytest.raises(ValueError, match=message):
            run(engine.embed(prompts, params))
    with pytest.raises(ValueError, match="make no pairs"):
        run(engine.score(["a", "b"], ["c"] * 3))
    with pytest.raises(ValueError, match="instruction is for rerankers"):
        run(engine.score("a", "b", instruction="judge"))

    async def cancel() -> None:
        asking = asyncio.create_task(engine.embed([[5] * 1500] * 64))
        async with asyncio.timeout(60):
            while not engine._client.live:
                await asyncio.sleep(0)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await until_idle(engine)

    run(cancel())


def test_what_is_wrong_with_a_request_is_said_at_once(engine: AsyncEngine, run: Run) -> None:
    cases: list[tuple[Any, SamplingParams, str]] = [
        ("", greedy(1), "the prompt is empty"),
        ([10**6], greedy(1), "out of range"),
        ({"text": "x"}, greedy(1), "a prompt dict takes"),
        ("x", SamplingParams(logits_processors=[lambda logits: logits]), "use Engine"),
        ("x", SamplingParams(allowed_token_ids=[10**6]), "allowed_token_ids"),
    ]
    for prompt, params, message in cases:
        with pytest.raises(ValueError, match=message):
            run(outputs_of(engine, prompt, params))
    with pytest.raises(ValueError, match="priority"):
        run(outputs_of(engine, "x", greedy(1), priority=3))

    async def twice() -> None:
        first = engine.generate("x", LONG, "same")
        await anext(first)
        with pytest.raises(ValueError, match="'same' is already in use"):
            await outputs_of(engine, "x", greedy(1), request_id="same")
        await first.aclose()

    run(twice())
    assert run(outputs_of(engine, "x", greedy(1), request_id="same"))[-1].request_id == "same"


def test_news_of_an_aborted_request_are_not_those_of_the_next_with_its_id(
    engine: AsyncEngine, run: Run
) -> None:
    async def play() -> tuple[list[RequestOutput], list[RequestOutput]]:
        expected = await outputs_of(engine, [5, 6, 7], greedy(4))
        live = engine._client.live
        stream = engine.generate("x", LONG, "again")
        await anext(stream)
        old_ids = live.engine_ids
        await stream.aclose()
        again = asyncio.create_task(outputs_of(engine, [5, 6, 7], greedy(4), request_id="again"))
        async with asyncio.timeout(60):
            while live.get("again") is None:
                await asyncio.sleep(0)
        live.take(StepNews(dict.fromkeys(old_ids, 9)))  # was under way
        return expected, await again

    expected, found = run(play())
    assert found[-1].request_id == "again"
    assert found[-1].outputs[0].token_ids == expected[-1].outputs[0].token_ids


def is_idle(engine: AsyncEngine) -> bool:
    stats = engine._client.stats
    is_over = stats is not None and stats.num_running == stats.num_waiting == 0
    return is_over and not engine._client.live


async def until_idle(engine: AsyncEngine) -> None:
    async with asyncio.timeout(60):
        while not is_idle(engine):
            await asyncio.sleep(0.01)


def test_leaving_the_iteration_or_being_cancelled_ends_the_request(
    engine: AsyncEngine, run: Run
) -> None:
    async def leave() -> None:
        stream = engine.generate("x", LONG)
        await anext(stream)
        await stream.aclose()
        await until_idle(engine)

    async def cancel() -> None:
        started = asyncio.Event()

        async def read() -> None:
            async for _ in engine.generate("x", LONG):
                started.set()

        reader = asyncio.create_task(read())
        await started.wait()
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        await until_idle(engine)

    run(leave())
    run(cancel())


def test_abort_ends_the_iteration_with_what_there_is(engine: AsyncEngine, run: Run) -> None:
    async def play() -> RequestOutput:
        stream = engine.generate("x", LONG, "to abort")
        await anext(stream)
        await engine.abort(["never seen", "to abort"])
        rest = [output async for output in stream]
        await until_idle(engine)
        return rest[-1]

    last = run(play())
    assert last.finished and last.outputs[0].finish_reason == "abort"
    assert 1 <= len(last.outputs[0].token_ids) < 1000


def test_an_engine_that_dies_fails_what_was_shown_and_serves_again(
    engine: AsyncEngine, run: Run
) -> None:
    async def play() -> list[RequestOutput]:
        shown = engine.generate("x", LONG)
        await anext(shown)
        child = engine._client._child
        assert child is not None
        os.kill(child.process.pid, signal.SIGKILL)
        with pytest.raises(EngineDeadError, match="SIGKILL"):
            async for _ in shown:
                pass
        return await outputs_of(engine, "x", greedy(3))  # waits for the next engine

    assert run(play())[-1].finished
    assert engine.is_running and not engine.errored


# -- engines that do not come up ------------------------------------------------------------------


def fake(**options: Any) -> AsyncEngine:
    engine = AsyncEngine(skip_tokenizer_init=True, **options)
    engine._client._command = FAKE_ENGINE
    return engine


def test_an_engine_that_cannot_start_is_dead_for_all(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_DEED", "raise")

    async def play() -> None:
        engine = fake()
        for _ in range(2):
            with pytest.raises(EngineError, match="the device is lost"):
                await outputs_of(engine, [5], greedy(1))
        assert engine.errored and not engine.is_running
        assert "the device is lost" in str(engine.dead_error)
        with pytest.raises(EngineError, match="the device is lost"):
            await engine.check_health()

    asyncio.run(play())


def test_a_wrong_configuration_is_a_config_error(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="did you mean 'block_size'"):
        AsyncEngine(blok_size=16)
    monkeypatch.setenv("FAKE_DEED", "config")

    async def play() -> None:
        async with fake(dtype="auto"):
            raise AssertionError("it started")

    with pytest.raises(ConfigError, match="there is no such model"):
        asyncio.run(play())


def test_shutting_down_ends_what_is_in_progress(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_LOAD_S", "60")

    async def play() -> None:
        engine = AsyncEngine.from_engine_args(SimpleNamespace(skip_tokenizer_init=True))
        engine._client._command = FAKE_ENGINE
        waiting = asyncio.create_task(outputs_of(engine, [5], greedy(1)))
        while engine._client._child is None:
            await asyncio.sleep(0.01)
        child = engine._client._child
        engine.shutdown()
        with pytest.raises(EngineError, match="was shut down"):
            await waiting
        with pytest.raises(EngineError, match="was shut down"):
            await outputs_of(engine, [5], greedy(1))
        assert "SIGKILL" in await child.end()
        assert not engine.errored

    asyncio.run(play())
