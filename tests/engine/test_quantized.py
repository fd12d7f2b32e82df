"""Quantised models in the whole engine: compiled as eager, one block for equal layers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compiledllm import ConfigError, Engine, SamplingParams
from compiledllm.graphs.compile import Variant
from compiledllm.runner import model_runner
from tests.support.quantized import save_quantized

PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5, 4], [11] * 20]
CONFIG = {"intermediate_size": 128, "attention_bias": True}


def tokens_of(model: Path, **options: Any) -> tuple[list[list[int]], Engine]:
    fixed = {"device": "cpu", "dtype": "float32", "skip_tokenizer_init": True}
    engine = Engine(model, **fixed, num_kv_blocks=64, **options)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    outputs = engine.generate(PROMPTS, params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs], engine


def test_quantised_checkpoint_gives_the_tokens_of_its_dequantised_weights_compiled_or_not(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled for any number of tokens but one, which no step here has."""
    monkeypatch.setattr(model_runner, "variants_for", lambda *_: [Variant(2, 2**30, 2)])
    packed, dense = save_quantized(tiny_model("llama", **CONFIG), tmp_path, "gptq permuted")
    expected, _ = tokens_of(dense, enforce_eager=True)
    assert tokens_of(packed, enforce_eager=True)[0] == expected
    tokens, engine = tokens_of(packed, compile_when="start")
    assert tokens == expected
    compiler = engine.core.runner.compiler
    assert compiler.is_ready and compiler.num_recompiles == 0
    assert len(engine.core.spec.distinct_layers) == 1


def test_option_quantises_while_loading(tiny_model: Callable[..., Path]) -> None:
    model = tiny_model("llama", **CONFIG)
    plain, _ = tokens_of(model, enforce_eager=True)
    tokens, engine = tokens_of(model, enforce_eager=True, quantization="int8")
    assert engine.core.spec.quantization == "int8, quantised while loading"
    assert [len(row) for row in tokens] == [len(row) for row in plain]
    with pytest.raises(ConfigError, match="quantization must be one of fp8, fp8_block, int8, int4"):
        Engine(model, quantization="int3")


def test_dummy_weights_of_a_quantised_config(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    packed, _ = save_quantized(tiny_model("llama", **CONFIG), tmp_path, "fp8 blocks")
    (packed / "model.safetensors").unlink()
    tokens, _ = tokens_of(packed, load_format="dummy", enforce_eager=True)
    assert json.loads((packed / "config.json").read_text())["quantization_config"]
    assert len(tokens) == len(PROMPTS)
