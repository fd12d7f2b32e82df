"""Which published models' blocks can run as one call, and why others cannot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from compiledllm.models.decode_blocks import why_not
from compiledllm.models.registry import load_spec
from compiledllm.models.sharded_spec import sharded
from compiledllm.models.spec import ModelSpec
from tests.support.real_configs import MODELS

WINDOWS = {
    "layer_types": ["full_attention", "sliding_attention"] * 14,
    "use_sliding_window": True,
    "sliding_window": 64,
}
FITTING = {
    *("Qwen3-0.6B", "Qwen3-4B-Instruct-2507", "Qwen3-32B", "Qwen3-VL-8B", "Qwen2.5-VL-7B"),
    *("Mistral-Small-3.2-24B", "Seed-OSS-36B", "phi-4", "Phi-4-mini"),
}
REASONS = {
    "Qwen3-30B-A3B": "not dense and gated",
    "Qwen3.5-9B": "keep a state",
    "gemma-3-27b": "'sandwich'",
    "gemma-4-E4B": "'sandwich'",
    "gpt-oss-20b": "not dense and gated",
    "Olmo-3-7B": "'post'",
    "Hunyuan-7B": "norms_rotated",
    "ERNIE-4.5-0.3B": "queries and keys",  # rotates neighbouring dimensions
    "Ministral-3-8B": "queries and keys",  # which grow with their position
    "SmolLM3-3B": "queries and keys",  # in some layers not rotated
    "Apertus-8B": "not dense and gated",
}


def spec_of(config: dict[str, Any], folder: Path) -> ModelSpec:
    (folder / "config.json").write_text(json.dumps(config))
    return load_spec(folder, "auto", None)


def test_published_models_fit_or_are_refused_in_words(tmp_path: Path) -> None:
    reasons = {name: why_not(spec_of(config, tmp_path)) for name, (_, config) in MODELS.items()}
    assert {name for name, reason in reasons.items() if reason is None} == FITTING
    for name, words in REASONS.items():
        assert words in str(reasons[name]), name


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_act": "relu"}, "activation is relu"),
        (WINDOWS, None),
    ],
    ids=["activation", "windows"],
)
def test_changes_of_a_fitting_config(
    change: dict[str, Any], words: str | None, tmp_path: Path
) -> None:
    reason = why_not(spec_of(MODELS["Qwen3-0.6B"][1] | change, tmp_path))
    assert reason is None if words is None else words in str(reason)


def test_a_part_of_a_model_is_refused(tmp_path: Path) -> None:
    spec = spec_of(MODELS["Qwen3-0.6B"][1], tmp_path)
    assert "several GPUs" in str(why_not(sharded(spec, 2)))
