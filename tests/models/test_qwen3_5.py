"""Qwen3.5 checkpoints as they are published: fused experts, further heads, dtypes of the text."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compiledllm.config import ConfigError
from compiledllm.models.registry import load_spec
from tests.models.test_families import load, logits_in_chunks
from tests.support.families import VARIANTS

VARIANT = VARIANTS["qwen3_5_moe", "text of a multimodal model"]
TOKEN_IDS = list(range(3, 43))


@pytest.fixture
def published(tiny_model: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint, and the same one in the form of the published ones."""
    source, copy = tiny_model("qwen3_5_moe", **VARIANT), tmp_path / "published"
    shutil.copytree(source, copy)
    tensors = load_file(source / "model.safetensors")
    for layer in range(3):
        prefix = f"model.language_model.layers.{layer}.mlp.experts"

        def experts(name: str, prefix: str = prefix) -> torch.Tensor:
            return torch.stack([tensors.pop(f"{prefix}.{i}.{name}.weight") for i in range(6)])

        gate, up = experts("gate_proj"), experts("up_proj")
        tensors[f"{prefix}.gate_up_proj"] = torch.cat((gate, up), dim=1)
        tensors[f"{prefix}.down_proj"] = experts("down_proj")
    tensors |= {"mtp.fc.weight": torch.ones(4, 8), "mtp.layers.0.mlp.up_proj.weight": torch.ones(4)}
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return source, copy


def test_fused_experts_and_further_heads_load(published: tuple[Path, Path]) -> None:
    expected, actual = (logits_in_chunks(load(path), TOKEN_IDS, [40]) for path in published)
    torch.testing.assert_close(actual, expected)


def test_dtype_and_ends_may_stand_with_the_text(published: tuple[Path, Path]) -> None:
    path = published[1] / "config.json"
    config = json.loads(path.read_text())
    del config["dtype"]
    config["text_config"] |= {"dtype": "bfloat16", "eos_token_id": [5, 7]}
    path.write_text(json.dumps(config))
    spec = load_spec(published[1])
    assert spec.dtype == "bfloat16" and spec.eos_token_ids == (5, 7)
    assert spec.architecture == "Qwen3_5MoeForConditionalGeneration"


def test_unknown_layers_are_refused_by_name(published: tuple[Path, Path]) -> None:
    path = published[1] / "config.json"
    config = json.loads(path.read_text())
    config["text_config"]["layer_types"][0] = "sliding_attention"
    path.write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="layer_types has 'sliding_attention': not supported"):
        load_spec(published[1])


def test_a_model_without_attention_is_refused(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    from compiledllm.config import EngineConfig
    from compiledllm.engine.startup import plan

    config = json.loads((tiny_model("lfm2") / "config.json").read_text())
    config["layer_types"] = ["conv"] * 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    options = {"load_format": "dummy", "device": "cpu", "skip_tokenizer_init": True}
    with pytest.raises(ConfigError, match="without any attention layer is not supported"):
        plan(EngineConfig.from_options(model=tmp_path, **options))
