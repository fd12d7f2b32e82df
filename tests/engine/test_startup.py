"""A plan decides all that needs no weights, and the engine tells what became of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compiledllm import Engine, SamplingParams
from compiledllm.config import ConfigError, EngineConfig
from compiledllm.engine.core import EngineCore
from compiledllm.engine.startup import plan
from compiledllm.engine.warm_up import KINDS, warm_up
from compiledllm.graphs.artifact import Artifact, write
from compiledllm.graphs.saved_graph import SavedGraph
from compiledllm.runner.artifact_key import key_of
from compiledllm.runner.plan import Plan
from compiledllm.runner.start_cache import label_of
from tests.support.families import LFM2

TINY = {"device": "cpu", "dtype": "bfloat16", "skip_tokenizer_init": True, "enforce_eager": True}
WINDOWS = {
    "head_dim": 16,
    "sliding_window": 20,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
# Options that say nothing about how the engine runs: None or "auto" is their meaning.
MAY_BE_OPEN = {
    "artifact_dir",
    "chat_template",
    "default_chat_template_kwargs",
    "model",
    "tokenizer",
    "revision",
    "mixed_prompt_tokens",
    "target_itl_ms",
    "generation_config",
}
MAY_BE_OPEN |= {"quantization"}  # None: as the checkpoint is


def without_weights(checkpoint: Path, folder: Path) -> Path:
    (folder / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    return folder


def test_plan_needs_no_weights_and_leaves_nothing_open(
    tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    model = without_weights(tiny_llama(), tmp_path)
    planned = plan(EngineConfig.from_options(model=model, load_format="dummy", **TINY))
    unknown = {"num_kv_blocks", "kv_cache_memory_bytes"}  # the worker measures them
    for name, value in planned.options().items():
        assert value not in (None, "auto") or name in MAY_BE_OPEN | unknown, name
    assert (planned.stored_dtype, planned.spec.dtype) == ("float32", "bfloat16")
    assert planned.spec.num_bytes(planned.spec.weights) == 2 * planned.spec.num_parameters
    assert planned.block_bytes == 16 * 3 * 2 * 2 * 16 * 2
    assert planned.blocks_per_context == planned.config.limits.blocks_per_request
    assert planned.shapes_to_capture() == [] and planned.why_not_capture()


def test_plan_says_why_an_option_cannot_be_had(tiny_llama: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match="is more than the"):
        plan(EngineConfig.from_options(model=tiny_llama(), max_model_len=10**6, **TINY))


@pytest.mark.parametrize(("family", "changes"), [("llama", {}), ("ministral", WINDOWS)])
def test_options_in_use_make_the_same_engine_again(
    family: str, changes: dict[str, Any], tiny_model: Callable[..., Path]
) -> None:
    core = Engine(tiny_model(family, **changes), kv_cache_memory_bytes=10**6, **TINY).core
    options = core.options()
    assert options["attention_backend"] == "torch" and options["dtype"] == "bfloat16"
    assert options["num_kv_blocks"] == core.scheduler.block_pool.num_blocks
    tensors = {cache.data_ptr(): cache.nbytes for cache in core.runner.kv_caches}
    assert options["kv_cache_memory_bytes"] == sum(tensors.values()) <= 10**6
    again = Engine(**options).core
    assert again.options() == options
    assert again.scheduler.kv.windows == core.scheduler.kv.windows


def test_warm_up_runs_every_kind_of_request_and_leaves_no_trace(
    tiny_llama: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine(tiny_llama(), **TINY)
    core, params = engine.core, SamplingParams(temperature=0, max_tokens=5)
    expected = engine.generate([[3] * 40], params, use_tqdm=False)[0].outputs[0].token_ids
    ran: list[int] = []
    launch = core.worker.launch
    core.worker.launch = lambda step: ran.append(len(step.scheduled)) or launch(step)
    warm_up(core)
    assert max(ran) == 2 * len(KINDS) and "warm-up failed" not in caplog.text
    assert not core.has_unfinished() and core.scheduler.block_pool.usage == 0
    core.scheduler.check_invariants()
    found = engine.generate([[3] * 40], params, use_tqdm=False)[0].outputs[0].token_ids
    assert found == expected


def test_failing_warm_up_does_not_end_a_start(
    tiny_llama: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("compiledllm.log.log.propagate", True)
    engine = Engine(tiny_llama(), **TINY)

    def fail(_: object) -> None:
        raise RuntimeError("no such kernel")

    with monkeypatch.context() as patch:
        patch.setattr(engine.core.worker, "launch", fail)
        warm_up(engine.core)
    assert "the warm-up failed (RuntimeError: no such kernel)" in caplog.text
    (output,) = engine.generate([[5, 6, 7]], SamplingParams(max_tokens=2), use_tqdm=False)
    assert output.finished


@pytest.fixture
def planned(
    tiny_llama: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Plan:
    """A start that uses artifacts, also those of the folder "named"."""
    monkeypatch.setattr("compiledllm.log.log.propagate", True)
    monkeypatch.setenv("COMPILEDLLM_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("COMPILEDLLM_DISABLE_CACHE", "0")
    options = TINY | {"enforce_eager": False, "artifact_dir": str(tmp_path / "named")}
    return plan(EngineConfig.from_options(model=tiny_llama(), **options))


def test_artifact_that_cannot_be_loaded_costs_a_warning(
    planned: Plan, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its key and digests are right, but this machine cannot run what is in it."""
    graph = SavedGraph("enter", "", 1, ["self"], [], "out", [], [], "import nothing_of_this_name")
    width = planned.config.limits.max_model_len // planned.config.limits.block_size
    artifact = Artifact(key_of(planned), label_of(planned), [graph], max_blocks=width)
    write(artifact, tmp_path / "named")
    core = EngineCore(planned)
    assert "cannot be loaded (ModuleNotFoundError" in caplog.text
    assert not core.worker.is_restored and "by an earlier start" not in str(core.report["compile"])
    assert core.worker.make_artifact() is None


def test_folder_without_the_artifact_says_what_differs(
    planned: Plan, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = key_of(planned) | {"torch": "2.0.0"}
    write(Artifact(other, label_of(planned)), tmp_path / "named")
    EngineCore(planned)
    assert "has nothing for this start" in caplog.text and "not 2.0.0" in caplog.text


@pytest.mark.parametrize(
    ("family", "changes"), [("llama", {}), ("ministral", WINDOWS), ("lfm2", LFM2)]
)
def test_steps_measured_at_start_leave_no_trace(
    family: str, changes: dict[str, Any], tiny_model: Callable[..., Path]
) -> None:
    model = tiny_model(family, **changes)
    options = TINY | {"dtype": "float32", "num_kv_blocks": 64}
    prompts = [{"prompt_token_ids": [3 + i % 50 for i in range(n)]} for n in (70, 5, 200)]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    expected = Engine(model, **options).generate(prompts, params)
    engine = Engine(model, **options, target_itl_ms=500)
    times = engine.core.worker.step_times
    assert times is not None and times.read_s >= 0 and times.pair_s >= 0
    sizes, seconds = zip(*times.sizes, strict=True)
    assert sizes[:4] == (1, 16, 32, 64) and sizes[-1] <= 512
    assert list(seconds) == sorted(seconds) and seconds[0] > 0
    assert "tokens take" in engine.core.report["target_itl_ms"].reason
    found = engine.generate(prompts, params)
    assert [o.outputs[0].token_ids for o in found] == [o.outputs[0].token_ids for o in expected]


def test_a_target_below_a_decode_step_is_told(
    tiny_llama: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine(tiny_llama(), num_kv_blocks=64, target_itl_ms=1e-6, **TINY)
    assert "cannot be held" in engine.core.report["target_itl_ms"].reason
    assert "target_itl_ms cannot be held" in caplog.text


def test_streams_learn_from_their_steps(tiny_llama: Callable[..., Path]) -> None:
    """The times of steps with prompts reach the target; a decode step says nothing."""
    engine = Engine(tiny_llama(), num_kv_blocks=64, target_itl_ms=500, **TINY)
    target = engine.core.scheduler.pace.target
    assert target is not None and target.slowdown == 1
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    engine.add_request({"prompt_token_ids": [3] * 200}, params)
    while engine.has_unfinished_requests():
        engine.step()
    assert target.slowdown != 1
