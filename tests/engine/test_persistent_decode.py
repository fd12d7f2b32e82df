"""Decode steps of few rows in one call give the tokens of the loop over the blocks.

On a CPU the torch reference stands in for the kernel.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from compiledllm import Engine, SamplingParams
from compiledllm.config import EngineConfig
from compiledllm.engine.startup import plan
from compiledllm.kernels.decode_step import ALL_ROWS, FIELDS, MAX_ROWS, DecodeShape
from compiledllm.kernels.machine_code import CudaError
from compiledllm.runner.decode_step import use_decode_step, why_not
from tests.support.cuda_on_cpu import use_cuda_kernels_on_cpu
from tests.support.decode_step import (
    Reference,
    decode_step_of,
    emulate_kernel,
    use_kernel,
    use_reference,
)
from tests.support.distributions import VOCABULARY, WIDE, assert_alike, steps_of

# name -> model type, config.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {}),
    "all biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "biases of qkv": ("qwen2", {}),
    "qk norms": ("qwen3", {"head_dim": 32}),
    "windows": ("mistral", {"sliding_window": 20}),
    "norms plus one": ("gemma", {"head_dim": 32, "num_key_value_heads": 1}),
    "partial rotation": ("phi3", {"partial_rotary_factor": 0.5, "pad_token_id": 0}),
}
WHOLE_UNITS = {"hidden_size": 128, "intermediate_size": 128}  # of quantised weights
SHARED = [random.Random(0).randrange(3, 128) for _ in range(90)]
PROMPTS = [[random.Random(n).randrange(3, 128) for _ in range(n)] for n in (1, 15, 16, 40, 100)]
PROMPTS += [[*SHARED[:n], *range(3, 8)] for n in (90, 64, 20)]


def make(checkpoint: Path, **options: Any) -> Engine:
    fixed = {"device": "cpu", "dtype": "float32", "skip_tokenizer_init": True, "num_kv_blocks": 200}
    return Engine(checkpoint, **(fixed | {"enforce_eager": True} | options))


def greedy(
    engine: Engine, prompts: list[list[int]] = PROMPTS, max_tokens: int = 24
) -> list[list[int]]:
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    outputs = engine.generate(prompts, params, use_tqdm=False)
    engine.core.scheduler.check_invariants()
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture(scope="module", params=MODELS)
def checkpoint(request: pytest.FixtureRequest, tiny_model: Callable[..., Path]) -> Path:
    model_type, config = MODELS[request.param]
    return tiny_model(model_type, **config)


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list[list[int]]:
    found = greedy(make(checkpoint))
    assert len(set(map(tuple, found))) > 3
    return found


@pytest.mark.parametrize(
    "options",
    [
        {"async_scheduling": False},
        {"async_scheduling": True, "max_num_batched_tokens": 48},
        {"max_num_batched_tokens": 7, "max_num_seqs": 3, "enable_prefix_caching": False},
    ],
    ids=str,
)
def test_tokens_are_those_of_the_loop_over_blocks(
    options: dict[str, Any], checkpoint: Path, expected: list[list[int]]
) -> None:
    engine = make(checkpoint, **options)
    reference = use_reference(engine)
    assert greedy(engine) == expected
    assert greedy(engine) == expected  # most of it from the prefix cache
    assert max(reference.rows) == min(len(PROMPTS), options.get("max_num_seqs", MAX_ROWS))
    assert greedy(engine, PROMPTS[:1]) == expected[:1] and reference.rows[-1] == 1


def test_preempted_requests_get_the_same_tokens(
    checkpoint: Path, expected: list[list[int]]
) -> None:
    engine = make(checkpoint, num_kv_blocks=10, enable_prefix_caching=False)
    reference = use_reference(engine)
    assert greedy(engine) == expected
    assert engine.core.scheduler.num_preemptions > 0 and reference.rows


def test_larger_steps_run_block_by_block(tiny_llama: Callable[..., Path]) -> None:
    prompts = [[random.Random(n).randrange(3, 128) for _ in range(9)] for n in range(MAX_ROWS + 3)]
    engine = make(tiny_llama())
    expected = greedy(engine, prompts)
    reference = use_reference(engine)
    assert greedy(engine, prompts) == expected
    assert not reference.rows
    assert greedy(engine, prompts[:MAX_ROWS]) == expected[:MAX_ROWS]
    assert set(reference.rows) == {MAX_ROWS}


def test_steps_of_other_numbers_of_rows_run_block_by_block(tiny_llama: Callable[..., Path]) -> None:
    engine = make(tiny_llama())
    expected = greedy(engine)
    reference = use_reference(engine, range(2, 5))
    for num_rows, is_taken in ((1, False), (2, True), (4, True), (5, False)):
        reference.rows.clear()
        assert greedy(engine, PROMPTS[:num_rows]) == expected[:num_rows]
        assert set(reference.rows) == ({num_rows} if is_taken else set())


@pytest.mark.parametrize(
    ("model_type", "config", "quantization"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}, None),
        ("qwen3", {"rope_theta": 1000.0}, None),
        ("mistral", {"sliding_window": 20}, None),
        ("qwen3", WHOLE_UNITS, "fp8"),
        ("llama", WHOLE_UNITS, "int4"),
    ],
    ids=["biases", "qk norms", "window", "fp8", "int4"],
)
def test_the_emulated_kernel_gives_the_distributions_of_the_loop(
    model_type: str,
    config: dict[str, Any],
    quantization: str | None,
    tiny_model: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use_cuda_kernels_on_cpu(monkeypatch)
    sizes = {"intermediate_size": 96, "head_dim": 32, "num_hidden_layers": 2}
    checkpoint = tiny_model(model_type, **(sizes | config))
    options = {"dtype": "bfloat16", "max_logprobs": VOCABULARY, "enable_prefix_caching": False}
    engine = make(checkpoint, quantization=quantization, **options)
    prompts = [PROMPTS[index] for index in (0, 3, 5, 7)]
    expected = [steps_of(engine, part, 6) for part in (prompts, prompts[3:])]
    emulate_kernel(monkeypatch)
    use_kernel(engine)
    for part, wanted in zip((prompts, prompts[3:]), expected, strict=True):
        assert_alike(steps_of(engine, part, 6), wanted)


def test_rounding_alone_does_not_make_distributions_differ(
    tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    """In the model with which tests on a GPU compare the kernel with those of single layers."""
    shutil.copytree(tiny_llama(**WIDE, head_dim=128), tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    rounded = {name: weight.bfloat16() for name, weight in weights.items()}
    save_file(rounded, tmp_path / "model.safetensors", {"format": "pt"})
    found, exact = (
        steps_of(make(tmp_path, dtype=dtype, max_logprobs=VOCABULARY), PROMPTS[3:5], 8)
        for dtype in ("bfloat16", "float32")
    )
    assert_alike(found, exact)


@pytest.mark.parametrize("quantization", ["fp8", "int4"])
def test_packed_matrices_give_the_tokens_of_the_loop(
    quantization: str, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    use_cuda_kernels_on_cpu(monkeypatch)
    checkpoint = tiny_model("qwen2", intermediate_size=128, hidden_size=128, num_hidden_layers=2)
    options = {"dtype": "bfloat16", "quantization": quantization}
    engine = make(checkpoint, **options, enable_prefix_caching=False)
    expected = greedy(engine, PROMPTS[:2], 6)
    use_reference(engine)
    decode_step = engine.core.runner.model.decode_step
    assert decode_step is not None
    assert {layout.code for layout in decode_step.shape.layouts if layout} == {quantization}
    table = dict(zip(FIELDS, decode_step.table[0].tolist(), strict=True))
    assert table["down_weight"] and table["down_row_scales"] and table["qkv_bias"]
    assert greedy(engine, PROMPTS[:2], 6) == expected


def test_an_fp8_cache_has_its_scales(tiny_llama: Callable[..., Path]) -> None:
    options = {"kv_cache_dtype": "fp8"}
    expected = greedy(make(tiny_llama(), **options))
    engine = make(tiny_llama(), **options)
    use_reference(engine)
    assert greedy(engine) == expected != greedy(make(tiny_llama()))


def test_the_table_has_the_address_of_every_tensor(tiny_model: Callable[..., Path]) -> None:
    engine = make(tiny_model("qwen3", head_dim=32))
    core = engine.core
    step = decode_step_of(engine, Reference())
    step.bind(core.runner.kv_caches)
    parameters = dict(core.runner.model.layers[1].named_parameters())
    row = dict(zip(FIELDS, step.table[1].tolist(), strict=True))
    names = {
        "attn_norm": "attn_norm.weight",
        "mlp_norm": "mlp_norm.weight",
        "q_norm": "attn.q_norm.weight",
        "k_norm": "attn.k_norm.weight",
        "qkv_weight": "attn.qkv.weight",
        "out_weight": "attn.out.weight",
        "gate_up_weight": "mlp.gate_up.weight",
        "down_weight": "mlp.down.weight",
    }
    addresses = {field: parameters[name].data_ptr() for field, name in names.items()}
    kv_cache = core.runner.kv_caches[1]
    addresses |= {"keys": kv_cache[0].data_ptr(), "values": kv_cache[1].data_ptr()}
    assert {field: address for field, address in row.items() if address} == addresses


class Broken(Reference):
    def compile(self, shape: DecodeShape, rows: range) -> None:
        raise CudaError("no compiler")


def test_a_kernel_that_does_not_compile_is_done_without(tiny_llama: Callable[..., Path]) -> None:
    engine = make(tiny_llama())
    runner = engine.core.runner
    choice = use_decode_step(runner, decode_step_of(engine, Broken()))
    assert str(choice) == "layer by layer (no compiler)"
    assert runner.model.decode_step is None


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (ALL_ROWS, f"up to {MAX_ROWS} rows"),
        (range(1, 2), "1 row"),
        (range(2, 5), "2 to 4 rows"),
        (range(2, 3), "2 rows"),
    ],
)
def test_the_report_says_which_steps_one_kernel_runs(
    rows: range, words: str, tiny_llama: Callable[..., Path]
) -> None:
    engine = make(tiny_llama())
    runner = engine.core.runner
    choice = use_decode_step(runner, decode_step_of(engine, Reference(), rows))
    assert choice.value == f"all layers in one kernel at {words}"
    assert runner.model.decode_step is not None


@pytest.mark.parametrize(
    ("model_type", "options", "reason"),
    [
        ("llama", {}, "CUDA graphs need a GPU"),
        ("llama", {"persistent_decode": False}, "persistent_decode=False"),
        ("ministral", {}, "several block tables"),
    ],
    ids=str,
)
def test_what_is_known_before_the_weights(
    model_type: str, options: dict[str, Any], reason: str, tiny_model: Callable[..., Path]
) -> None:
    kinds = ["full_attention", "sliding_attention", "sliding_attention"]
    windows = {"sliding_window": 33, "head_dim": 16, "layer_types": kinds}
    checkpoint = tiny_model(model_type, **(windows if model_type == "ministral" else {}))
    asked = {"device": "cpu", "load_format": "dummy"} | options
    found = why_not(plan(EngineConfig.from_options(model=checkpoint, **asked)))
    assert reason in str(found)
