"""A config read as data gives the spec that transformers' config gives, or is left to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from compiledllm.models.plain_config import DEFAULTS, plain_config
from compiledllm.models.registry import _hf_config, family_of
from tests.support.families import VARIANTS
from tests.support.tiny import TINY

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
ROPE = {"rope_type": "default", "rope_theta": 5000.0}
FORMS: list[dict[str, Any]] = [
    {},
    TINY,
    {"rope_theta": 1000000, "rope_scaling": None},
    {"rope_parameters": ROPE},
    {"dtype": "bfloat16"},
    {"torch_dtype": "float16"},
    {"dtype": "bfloat16", "torch_dtype": "bfloat16"},
    {"eos_token_id": [1, 7]},
    {"eos_token_id": None},
    {"num_hidden_layers": 3, "use_sliding_window": True, "max_window_layers": 1},
    {"num_hidden_layers": 3, "use_sliding_window": True, "max_window_layers": 0},
    {"num_hidden_layers": 3, "sliding_window": None},
    {"attention_bias": True, "mlp_bias": True},
    {"head_dim": 48, "num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 256},
    {"initializer_range": 0.5, "rms_norm_eps": 1e-5, "hidden_act": "gelu"},
]
LEFT: list[dict[str, Any]] = [
    {"rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "rope_theta": 500.0},
    {"rope_parameters": ROPE | {"partial_rotary_factor": 0.5}},
    {"rope_parameters": ROPE, "rope_theta": 7.0},
    {"partial_rotary_factor": 0.5},
    {"hidden_size": "64"},
    {"hidden_size": True},
    {"hidden_size": 0},
    {"num_attention_heads": 7},
    {"rms_norm_eps": None},
    {"dtype": "float64"},
    {"dtype": ["bfloat16"]},
    {"dtype": "bfloat16", "torch_dtype": "float16"},
    {"eos_token_id": ["2"]},
    {"layer_types": ["chunked_attention"] * 32},
    {"text_config": {}},
    {"model_type": "gemma2"},
    {"model_type": None},
    {"model_type": []},
]


def check_equal(raw: dict[str, Any], folder: Path) -> bool:
    """Compare the specs; returns whether the config was read as data."""
    (folder / "config.json").write_text(json.dumps(raw))
    plain = plain_config(raw)
    if plain is None:
        return False
    family = family_of(raw["architectures"][0])
    assert family.spec_from_hf(plain) == family.spec_from_hf(_hf_config(folder))
    return True


def raw_config(model_type: str, changes: dict[str, Any]) -> dict[str, Any]:
    return {"model_type": model_type, "architectures": [ARCHITECTURES[model_type]]} | changes


@pytest.mark.parametrize("changes", FORMS, ids=str)
@pytest.mark.parametrize("model_type", DEFAULTS)
def test_config_read_as_data_gives_the_same_spec(
    model_type: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    assert check_equal(raw_config(model_type, changes), tmp_path)


@pytest.mark.parametrize("family", DEFAULTS)
def test_variants_of_a_family_give_the_same_spec(family: str, tmp_path: Path) -> None:
    variants = [changes for (name, _), changes in VARIANTS.items() if name == family]
    as_data = [check_equal(raw_config(family, TINY | changes), tmp_path) for changes in variants]
    assert any(as_data)


@pytest.mark.parametrize("changes", LEFT, ids=str)
def test_config_of_uncertain_meaning_is_left_to_transformers(changes: dict[str, Any]) -> None:
    assert plain_config(raw_config("qwen2", changes)) is None


def test_default_model_is_read_as_data(default_model: Path, tmp_path: Path) -> None:
    assert check_equal(json.loads((default_model / "config.json").read_text()), tmp_path)
