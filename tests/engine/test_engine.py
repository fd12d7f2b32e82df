"""The engine as its users see it: forms of prompts, outputs, streaming, aborts, bad input."""

from __future__ import annotations

import gc
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compiledllm import LLM, ConfigError, Engine, RequestOutput, SamplingParams
from compiledllm.runner.model_runner import PendingOutput
from compiledllm.scheduler.policy import Pace
from compiledllm.types import SchedulerOutput

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS = [[5, 6, 7], [9], list(range(10, 60)), [3] * 20]


@pytest.fixture(scope="module", params=[False, True], ids=["in_step", "run_ahead"])
def make(request: pytest.FixtureRequest, tiny_llama: Callable[..., Path]) -> Callable[..., Engine]:
    """Engines that wait for each step, and engines that launch the next one first."""

    def make(**options: Any) -> Engine:
        defaults = {"device": "cpu", "skip_tokenizer_init": True, "enforce_eager": True}
        defaults["async_scheduling"] = request.param
        return Engine(tiny_llama(), **(defaults | options))

    return make


@pytest.fixture(scope="module")
def engine(make: Callable[..., Engine]) -> Engine:
    return make()


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


# -- prompts and outputs ---------------------------------------------------------------------------


def test_one_prompt_or_many_in_every_form(engine: Engine) -> None:
    expected = tokens(engine.generate(PROMPTS, GREEDY))
    assert len(expected) == len(PROMPTS) and all(len(ids) == 12 for ids in expected)
    assert tokens(engine.generate(PROMPTS[0], GREEDY)) == expected[:1]
    assert tokens(engine.generate({"prompt_token_ids": PROMPTS[0]}, GREEDY)) == expected[:1]
    mixed = [{"prompt_token_ids": PROMPTS[0]}, PROMPTS[1], tuple(PROMPTS[2]), PROMPTS[3]]
    assert tokens(engine.generate(mixed, GREEDY)) == expected


def test_a_batch_begins_with_its_longest_requests_and_keeps_its_order(
    make: Callable[..., Engine], engine: Engine
) -> None:
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (3, 30, 9, 14)]
    alone = [tokens(engine.generate(*pair))[0] for pair in zip(PROMPTS, params, strict=True)]
    other = make()
    other.core.scheduler.pace = Pace(balanced_tokens=2)  # prompts in many small pieces
    steps = recorded_steps(other)
    assert tokens(other.generate(PROMPTS, params)) == alone
    begun = dict.fromkeys(line.request_id for step in steps for line in step.scheduled)
    assert list(begun) == ["1", "3", "2", "0"]


def recorded_steps(engine: Engine) -> list[SchedulerOutput]:
    """Filled with what the engine's scheduler will schedule."""
    steps: list[SchedulerOutput] = []
    schedule = engine.core.scheduler.schedule

    def record() -> SchedulerOutput:
        steps.append(schedule())
        return steps[-1]

    engine.core.scheduler.schedule = record  # type: ignore[method-assign]
    return steps


def test_outputs_carry_what_vllm_scripts_read(engine: Engine) -> None:
    (output,) = engine.generate([PROMPTS[0]], GREEDY)
    assert output.prompt_token_ids == PROMPTS[0] and output.finished
    completion = output.outputs[0]
    assert (completion.index, completion.text) == (0, "")
    assert (completion.finish_reason, completion.stop_reason) == ("length", None)
    assert output.metrics is not None and output.metrics.first_token_time is not None
    assert LLM is Engine


def test_params_can_differ_by_prompt(engine: Engine) -> None:
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (1, 5, 3, 2)]
    assert [len(ids) for ids in tokens(engine.generate(PROMPTS, params))] == [1, 5, 3, 2]


def test_max_tokens_defaults_to_the_end_of_the_context(engine: Engine) -> None:
    (output,) = engine.generate([[5] * 450], SamplingParams(temperature=0, ignore_eos=True))
    assert len(output.outputs[0].token_ids) == 512 - 450
    assert output.outputs[0].finish_reason == "length"


def test_stop_token_ids_end_the_request_and_are_reported(engine: Engine) -> None:
    full = tokens(engine.generate([PROMPTS[0]], GREEDY))[0]
    stop = full[4]
    params = SamplingParams(
        temperature=0, max_tokens=12, ignore_eos=True, stop_token_ids=[stop], min_tokens=0
    )
    (output,) = engine.generate([PROMPTS[0]], params)
    assert output.outputs[0].token_ids == full[: full.index(stop) + 1]
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", stop)


def test_min_tokens_puts_off_the_stop_token(engine: Engine) -> None:
    first = tokens(engine.generate([PROMPTS[0]], GREEDY))[0][0]
    params = SamplingParams(
        temperature=0, max_tokens=9, min_tokens=4, ignore_eos=True, stop_token_ids=[first]
    )
    ids = tokens(engine.generate([PROMPTS[0]], params))[0]
    assert first not in ids[:4] and len(ids) >= 4


# -- the same tokens, however they come about ------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"max_num_batched_tokens": 8},
        {"num_kv_blocks": 5},
        {"max_num_seqs": 1},
        {"block_size": 32},
        {"enable_prefix_caching": False},
        {"scheduling_policy": "priority"},
    ],
)
def test_scheduling_does_not_change_tokens(
    options: dict[str, Any], make: Callable[..., Engine], engine: Engine
) -> None:
    other = make(**options)
    assert tokens(other.generate(PROMPTS, GREEDY)) == tokens(engine.generate(PROMPTS, GREEDY))
    other.core.scheduler.check_invariants()
    assert (
        other.core.scheduler.block_pool.num_free_blocks
        == other.core.scheduler.block_pool.num_blocks
    )


def test_seeded_tokens_are_the_same_alone_in_a_crowd_and_after_preemption(
    make: Callable[..., Engine], engine: Engine
) -> None:
    params = [
        SamplingParams(temperature=1.2, seed=i, max_tokens=20, top_p=0.9, ignore_eos=True)
        for i in range(len(PROMPTS))
    ]
    crowd = tokens(engine.generate(PROMPTS, params))
    alone = [
        tokens(engine.generate(prompt, p))[0] for prompt, p in zip(PROMPTS, params, strict=True)
    ]
    assert crowd == alone
    cramped = make(num_kv_blocks=6)
    assert tokens(cramped.generate(PROMPTS, params)) == crowd
    assert cramped.core.scheduler.num_preemptions > 0


def test_requests_without_a_seed_differ_and_engines_with_one_repeat(
    make: Callable[..., Engine],
) -> None:
    params = SamplingParams(temperature=1.0, max_tokens=20, ignore_eos=True)
    first, second = make(seed=7), make(seed=7)
    a = tokens(first.generate([PROMPTS[0], PROMPTS[0]], params))
    assert a[0] != a[1]
    assert a == tokens(second.generate([PROMPTS[0], PROMPTS[0]], params))


def test_compiled_in_the_background_switches_over_with_the_same_tokens(
    make: Callable[..., Engine], engine: Engine
) -> None:
    other = make(enforce_eager=False, compile_when="background")
    expected = tokens(engine.generate(PROMPTS, GREEDY))
    assert tokens(other.generate(PROMPTS, GREEDY)) == expected
    compiler = other.core.runner.compiler
    compiler.wait()
    assert compiler.is_ready
    assert tokens(other.generate(PROMPTS, GREEDY)) == expected
    assert tokens(other.generate(PROMPTS[1], GREEDY)) == [expected[1]]
    assert compiler.num_recompiles == 0


# -- streaming, aborts, failures -------------------------------------------------------------------


def test_stream_yields_every_growth_and_ends_finished(engine: Engine) -> None:
    expected = tokens(engine.generate(PROMPTS[:2], GREEDY))
    seen: dict[str, list[RequestOutput]] = {}
    for output in engine.stream(PROMPTS[:2], GREEDY):
        seen.setdefault(output.request_id, []).append(output)
    assert [outputs[-1].outputs[0].token_ids for outputs in seen.values()] == expected
    for outputs in seen.values():
        assert [len(o.outputs[0].token_ids) for o in outputs] == list(range(1, 13))
        assert [o.finished for o in outputs] == [False] * 11 + [True]


def test_closing_a_stream_frees_its_blocks(engine: Engine) -> None:
    stream = engine.stream(PROMPTS[2], SamplingParams(temperature=0))
    next(stream)
    stream.close()
    assert not engine.has_unfinished_requests()
    engine.core.scheduler.check_invariants()


def test_generate_beside_an_open_stream_disturbs_neither(engine: Engine) -> None:
    expected = tokens(engine.generate(PROMPTS[:2], GREEDY))
    stream = engine.stream(PROMPTS[0], GREEDY)
    next(stream)
    assert tokens(engine.generate(PROMPTS[1], GREEDY)) == expected[1:]
    assert list(stream)[-1].outputs[0].token_ids == expected[0]


def test_step_api_and_abort(engine: Engine) -> None:
    kept = engine.add_request(PROMPTS[0], GREEDY)
    dropped = engine.add_request(PROMPTS[1], GREEDY)
    engine.step()
    engine.abort_request(dropped)
    engine.abort_request("no such request")
    finished = []
    while engine.has_unfinished_requests():
        finished += [output for output in engine.step() if output.finished]
    assert [output.request_id for output in finished] == [kept]
    engine.core.scheduler.check_invariants()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_step_that_breaks_off_leaves_a_working_engine(
    error: type[BaseException], make: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C or a failure inside a step: no row, block or cached prefix survives wrongly."""
    engine = make()
    expected = tokens(engine.generate(PROMPTS, GREEDY))
    launch, calls = engine.core.runner.launch, 0

    def breaking(step: SchedulerOutput) -> PendingOutput:
        nonlocal calls
        calls += 1
        output = launch(step)
        if calls == 4:
            raise error("in the middle")
        return output

    monkeypatch.setattr(engine.core.runner, "launch", breaking)
    with pytest.raises(error):
        engine.generate(PROMPTS, GREEDY)
    assert not engine.has_unfinished_requests()
    engine.core.scheduler.check_invariants()
    assert tokens(engine.generate(PROMPTS, GREEDY)) == expected


def test_ctrl_c_in_a_step_costs_other_requests_nothing(
    make: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make()
    expected = tokens(engine.generate(PROMPTS[:1], GREEDY))
    engine.add_request(PROMPTS[0], GREEDY)
    engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(engine.core.runner, "launch", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    outputs: list[RequestOutput] = []
    while engine.has_unfinished_requests():
        outputs = engine.step()
    assert tokens(outputs) == expected


def _interrupt(step: SchedulerOutput) -> PendingOutput:
    raise KeyboardInterrupt


def test_real_interrupts_at_any_moment_leave_books_that_balance(
    make: Callable[..., Engine],
) -> None:
    """A timer presses Ctrl-C again and again, wherever the engine happens to be."""
    engine = make(num_kv_blocks=8)
    expected = tokens(engine.generate(PROMPTS, GREEDY))
    rng, interrupted = random.Random(0), 0
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # xdist's workers ignore it
    try:
        for _ in range(60):
            try:
                signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(0.0003, 0.02))
                engine.generate(PROMPTS, GREEDY)
            except KeyboardInterrupt:
                interrupted += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            assert not engine.has_unfinished_requests()
            engine.core.scheduler.check_invariants()
    finally:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, before)
    assert interrupted > 10
    assert tokens(engine.generate(PROMPTS, GREEDY)) == expected


def test_stream_that_is_never_started_can_be_closed_or_dropped(engine: Engine) -> None:
    engine.stream(PROMPTS[0], GREEDY).close()
    assert not engine.has_unfinished_requests()
    stream = engine.stream(PROMPTS[0], GREEDY)
    del stream
    gc.collect()
    assert not engine.has_unfinished_requests()


def test_generate_keeps_the_outputs_of_added_requests_for_step(engine: Engine) -> None:
    added = engine.add_request(PROMPTS[0], GREEDY)
    expected = tokens(engine.generate(PROMPTS[:2], GREEDY))
    assert engine.has_unfinished_requests()
    (output,) = engine.step()
    assert (output.request_id, output.finished) == (added, True)
    assert output.outputs[0].token_ids == expected[0]
    assert not engine.has_unfinished_requests() and engine.step() == []


def test_failed_step_tells_added_requests(
    make: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make()
    engine.add_request(PROMPTS[0], GREEDY)
    with monkeypatch.context() as patch:
        patch.setattr(engine.core.runner, "launch", _fail)
        with pytest.raises(RuntimeError):
            engine.step()
    (output,) = engine.step()
    assert output.outputs[0].finish_reason == "error" and not engine.has_unfinished_requests()


def _fail(step: SchedulerOutput) -> PendingOutput:
    raise RuntimeError("out of memory")


def test_automatic_request_ids_avoid_those_in_use(make: Callable[..., Engine]) -> None:
    engine = make()
    engine.add_request(PROMPTS[0], GREEDY, request_id="0")
    assert engine.add_request(PROMPTS[0], GREEDY) != "0"
    with pytest.raises(ValueError, match="request_id '0' is already in use"):
        engine.add_request(PROMPTS[0], GREEDY, request_id="0")


def test_priority_decides_who_goes_first(make: Callable[..., Engine]) -> None:
    engine = make(scheduling_policy="priority", max_num_seqs=1)
    order = [
        output.request_id
        for output in engine.stream(PROMPTS, GREEDY, priority=[3, 1, 2, 0])
        if output.finished
    ]
    assert order == ["3", "1", "2", "0"]


@pytest.mark.parametrize("priority", [["a", 1], [1.5, 0], [True, 0], [1]])
def test_bad_priority_is_refused_and_leaves_nothing_behind(
    priority: Any, make: Callable[..., Engine]
) -> None:
    engine = make(scheduling_policy="priority")
    with pytest.raises(ValueError, match="priority"):
        engine.generate(PROMPTS[:2], GREEDY, priority=priority)
    assert not engine.has_unfinished_requests()
    engine.generate(PROMPTS[:2], GREEDY, priority=[1, 0])


def test_priority_without_its_policy_is_refused(engine: Engine) -> None:
    with pytest.raises(ValueError, match="use scheduling_policy='priority'"):
        engine.generate(PROMPTS[:2], GREEDY, priority=[1, 0])


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "prompt"),
        ([[]], "the prompt is empty"),
        ([[1, 2, 128]], "token id 128 at position 2 .* ids 0 to 127"),
        ([[1, -1]], "token id -1 at position 1"),
        ([[1] * 512], "512 tokens .* max_model_len=512 leaves room for 511"),
        ("text", "skip_tokenizer_init"),
        ([{"promt": "x"}], "'prompt' .* or 'prompt_token_ids'"),
        ([["a", "b"]], "text, token ids or a dict"),
        ([3.5], "text, token ids or a dict"),
        (None, "prompts must be"),
        (5, "prompts must be"),
        (b"bytes", "prompts must be"),
        ([{1, 2}], "text, token ids or a dict"),
        ([{"prompt_token_ids": [1], "multi_modal_data": {"image": "i"}}], "multi_modal_data"),
    ],
)
def test_bad_prompt_is_refused_by_name(engine: Engine, prompt: Any, message: str) -> None:
    if prompt == []:
        assert engine.generate(prompt, GREEDY) == []
        return
    with pytest.raises(ValueError, match=message):
        engine.generate(prompt, GREEDY)
    assert not engine.has_unfinished_requests()


def test_one_bad_prompt_starts_nothing_and_harms_nobody(engine: Engine) -> None:
    other = engine.add_request(PROMPTS[0], GREEDY)
    with pytest.raises(ValueError, match="empty"):
        engine.generate([PROMPTS[1], []], GREEDY)
    outputs: list[RequestOutput] = []
    while engine.has_unfinished_requests():
        outputs = engine.step()
    assert outputs[0].request_id == other and len(outputs[0].outputs[0].token_ids) == 12


def test_request_that_can_never_fit_is_refused_with_what_would(make: Callable[..., Engine]) -> None:
    engine = make(num_kv_blocks=4)
    with pytest.raises(ValueError, match=r"needs 6 KV blocks .* has 4; max_tokens <= 15 would fit"):
        engine.generate([[5] * 50], SamplingParams(max_tokens=40))
    (output,) = engine.generate([[5] * 50], SamplingParams(max_tokens=15, ignore_eos=True))
    assert len(output.outputs[0].token_ids) == 15
    (output,) = engine.generate([[5] * 50], SamplingParams(ignore_eos=True))
    assert len(output.outputs[0].token_ids) == 15


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocksize": 16}, "unknown engine option 'blocksize'; did you mean 'block_size'"),
        ({"block_size": 24}, "multiple of 16, got 24"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"max_model_len": 4096}, "max_model_len=4096 is more than the 512 positions"),
        ({"kv_cache_memory_bytes": 1000}, "no room for a KV cache"),
        ({"device": "tpu"}, "device must be"),
        ({"num_kv_blocks": 0}, "num_kv_blocks must be"),
        ({"num_kv_blocks": 10**10}, r"GiB and there are .* at most \d+ blocks fit"),
        ({"kv_cache_memory_bytes": 10**16}, "GiB and there are"),
        ({"max_num_seqs": 10**9}, "max_num_seqs must be at most 32768"),
        ({"max_model_len": 1}, "max_model_len must be at least 2"),
        ({"trust_remote_code": True}, "trust_remote_code=True is not supported"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size must be an integer >= 1, got 0"),
    ],
)
def test_bad_option_is_refused_by_name(
    options: dict[str, Any], message: str, make: Callable[..., Engine]
) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**options)


def test_machine_without_a_cpp_compiler_runs_eagerly_after_one_line(
    make: Callable[..., Engine],
    engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr("compiledllm.log.log.propagate", True)
    with caplog.at_level("INFO", logger="compiledllm"):
        other = make(enforce_eager=False)
    lines = [record.message for record in caplog.records if "C++ compiler" in record.message]
    assert len(lines) == 1 and "install g++" in lines[0]
    assert tokens(other.generate(PROMPTS, GREEDY)) == tokens(engine.generate(PROMPTS, GREEDY))
