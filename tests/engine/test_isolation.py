"""A request that makes steps fail ends alone; those beside it get what they would get anyway."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compiledllm import Engine, SamplingParams
from compiledllm.engine import isolation
from compiledllm.types import Request, SchedulerOutput
from tests.support.requests import make_request

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def make(tiny_llama: Callable[..., Path], **options: Any) -> Engine:
    fixed = {"dtype": "float32", "skip_tokenizer_init": True, "enforce_eager": True}
    return Engine(tiny_llama(), device="cpu", **fixed, **options)


def poison(engine: Engine, patch: pytest.MonkeyPatch, names: set[str], late: bool) -> list[int]:
    """Steps with these requests raise; with `late` only once they decode. Sizes of failed steps."""
    launch, failed = engine.core.runner.launch, []

    def fails(step: SchedulerOutput) -> Any:
        bad = [
            line
            for line in step.scheduled
            if line.request_id in names and (not late or line.num_computed_tokens > 12)
        ]
        if bad:
            failed.append(len(step.scheduled))
            raise RuntimeError("a poisoned request")
        return launch(step)

    patch.setattr(engine.core.runner, "launch", fails)
    return failed


def run(engine: Engine, requests: list[Request]) -> None:
    for request in requests:
        engine.core.scheduler.add(request)
    for _ in range(3000):
        if not engine.core.has_unfinished():
            break
        engine.core.step()
        engine.core.scheduler.check_invariants()
    assert not engine.core.has_unfinished()


def requests(count: int) -> list[Request]:
    rng = random.Random(1)
    return [
        make_request(f"r{n}", [rng.randrange(3, 120) for _ in range(12)], GREEDY, 12)
        for n in range(count)
    ]


@pytest.mark.parametrize("run_ahead", [False, True])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("names", [{"r0"}, {"r9"}, {"r3", "r4"}, {"r0", "r5", "r9"}])
def test_only_the_poisoned_end(
    names: set[str],
    late: bool,
    run_ahead: bool,
    tiny_llama: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = requests(10)
    run(make(tiny_llama), expected)
    engine = make(tiny_llama, async_scheduling=run_ahead)
    engine.core.isolate_failures()
    failed = poison(engine, monkeypatch, names, late)
    found = requests(10)
    run(engine, found)
    for request, reference in zip(found, expected, strict=True):
        if request.request_id in names:
            assert request.finish_reason == "error"
            assert request.stop_reason == "RuntimeError: a poisoned request"
        else:
            assert request.output_token_ids == reference.output_token_ids
    assert len(failed) <= 8 * len(names)
    assert engine.core.scheduler._held == {}


def test_requests_that_leave_while_they_are_held_are_no_trouble(
    tiny_llama: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make(tiny_llama)
    engine.core.isolate_failures()
    poison(engine, monkeypatch, {"r0"}, late=False)
    alive = requests(8)
    for request in alive:
        engine.core.scheduler.add(request)
    engine.core.step()
    assert engine.core.scheduler._held
    for name in ("r4", "r5", "r1"):
        engine.core.finish(name, "abort")
    run(engine, [])
    assert [r.finish_reason for r in alive[:2]] == ["error", "abort"]
    assert alive[7].finish_reason == "length"


def test_without_isolation_the_step_takes_all_with_it(
    tiny_llama: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make(tiny_llama)
    poison(engine, monkeypatch, {"r1"}, late=False)
    alive = requests(3)
    for request in alive:
        engine.core.scheduler.add(request)
    with pytest.raises(RuntimeError, match="a poisoned request"):
        engine.core.step()
    assert [request.finish_reason for request in alive] == ["error"] * 3


def test_an_engine_in_which_all_that_runs_fails_gives_up(
    tiny_llama: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make(tiny_llama)
    engine.core.isolate_failures()
    alive = requests(20)
    poison(engine, monkeypatch, {request.request_id for request in alive}, late=False)
    with pytest.raises(RuntimeError, match="a poisoned request"):
        run(engine, alive)
    blamed = [request for request in alive if request.stop_reason is not None]
    assert len(blamed) == isolation.MAX_FAILED
