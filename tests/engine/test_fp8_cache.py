"""An FP8 KV cache in the whole engine: where scales come from, and what stays the same."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compiledllm import ConfigError, Engine, SamplingParams
from compiledllm.choices import Choice
from compiledllm.cli import main
from compiledllm.config import EngineConfig
from compiledllm.engine.startup import plan
from compiledllm.kernels.attention import make_backend
from compiledllm.models.registry import load_spec
from compiledllm.platform import Platform

CPU: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "skip_tokenizer_init": True,
    "enforce_eager": True,
    "num_kv_blocks": 64,
}
WINDOWS = {
    "head_dim": 16,
    "sliding_window": 20,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
SHARED = list(range(5, 60))
PROMPTS = [[5, 6, 7], [*SHARED, 9], [*SHARED, 11, 12], [13] * 40]
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=1)


def engine_of(model: Path, **options: Any) -> Engine:
    return Engine(model, **CPU | {"kv_cache_dtype": "fp8"} | options)


def tokens_of(engine: Engine) -> list[list[int]]:
    outputs = engine.generate(PROMPTS, GREEDY, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def scales_of(engine: Engine) -> list[list[float]]:
    return [scales.tolist() for scales in engine.core.runner.model.kv_scales.values()]


def with_tensors(model: Path, folder: Path, tensors: dict[str, float], **config: Any) -> Path:
    """A copy of the checkpoint with more tensors, and more fields in its config."""
    shutil.copytree(model, folder)
    found = load_file(folder / "model.safetensors")
    more = {name: torch.tensor(value) for name, value in tensors.items()}
    save_file(found | more, folder / "model.safetensors", {"format": "pt"})
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | config))
    return folder


# -- tokens ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "changes"), [("llama", {}), ("ministral", WINDOWS)])
def test_tokens_do_not_depend_on_chunks_hits_and_preemption(
    family: str, changes: dict[str, Any], tiny_model: Callable[..., Path]
) -> None:
    model = tiny_model(family, **changes)
    engine = engine_of(model)
    expected = tokens_of(engine)
    assert {cache.dtype for cache in engine.core.runner.kv_caches} == {torch.float8_e4m3fn}
    assert tokens_of(engine) == expected  # now with hits
    assert engine.core.scheduler.num_preemptions == 0
    hits = engine.generate(PROMPTS[2], GREEDY, use_tqdm=False)[0].num_cached_tokens
    assert hits and hits >= 48
    assert tokens_of(engine_of(model, enable_prefix_caching=False)) == expected
    assert tokens_of(engine_of(model, max_num_batched_tokens=16, max_num_seqs=8)) == expected
    cramped = engine_of(model, num_kv_blocks=18 if changes else 9, max_model_len=96)
    assert tokens_of(cramped) == expected
    assert cramped.core.scheduler.num_preemptions > 0
    assert tokens_of(engine_of(model, kv_cache_dtype="fp8_e4m3")) == expected


def test_logprobs_are_near_those_of_a_16_bit_cache(tiny_model: Callable[..., Path]) -> None:
    model = tiny_model("llama")
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    found = []
    for kv_cache_dtype in ("auto", "fp8"):
        outputs = engine_of(model, kv_cache_dtype=kv_cache_dtype).generate(
            PROMPTS, params, use_tqdm=False
        )
        found.append(
            [
                next(iter(logprob.values())).logprob
                for output in outputs
                for logprob in (output.prompt_logprobs or [])[1:]
                if logprob
            ]
        )
    difference = torch.tensor(found[0]) - torch.tensor(found[1])
    assert 0 < difference.abs().mean() < 0.1
    assert difference.mean().abs() < 0.05


@pytest.mark.parametrize("backend", ["triton", "fixed_order"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter runs where there is no GPU")
def test_triton_gives_the_tokens_of_the_reference(
    backend: str, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama", num_hidden_layers=2)  # with scales of their own
    params = SamplingParams(temperature=0, max_tokens=2)

    def run() -> list[list[int]]:
        outputs = engine_of(model).generate(PROMPTS[:2], params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    expected = run()
    choice = Choice(backend, "as asked")
    monkeypatch.setattr(Platform, "choose_attention_backend", lambda *_: choice)
    assert run() == expected


@pytest.mark.gpu
def test_captured_steps_give_the_tokens_of_the_reference(
    tiny_model: Callable[..., Path],
) -> None:
    model = tiny_model("llama")
    engine = engine_of(model, device="cuda", enforce_eager=False)
    assert tokens_of(engine) == tokens_of(engine_of(model))
    graphs = engine.core.runner.graphs
    assert graphs is not None and graphs.shapes


def test_equal_layers_share_compiled_code(tiny_model: Callable[..., Path]) -> None:
    model = tiny_model("llama")
    engine = engine_of(model, enforce_eager=False, compile_when="start")
    assert tokens_of(engine) == tokens_of(engine_of(model))
    compiler = engine.core.runner.compiler
    assert compiler.is_ready and compiler.num_recompiles == 0
    assert len(engine.core.spec.distinct_layers) == 1


def test_transformers_module_has_scales_too(tiny_model: Callable[..., Path]) -> None:
    model = tiny_model("llama")
    expected = engine_of(model)
    engine = engine_of(model, model_impl="transformers")
    assert scales_of(engine) == scales_of(expected)
    assert tokens_of(engine) == tokens_of(expected)


# -- scales ----------------------------------------------------------------------------------------


def test_scales_without_a_checkpoints_are_measured_powers_of_two(
    tiny_model: Callable[..., Path],
) -> None:
    engine = engine_of(tiny_model("llama"))
    for scale in sum(scales_of(engine), []):
        assert torch.tensor(scale).log2().frac() == 0
    assert engine.core.report["kv_scales"].value == "measured"


def test_keys_beyond_fp8_are_kept_by_measured_scales(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Keys of thousands, as a large bias makes them: with a scale of 1 most would be clamped."""
    model = tiny_model("llama", attention_bias=True)
    bias = {f"model.layers.{n}.self_attn.k_proj.bias": [5000.0] * 32 for n in range(3)}
    outliers = with_tensors(model, tmp_path / "outliers", bias)  # type: ignore[arg-type]
    for key_scale, value_scale in scales_of(engine_of(outliers)):
        assert key_scale * 448 > 5000 and value_scale < 1


NAMES = {
    "plain": ("self_attn.k_scale", "self_attn.v_scale"),
    "vllm": ("self_attn.attn.k_scale", "self_attn.attn.v_scale"),
    "projections": ("self_attn.k_proj.k_scale", "self_attn.v_proj.v_scale"),
    "llm-compressor": ("self_attn.k_proj.output_scale", "self_attn.v_proj.output_scale"),
    "both": ("self_attn.kv_scale",),
}


@pytest.mark.parametrize("kind", NAMES)
def test_a_checkpoints_scales_are_used(
    kind: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    names = [f"model.layers.{layer}.{name}" for layer in range(3) for name in NAMES[kind]]
    scales = {name: 0.25 + 0.125 * index for index, name in enumerate(names)}
    engine = engine_of(with_tensors(tiny_model("llama"), tmp_path / "scaled", scales))
    values = [[value] * (2 if kind == "both" else 1) for value in scales.values()]
    assert sum(scales_of(engine), []) == sum(values, [])
    assert engine.core.report["kv_scales"].value == "checkpoint"
    engine_of(tmp_path / "scaled", kv_cache_dtype="auto")  # which has no use for them


def test_scales_of_other_parts_of_the_checkpoint_are_not_the_layers(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    own = {f"model.layers.{n}.self_attn.{part}_scale": 0.25 for n in range(3) for part in "kv"}
    others = ("mtp.layers.0.self_attn", "vision_tower.encoder.layers.1.self_attn")
    scales = own | {f"{name}.{part}_scale": 0.5 for name in others for part in "kv"}
    engine = engine_of(with_tensors(tiny_model("llama"), tmp_path / "scaled", scales))
    assert scales_of(engine) == [[0.25, 0.25]] * 3


@pytest.mark.parametrize("key_scale", [1e-4, 1e4])
def test_scales_that_clip_or_round_off_are_replaced_with_a_warning(
    key_scale: float, tiny_model: Callable[..., Path], tmp_path: Path, caplog: Any
) -> None:
    name = "model.layers.1.self_attn."
    scales = {f"{name}k_scale": key_scale, f"{name}v_scale": 1.0}
    model = with_tensors(tiny_model("llama"), tmp_path / "clipping", scales)
    with caplog.at_level(logging.WARNING, "compiledllm"):
        engine = engine_of(model)
    assert "layer 1: the checkpoint's KV scales" in caplog.text
    assert scales_of(engine) == scales_of(engine_of(tiny_model("llama")))


@pytest.mark.parametrize("scale", [[], float("nan")])
def test_a_scale_that_is_no_number_is_named(
    scale: Any, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    name = "model.layers.1.self_attn.k_scale"
    model = with_tensors(tiny_model("llama"), tmp_path / "damaged", {name: scale})
    with pytest.raises(ConfigError, match=f"tensor '{name}' holds .* a KV cache's scale"):
        engine_of(model)


def test_a_scheme_that_is_no_object_is_refused(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    quantization = {"quant_method": "compressed-tensors", "kv_cache_scheme": "fp8"}
    model = with_tensors(
        *(tiny_model("llama"), tmp_path / "text", {}), quantization_config=quantization
    )
    with pytest.raises(ConfigError, match="kv_cache_scheme='fp8' is not supported"):
        engine_of(model)


def test_scales_of_another_dtype_are_not_used(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    names = [f"model.layers.{n}.self_attn.{part}_scale" for n in range(3) for part in "kv"]
    int8 = {"num_bits": 8, "type": "int", "strategy": "tensor"}
    quantization = {"quant_method": "compressed-tensors", "kv_cache_scheme": int8}
    model = with_tensors(
        *(tiny_model("llama"), tmp_path / "int8", dict.fromkeys(names, 0.5)),
        quantization_config=quantization,
    )
    assert engine_of(model).core.report["kv_scales"].value == "measured"


# -- what the checkpoint asks for ------------------------------------------------------------------

_IN_FP8 = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
_MODELOPT = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["*"]}
_COMPRESSED = {"quant_method": "compressed-tensors", "format": "dense", "config_groups": {}}
STORED = {
    "compressed-tensors": (_COMPRESSED | {"kv_cache_scheme": _IN_FP8}, "fp8 (the checkpoint's)"),
    "modelopt": (_MODELOPT | {"kv_cache_quant_algo": "FP8"}, "fp8 (the checkpoint's)"),
    "modelopt's scheme": (_MODELOPT | {"kv_cache_scheme": _IN_FP8}, "fp8 (the checkpoint's)"),
    "none": (_MODELOPT | {"kv_cache_quant_algo": None}, "float32 (the model's)"),
    "int8": (
        _COMPRESSED | {"kv_cache_scheme": _IN_FP8 | {"type": "int"}},
        "float32 (the checkpoint's format, int of 8 bits, is not supported)",
    ),
    "NVFP4": (
        _MODELOPT | {"kv_cache_quant_algo": "NVFP4"},
        "float32 (the checkpoint's format, NVFP4, is not supported)",
    ),
}


@pytest.mark.parametrize("kind", STORED)
@pytest.mark.parametrize("asked", ["auto", "fp8", "float32"])
def test_auto_is_what_the_checkpoint_says(
    asked: str, kind: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    fields, expected = STORED[kind]
    model = with_tensors(tiny_model("llama"), tmp_path / "m", {}, quantization_config=fields)
    found = plan(EngineConfig.from_options(model=model, **CPU | {"kv_cache_dtype": asked}))
    assert str(found.report["kv_cache_dtype"]) == (
        expected if asked == "auto" else f"{asked} (as asked)"
    )
    kv_dtype = torch.float8_e4m3fn if "fp8 (" in str(found.report["kv_cache_dtype"]) else None
    assert found.spec.torch_kv_dtype == (kv_dtype or torch.float32)


def test_auto_reads_modelopts_own_file_and_uses_the_scales(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    names = [f"model.layers.{n}.self_attn.{p}_proj.{p}_scale" for n in range(3) for p in "kv"]
    scales = {name: 0.25 + 0.125 * index for index, name in enumerate(names)}
    model = with_tensors(tiny_model("llama"), tmp_path / "modelopt", scales)
    algorithms = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["*"]}
    (model / "hf_quant_config.json").write_text(json.dumps({"quantization": algorithms}))
    engine = engine_of(model, kv_cache_dtype="auto")
    assert {cache.dtype for cache in engine.core.runner.kv_caches} == {torch.float8_e4m3fn}
    assert sum(scales_of(engine), []) == list(scales.values())
    assert engine.core.report["kv_scales"].value == "checkpoint"


def test_auto_stays_in_16_bits_where_the_gpu_converts_no_fp8(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields, _ = STORED["modelopt"]
    model = with_tensors(tiny_model("llama"), tmp_path / "m", {}, quantization_config=fields)
    monkeypatch.setattr(Platform, "converts_fp8", False)
    found = plan(EngineConfig.from_options(model=model, **CPU))
    assert found.spec.torch_kv_dtype == torch.float32
    assert "which this GPU does not convert" in found.report["kv_cache_dtype"].reason


# -- options ---------------------------------------------------------------------------------------


def test_a_token_takes_half_the_bytes(tiny_model: Callable[..., Path]) -> None:
    sizes = {}
    for dtype in ("auto", "bfloat16", "fp8"):
        options = CPU | {"dtype": "bfloat16", "kv_cache_dtype": dtype}
        sizes[dtype] = plan(EngineConfig.from_options(model=tiny_model("llama"), **options))
    assert sizes["auto"].block_bytes == sizes["bfloat16"].block_bytes
    assert sizes["auto"].block_bytes == 2 * sizes["fp8"].block_bytes
    assert sizes["auto"].options()["kv_cache_dtype"] == "bfloat16"
    assert sizes["fp8"].options()["kv_cache_dtype"] == "fp8"


def test_info_counts_half_the_bytes(
    tiny_model: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    shown = []
    for dtype in ("auto", "fp8"):
        options = ["--dtype", "bfloat16", "--device", "cpu", "--kv-cache-dtype", dtype]
        main(["info", str(tiny_model("llama")), "--json", *options])
        shown.append(json.loads(capsys.readouterr().out))
    wide, narrow = shown
    assert wide["kv_cache_dtype"] == "bfloat16 (the model's)"
    assert narrow["kv_cache_dtype"] == "fp8 (as asked)"
    assert wide["kv_bytes_per_token"] == 2 * narrow["kv_bytes_per_token"]


def test_options_that_cannot_be_had_are_refused_with_a_way_out(
    tiny_model: Callable[..., Path],
) -> None:
    with pytest.raises(ConfigError, match="kv_cache_dtype must be one of auto, .*got 'fp8_e5m2'"):
        engine_of(tiny_model("llama"), kv_cache_dtype="fp8_e5m2")
    with pytest.raises(ConfigError, match=r"kv_cache_dtype='float16' is neither.*\(float32\).*use"):
        engine_of(tiny_model("llama"), kv_cache_dtype="float16")


def test_a_backend_without_fp8_is_replaced(tiny_model: Callable[..., Path]) -> None:
    layers = load_spec(tiny_model("llama")).attentions
    flashinfer, others = make_backend("flashinfer"), ("torch", "triton", "fixed_order")
    flashinfer.head_dims = (16,)
    reason = flashinfer.why_not(layers, torch.bfloat16, torch.float8_e4m3fn)
    assert reason == "it has no kernels for a KV cache in float8_e4m3fn"
    assert flashinfer.why_not(layers, torch.bfloat16, torch.bfloat16) is None
    for name in others:
        assert make_backend(name).why_not(layers, torch.bfloat16, torch.float8_e4m3fn) is None
