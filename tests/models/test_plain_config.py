"""A config read as data gives the spec that transformers' config gives, or is left to it."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from compiledllm.models.plain_config import plain_config
from compiledllm.models.registry import _check_sizes, _hf_config, family_of
from tests.support import config_fields
from tests.support.families import VARIANTS
from tests.support.real_configs import MODELS
from tests.support.tiny import TIED, TINY, VISION_OF

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
ROPE = {"rope_type": "default", "rope_theta": 5000.0}
SCALED = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
FORMS: list[dict[str, Any]] = [
    {},
    TINY,
    {"rope_theta": 1000000, "rope_scaling": None},
    {"rope_parameters": ROPE},
    {"rope_parameters": ROPE | {"partial_rotary_factor": 0.5}},
    {"rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "rope_theta": 500.0},
    {"rope_scaling": {"rope_type": "llama3", "factor": 8.0} | SCALED},
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
    {"rope_scaling": {"type": "linear"}},
    {"rope_scaling": {"type": "linear", "rope_type": "dynamic", "factor": 2.0}},
    {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
    {"rope_parameters": ROPE, "rope_theta": 7.0},
    {"rope_scaling": {"rope_type": "su", "factor": 2.0}},
    {"hidden_size": "64"},
    {"hidden_size": True},
    {"hidden_size": 0},
    {"num_attention_heads": 7},
    {"rms_norm_eps": None},
    {"dtype": "float64"},
    {"dtype": ["bfloat16"]},
    {"dtype": "bfloat16", "torch_dtype": "float16"},
    {"eos_token_id": ["2"]},
    {"layer_types": ["other_attention"] * 32},
    {"text_config": {}},
    {"model_type": None},
    {"model_type": []},
]


# Values of each type, of which most are wrong wherever they stand.
WRONG: list[Any] = ["drop", None, 0, "", 1, -1, True, 2.5, "x", [], {}, [1], ["full_attention"]]
PARTS = {"text_config", "rope_scaling", "rope_parameters", "full_attention", "sliding_attention"}
# Files name both a field and its alias only in this table.
TWO_NAMES = {"gpt2": {"max_position_embeddings"}}


def raw_config(model_type: str, changes: dict[str, Any]) -> dict[str, Any]:
    return {"model_type": model_type, "architectures": [ARCHITECTURES[model_type]]} | changes


def outcome(family: ModuleType, config: Any) -> Any:
    """The spec, or the error's text."""
    try:
        _check_sizes(config.get_text_config())
        return family.spec_from_hf(config)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def check_equal(raw: dict[str, Any], folder: Path) -> bool:
    """Compare the specs, or the errors; returns whether the config was read as data."""
    plain = plain_config(copy.deepcopy(raw))
    if plain is None:
        return False
    family = family_of(raw["architectures"][0])
    if "rotary_dim" in raw:  # versions of transformers before 5.20 do not read the field
        raw = raw | {"partial_rotary_factor": raw["rotary_dim"] / raw["head_dim"]}
    (folder / "config.json").write_text(json.dumps(raw))
    try:
        expected = outcome(family, _hf_config(folder))
    except Exception as error:
        expected = f"{type(error).__name__}: {error}"
    assert outcome(family, plain) == expected
    return True


def tiny_configs() -> dict[str, dict[str, Any]]:
    """Each variant of the families as a file, by its name."""
    from transformers.models.auto import modeling_auto as auto

    names = dict(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    names |= {t: auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[t] for t in VISION_OF}
    found = {}
    for (model_type, variant), changes in VARIANTS.items():
        fields = {k: v for k, v in TINY.items() if k not in TWO_NAMES.get(model_type, ())} | changes
        if model_type in VISION_OF:
            tied = TIED if model_type.startswith("gemma") else {"tie_word_embeddings": False}
            text = {"model_type": f"{model_type}_text"} | fields | tied
            fields = {"text_config": text, "vision_config": VISION_OF[model_type]} | tied
        raw = {"model_type": model_type, "architectures": [names[model_type]]} | fields
        found[f"{model_type}, {variant}"] = raw
    return found


def mutations(raw: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The config with one field dropped or of another value; each field several times."""
    for index, path in enumerate(paths_of(raw)):
        for value in WRONG[index % 6 :: 6]:
            changed = copy.deepcopy(raw)
            place = changed
            for name in path[:-1]:
                place = place[name]
            if value == "drop":
                del place[path[-1]]
            else:
                place[path[-1]] = value
            yield changed


def paths_of(fields: dict[str, Any]) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    for name, value in fields.items():
        if name not in ("architectures", "rotary_dim"):
            found.append((name,))
        if name in PARTS and isinstance(value, dict):
            found += [(name, *rest) for rest in paths_of(value)]
    return found


@pytest.mark.parametrize("changes", FORMS, ids=str)
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_config_read_as_data_gives_the_same_spec(
    model_type: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    assert check_equal(raw_config(model_type, changes), tmp_path)


def test_variants_of_all_families_are_read_as_data(tmp_path: Path) -> None:
    for name, raw in tiny_configs().items():
        assert check_equal(raw, tmp_path), name


def test_published_configs_are_read_as_data(tmp_path: Path) -> None:
    for name, (_, raw) in MODELS.items():
        assert check_equal(raw, tmp_path), name


def test_damaged_configs_give_the_same_spec_or_error_or_are_left(tmp_path: Path) -> None:
    published = [raw for _, raw in MODELS.values()]
    of_each_type = {raw["model_type"]: raw for raw in [*published, *tiny_configs().values()]}
    read = [check_equal(c, tmp_path) for raw in of_each_type.values() for c in mutations(raw)]
    assert 0.05 < sum(read) / len(read) < 0.6


def test_base_that_depends_on_the_version_has_to_be_named() -> None:
    olmo3 = MODELS["Olmo-3-7B"][1]
    assert plain_config({k: v for k, v in olmo3.items() if k != "rope_theta"}) is None


@pytest.mark.parametrize("changes", LEFT, ids=str)
def test_config_of_uncertain_meaning_is_left_to_transformers(changes: dict[str, Any]) -> None:
    assert plain_config(raw_config("qwen2", changes)) is None


@pytest.mark.parametrize("name", ["n_embd", "n_head", "n_layer", "n_positions"])
def test_size_that_the_file_does_not_name_is_left_to_transformers(name: str) -> None:
    sizes = {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 512}
    raw = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    assert plain_config(raw | sizes) is not None
    del sizes[name]
    assert plain_config(raw | sizes) is None


def test_original_length_beside_the_rope_parameters_is_the_one_that_counts(tmp_path: Path) -> None:
    def spec(length: int, beside: dict[str, int]) -> Any:
        rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": length}
        raw = raw_config("qwen2", {"rope_scaling": rope} | beside)
        (tmp_path / "config.json").write_text(json.dumps(raw))
        return family_of("Qwen2ForCausalLM").spec_from_hf(_hf_config(tmp_path))

    beside = {"original_max_position_embeddings": 64}
    assert spec(512, {}) != spec(512, beside) == spec(64, {})


def test_default_model_is_read_as_data(default_model: Path, tmp_path: Path) -> None:
    assert check_equal(json.loads((default_model / "config.json").read_text()), tmp_path)


def test_fields_are_those_of_the_installed_transformers() -> None:
    """A default or a type that differs here has to be left out of the file, or has to change."""
    table = json.loads(config_fields.FILE.read_text())
    assert set(table["read"]) == config_fields.read_names()
    for model_type, found in config_fields.installed()["types"].items():
        fields = table["types"][model_type]["fields"]
        for name, (types, *default) in found["fields"].items():
            stored_types, *stored = fields[name]
            assert not stored or stored == default, f"{model_type}: {name}"
            assert {*stored_types.split("|")} <= {*types.split("|")}, f"{model_type}: {name}"


PLAN = """
import json, sys
from pathlib import Path
from compiledllm.config import EngineConfig
from compiledllm.engine_options import ModelConfig
from compiledllm.engine.startup import plan
from tests.support.real_configs import MODELS

folder = Path(sys.argv[1])
for _, config in MODELS.values():
    (folder / "config.json").write_text(json.dumps(config))
    model = ModelConfig(str(folder), load_format="dummy", skip_tokenizer_init=True, device="cpu")
    plan(EngineConfig(model))
print(*sorted({"transformers", "torch._dynamo", "torch._inductor"} & sys.modules.keys()))
"""


def test_plans_of_published_models_import_no_transformers(tmp_path: Path) -> None:
    child = subprocess.run(
        [sys.executable, "-c", PLAN, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stderr
    assert child.stdout.split() == []
