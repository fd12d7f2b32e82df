"""What callers get: log probabilities, several outputs of a prompt, deltas, rules, errors."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compiledllm import (
    BeamSearchParams,
    ConfigError,
    Engine,
    Logprob,
    RepetitionDetectionParams,
    RequestOutput,
    RequestOutputKind,
    SamplingParams,
)

PROMPT = [5, 9, 11, 40, 3, 77]
LONG = [(7 * n) % 120 + 3 for n in range(90)]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module")
def model(tiny_llama: Callable[..., Path]) -> Path:
    return tiny_llama()


@pytest.fixture(scope="module")
def engine(model: Path) -> Engine:
    return make(model)


def make(model: Path, **options: Any) -> Engine:
    fixed = {"dtype": "float32", "skip_tokenizer_init": True, "enforce_eager": True}
    return Engine(model, **(fixed | {"kv_cache_memory_bytes": 2**24} | options))


def run(engine: Engine, prompts: list[list[int]], params: Any) -> list[RequestOutput]:
    return engine.generate(prompts, params, use_tqdm=False)


def greedy(**fields: Any) -> SamplingParams:
    return SamplingParams(**({"temperature": 0, "max_tokens": 8, "ignore_eos": True} | fields))


@pytest.fixture(scope="module")
def exact(model: Path) -> Callable[[list[int]], Tensor]:
    """Token ids -> float64 log probabilities [tokens, vocab] of what follows each."""
    from transformers import AutoModelForCausalLM

    hf = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)

    @torch.no_grad()
    def compute(token_ids: list[int]) -> Tensor:
        logits: Tensor = hf(torch.tensor([token_ids])).logits[0]
        return logits.log_softmax(-1)

    return compute


def check_position(found: dict[int, Logprob], expected: Tensor, own: int, best: int) -> None:
    assert next(iter(found)) == own
    assert len(found) in (best, best + 1)
    for token_id, entry in found.items():
        assert entry.logprob == pytest.approx(expected[token_id].item(), abs=1e-4)
        if entry.rank is not None:
            assert abs(entry.rank - 1 - (expected > expected[token_id]).sum().item()) <= 1
    top = expected.topk(best).values.tolist()
    values = sorted((entry.logprob for entry in found.values()), reverse=True)
    assert values[:best] == pytest.approx(top, abs=1e-4)


# -- log probabilities ----------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 5, 20])
def test_logprobs_are_those_of_transformers(
    count: int, engine: Engine, exact: Callable[[list[int]], Tensor]
) -> None:
    outputs = run(engine, [PROMPT, LONG], [greedy(logprobs=count), greedy(logprobs=count)])
    for output in outputs:
        (completion,) = output.outputs
        everything = output.prompt_token_ids + completion.token_ids
        expected = exact(everything)[len(output.prompt_token_ids) - 1 :]
        assert completion.logprobs is not None and len(completion.logprobs) == 8
        for found, row, own in zip(
            completion.logprobs, expected, completion.token_ids, strict=False
        ):
            check_position(found, row, own, count)
        pairs = zip(completion.logprobs, completion.token_ids, strict=True)
        total = sum(found[own].logprob for found, own in pairs)
        assert completion.cumulative_logprob == pytest.approx(total)


def test_logprobs_are_of_the_model_not_of_what_was_drawn_from(
    engine: Engine, exact: Callable[[list[int]], Tensor]
) -> None:
    params = greedy(
        temperature=1.7, top_k=3, seed=4, logprobs=2, presence_penalty=1.0, logit_bias={8: 3.0}
    )
    (completion,) = run(engine, [PROMPT], params)[0].outputs
    expected = exact(PROMPT + completion.token_ids)[len(PROMPT) - 1 :]
    assert completion.logprobs is not None
    for found, row, own in zip(completion.logprobs, expected, completion.token_ids, strict=False):
        check_position(found, row, own, 2)


def test_logprobs_of_chosen_tokens_and_of_the_whole_vocabulary(
    model: Path, exact: Callable[[list[int]], Tensor]
) -> None:
    engine = make(model, max_logprobs=-1)
    named = greedy(max_tokens=2, logprob_token_ids=[4, 100])
    whole = greedy(max_tokens=2, logprobs=-1)
    plain = greedy(max_tokens=2, logprobs=1)
    outputs = [output.outputs[0] for output in run(engine, [PROMPT] * 3, [named, whole, plain])]
    expected = exact(PROMPT)[-1]
    first = [completion.logprobs[0] for completion in outputs if completion.logprobs]
    own = outputs[0].token_ids[0]
    assert set(first[0]) == {own, 4, 100}
    for token_id in (4, 100):
        entry = first[0][token_id]
        assert entry.logprob == pytest.approx(expected[token_id].item(), abs=1e-4)
        assert entry.rank is None or token_id == own
    assert len(first[1]) == 128
    check_position(first[1], expected, own, 128)
    check_position(first[2], expected, own, 1)


def test_more_logprobs_than_the_engine_allows_are_refused(model: Path, engine: Engine) -> None:
    for fields in ({"logprobs": 21}, {"prompt_logprobs": -1}):
        with pytest.raises(ValueError, match=r"must be at most 20, got .* max_logprobs"):
            run(engine, [PROMPT], greedy(**fields))
    with pytest.raises(ConfigError, match="max_logprobs must be at least 0, or -1"):
        make(model, max_logprobs=-2)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_num_batched_tokens": 16},
        {"max_num_batched_tokens": 16, "async_scheduling": True},
        {"num_kv_blocks": 9, "max_num_seqs": 4},  # with preemption
    ],
    ids=str,
)
def test_prompt_logprobs_are_those_of_transformers(
    options: dict[str, Any], model: Path, exact: Callable[[list[int]], Tensor]
) -> None:
    engine = make(model, **options)
    params = [greedy(prompt_logprobs=3, max_tokens=20), greedy(max_tokens=30), greedy()]
    prompts = [LONG, LONG[:50], LONG]
    for _ in range(2):  # the second time the prefix cache has the prompt
        outputs = run(engine, prompts, params)
        found = outputs[0].prompt_logprobs
        assert found is not None and len(found) == len(LONG) and found[0] is None
        expected = exact(LONG)
        for position in range(1, len(LONG)):
            entries = found[position]
            assert entries is not None
            check_position(entries, expected[position - 1], LONG[position], 3)
        assert outputs[0].num_cached_tokens == 0
        assert outputs[1].prompt_logprobs is None
    engine.core.scheduler.check_invariants()


def test_prompt_logprobs_are_computed_a_few_tokens_at_a_time(
    model: Path, exact: Callable[[list[int]], Tensor]
) -> None:
    engine = make(model)
    engine.core.runner.sampler._chunk_rows = 7
    (output,) = run(engine, [LONG], greedy(prompt_logprobs=0, max_tokens=1))
    assert output.prompt_logprobs is not None
    expected = exact(LONG)
    for position in range(1, len(LONG)):
        entries = output.prompt_logprobs[position]
        assert entries is not None
        check_position(entries, expected[position - 1], LONG[position], 0)


# -- several outputs of a prompt ------------------------------------------------------------------


@pytest.mark.parametrize("caching", [True, False])
def test_siblings_share_the_prompts_blocks(caching: bool, model: Path) -> None:
    engine = make(model, enable_prefix_caching=caching, num_kv_blocks=40)
    pool, most = engine.core.scheduler.block_pool, 0
    params = greedy(n=6, temperature=1.0, seed=3, max_tokens=4)
    engine.add_request(LONG, params)
    while engine.has_unfinished_requests():
        engine.step()
        most = max(most, pool.num_blocks - pool.num_free_blocks)
    assert most <= 5 + 6  # five full blocks of the prompt, and a last one each
    engine.core.scheduler.check_invariants()


def test_every_output_is_that_of_its_own_seed(engine: Engine) -> None:
    params = greedy(n=4, temperature=1.0, seed=11)
    (output,) = run(engine, [PROMPT], params)
    assert [completion.index for completion in output.outputs] == [0, 1, 2, 3]
    alone = [
        run(engine, [PROMPT], greedy(temperature=1.0, seed=11 + index))[0].outputs[0].token_ids
        for index in range(4)
    ]
    assert [completion.token_ids for completion in output.outputs] == alone
    assert len({tuple(tokens) for tokens in alone}) > 1


def test_best_of_returns_the_likeliest(engine: Engine) -> None:
    many = run(engine, [PROMPT], greedy(n=6, temperature=1.5, seed=2, logprobs=0))[0].outputs
    ordered = sorted(many, key=lambda c: c.cumulative_logprob or 0.0, reverse=True)
    params = greedy(n=2, best_of=6, temperature=1.5, seed=2)
    best = run(engine, [PROMPT], params)[0].outputs
    assert [c.token_ids for c in best] == [c.token_ids for c in ordered[:2]]
    assert [c.index for c in best] == [0, 1] and best[0].logprobs is None
    streamed = list(engine.stream(PROMPT, params))
    assert len(streamed) == 1 and streamed[0].finished


def test_aborting_a_request_ends_all_its_outputs(engine: Engine) -> None:
    request_id = engine.add_request(PROMPT, greedy(n=3, temperature=1.0, max_tokens=50))
    engine.step()
    engine.abort_request(request_id)
    assert not engine.has_unfinished_requests() and engine.step() == []
    engine.core.scheduler.check_invariants()


def test_outputs_may_end_at_different_times(engine: Engine) -> None:
    params = SamplingParams(n=8, temperature=1.0, seed=5, max_tokens=40, stop_token_ids=[3, 4, 5])
    last: dict[int, str | None] = {}
    for output in engine.stream(PROMPT, params):
        assert len(output.outputs) == 8
        last = {c.index: c.finish_reason for c in output.outputs}
    assert set(last.values()) <= {"stop", "length"} and "stop" in last.values()


# -- what a stream shows --------------------------------------------------------------------------


def test_deltas_add_up_to_the_whole(engine: Engine) -> None:
    params = greedy(n=2, temperature=1.0, seed=1, logprobs=1, max_tokens=11)
    (whole,) = run(engine, [PROMPT], params)
    params.output_kind = RequestOutputKind.DELTA
    tokens: dict[int, list[int]] = {0: [], 1: []}
    logprobs: dict[int, list[Any]] = {0: [], 1: []}
    outputs = list(engine.stream(PROMPT, params))
    for output in outputs:
        for completion in output.outputs:
            tokens[completion.index] += completion.token_ids
            logprobs[completion.index] += completion.logprobs or []
    assert len(outputs) == 11
    assert [tokens[0], tokens[1]] == [completion.token_ids for completion in whole.outputs]
    assert [logprobs[0], logprobs[1]] == [completion.logprobs for completion in whole.outputs]


def test_only_the_end_is_shown_when_asked(engine: Engine) -> None:
    outputs = list(engine.stream([PROMPT, LONG], greedy(output_kind=RequestOutputKind.FINAL_ONLY)))
    assert [output.finished for output in outputs] == [True, True]
    assert all(len(output.outputs[0].token_ids) == 8 for output in outputs)


def test_a_stream_may_show_several_tokens_at_once(engine: Engine) -> None:
    outputs = list(engine.stream(PROMPT, greedy(stream_interval=3, max_tokens=9)))
    assert [len(output.outputs[0].token_ids) for output in outputs] == [1, 4, 7, 9]


# -- prompts and defaults -------------------------------------------------------------------------


def test_a_request_that_bans_all_it_allows_is_refused(engine: Engine) -> None:
    params = greedy(allowed_token_ids=[7, 8], stop_token_ids=[7, 8, 9], min_tokens=1)
    with pytest.raises(ValueError, match="only tokens that bad_words or min_tokens ban"):
        run(engine, [PROMPT], params)
    params = greedy(repetition_penalty=1e-30)
    assert run(engine, [PROMPT], params)[0].outputs[0].finish_reason == "length"


def test_prompts_are_cut_from_the_left(engine: Engine) -> None:
    (cut,) = run(engine, [LONG], greedy(truncate_prompt_tokens=10))
    (short,) = run(engine, [LONG[-10:]], greedy())
    assert cut.prompt_token_ids == LONG[-10:]
    assert cut.outputs[0].token_ids == short.outputs[0].token_ids
    (fits,) = run(engine, [LONG * 20], greedy(truncate_prompt_tokens=-1, max_tokens=12))
    assert len(fits.prompt_token_ids) == 500 and len(fits.outputs[0].token_ids) == 12


def test_generation_config_is_used_only_when_asked_for(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = tmp_path / "model"
    shutil.copytree(model, copy)
    settings = {
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.9,
        "max_new_tokens": 5,
        "eos_token_id": 2,
    }
    (copy / "generation_config.json").write_text(json.dumps(settings))
    assert make(copy).get_default_sampling_params() == SamplingParams()
    with caplog.at_level("INFO", "compiledllm"):
        engine = make(copy, generation_config="auto")
    expected = SamplingParams(temperature=0.6, top_k=20, top_p=0.9, max_tokens=5)
    assert engine.get_default_sampling_params() == expected
    assert "temperature=0.6, top_p=0.9, top_k=20, max_tokens=5" in caplog.text
    assert len(run(engine, [PROMPT], None)[0].outputs[0].token_ids) <= 5
    (copy / "generation_config.json").write_text(json.dumps({"temperature": 7}))
    with pytest.raises(ConfigError, match=r"temperature must be in \[0, 2\], got 7; use .*'off'"):
        make(copy, generation_config="auto")


# -- rules, with and without run-ahead ------------------------------------------------------------


@pytest.mark.parametrize("run_ahead", [False, True])
def test_rules_hold_and_others_do_not_notice(run_ahead: bool, model: Path) -> None:
    engine = make(model, async_scheduling=run_ahead)
    (plain,) = run(engine, [PROMPT], greedy(max_tokens=20))
    banned = plain.outputs[0].token_ids[0]
    seen: list[list[int]] = []

    def spy(output: list[int], logits: Tensor) -> Tensor:
        seen.append(output)
        return logits

    params = [
        greedy(max_tokens=20),
        greedy(max_tokens=20, logit_bias={banned: -100}),
        greedy(max_tokens=20, allowed_token_ids=[7, 8, 9]),
        greedy(max_tokens=20, logits_processors=[spy]),
        greedy(max_tokens=20, frequency_penalty=2.0, presence_penalty=2.0),
    ]
    outputs = [output.outputs[0].token_ids for output in run(engine, [PROMPT] * 5, params)]
    assert outputs[0] == outputs[3] == plain.outputs[0].token_ids
    assert banned not in outputs[1]
    assert set(outputs[2]) <= {7, 8, 9}
    assert seen == [outputs[3][:n] for n in range(20)]
    assert len(set(outputs[4])) > len(set(outputs[0])) or len(set(outputs[0])) == 20


def test_going_in_circles_ends_a_request(engine: Engine) -> None:
    params = greedy(
        max_tokens=60,
        allowed_token_ids=[9],
        repetition_detection=RepetitionDetectionParams(max_pattern_size=2, min_count=4),
    )
    (completion,) = run(engine, [PROMPT], params)[0].outputs
    assert completion.finish_reason == "repetition" and completion.token_ids == [9] * 4
    pairs = greedy(
        max_tokens=60,
        logits_processors=[lambda output, logits: alternate(output, logits)],
        repetition_detection={"max_pattern_size": 3, "min_pattern_size": 2, "min_count": 3},
        min_tokens=9,
    )
    (completion,) = run(engine, [PROMPT], pairs)[0].outputs
    assert completion.finish_reason == "repetition" and len(completion.token_ids) == 9


def alternate(output: list[int], logits: Tensor) -> Tensor:
    logits.fill_(-math.inf)[10 + len(output) % 2] = 0.0
    return logits


@pytest.mark.parametrize("run_ahead", [False, True])
def test_a_failing_processor_fails_its_request_and_no_other(run_ahead: bool, model: Path) -> None:
    engine = make(model, async_scheduling=run_ahead)
    expected = run(engine, [PROMPT, LONG], greedy(max_tokens=12))

    def breaks(output: list[int], logits: Tensor) -> Tensor:
        if len(output) == 3:
            raise RuntimeError("out of ideas")
        return logits

    params = [greedy(max_tokens=12), greedy(logits_processors=[breaks]), greedy(max_tokens=12)]
    outputs = run(engine, [PROMPT, PROMPT, LONG], params)
    failed = outputs[1].outputs[0]
    assert (failed.finish_reason, len(failed.token_ids)) == ("error", 3)
    assert failed.stop_reason == "logits processor: RuntimeError: out of ideas"
    for output, other in zip((outputs[0], outputs[2]), expected, strict=True):
        assert output.outputs[0].token_ids == other.outputs[0].token_ids
    assert engine.core.scheduler.num_failed_rows == 1
    engine.core.scheduler.check_invariants()


# -- NaN ------------------------------------------------------------------------------------------


def break_token(engine: Engine, token_id: int) -> None:
    with torch.inference_mode():
        engine.core.runner.model.embedding.weight[token_id] = math.nan


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("run_ahead", [False, True])
def test_a_row_of_nan_fails_alone_and_leaves_nothing_behind(
    run_ahead: bool, device: str, model: Path
) -> None:
    """A token whose embedding is NaN: what it writes to the cache is NaN, too."""
    options = {"num_kv_blocks": 24, "async_scheduling": run_ahead, "device": device}
    engine = make(model, **options)
    good = [PROMPT, LONG, LONG[:33]]
    expected = [o.outputs[0].token_ids for o in run(make(model, **options), good, greedy())]
    break_token(engine, 123)
    for bad in (LONG[:40] + [123], [123] * 30):
        outputs = run(engine, [good[0], bad, *good[1:]], greedy())
        failed = outputs.pop(1).outputs[0]
        assert (failed.finish_reason, failed.token_ids) == ("error", [])
        assert "NaN" in str(failed.stop_reason)
        assert [output.outputs[0].token_ids for output in outputs] == expected
    # Every block has been somebody else's now, and none is found by the failed prompts' hashes.
    for _ in range(3):
        assert [o.outputs[0].token_ids for o in run(engine, good, greedy())] == expected
    assert engine.core.scheduler.num_failed_rows == 2
    engine.core.scheduler.check_invariants()


def test_streams_tell_of_the_failure(model: Path) -> None:
    engine = make(model)
    break_token(engine, 123)
    outputs = list(engine.stream([[123], PROMPT], greedy(max_tokens=3)))
    last = {output.request_id: output for output in outputs}
    reasons = [output.outputs[0].finish_reason for output in last.values()]
    assert sorted(map(str, reasons)) == ["error", "length"]
    engine.add_request([123], greedy())
    outputs = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    assert [output.outputs[0].finish_reason for output in outputs] == ["error"]


# -- beam search ----------------------------------------------------------------------------------


def test_beams_are_the_likeliest_sequences(
    model: Path, engine: Engine, exact: Callable[[list[int]], Tensor]
) -> None:
    """Against every sequence of three tokens of a small vocabulary, and a plain search."""
    params = BeamSearchParams(beam_width=4, max_tokens=3, ignore_eos=True, length_penalty=0.0)
    (output,) = engine.beam_search([PROMPT], params)
    beams: list[tuple[float, list[int]]] = [(0.0, [])]
    for _ in range(3):
        longer = []
        for score, tokens in beams:
            row = exact(PROMPT + tokens)[-1]
            longer += [(score + row[t].item(), [*tokens, t]) for t in range(128)]
        beams = sorted(longer, reverse=True)[:4]
    assert [s.tokens for s in output.sequences] == [PROMPT + tokens for _, tokens in beams]
    scores = [sequence.cum_logprob for sequence in output.sequences]
    assert scores == pytest.approx([score for score, _ in beams], abs=1e-3)
    assert all(len(sequence.logprobs) == 3 for sequence in output.sequences)


def test_beams_end_at_end_of_sequence_and_at_the_end_of_the_context(model: Path) -> None:
    engine = make(model, max_model_len=len(PROMPT) + 3)
    wide = BeamSearchParams(beam_width=64, max_tokens=9)
    outputs = engine.beam_search([PROMPT, PROMPT[:3]], wide)
    for output, prompt in zip(outputs, (PROMPT, PROMPT[:3]), strict=True):
        assert len(output.sequences) == 64
        for sequence in output.sequences:
            is_over = sequence.tokens[-1] == 2
            assert sequence.finish_reason == ("stop" if is_over else "length")
            assert is_over or len(sequence.tokens) == min(len(PROMPT) + 3, len(prompt) + 9)
    assert any(s.finish_reason == "stop" for o in outputs for s in o.sequences)


@pytest.mark.gpu
def test_a_long_prompts_logprobs_stay_inside_the_planned_workspace(
    tiny_llama: Callable[..., Path],
) -> None:
    model = tiny_llama(vocab_size=151_936, max_position_embeddings=9000)
    engine = Engine(model, dtype="bfloat16", skip_tokenizer_init=True, gpu_memory_utilization=0.2)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    prompt = [(7 * n) % 151_936 for n in range(8000)]
    (output,) = run(engine, [prompt], greedy(max_tokens=2, prompt_logprobs=20))
    budget = engine.core.report["memory"].value
    planned = budget.activations + budget.sampling  # type: ignore[attr-defined]
    assert torch.cuda.max_memory_allocated() - before <= planned
    assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == 8000
    assert all(len(entry) >= 20 for entry in output.prompt_logprobs[1:] if entry is not None)
