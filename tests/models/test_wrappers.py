"""Checkpoints with further parts, in forms that transformers does not write; unknown parts."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compiledllm.config import ConfigError
from tests.models.test_families import load, logits_in_chunks
from tests.support.families import IN_ENGINE, VARIANTS

Tensors = dict[str, torch.Tensor]
TOKEN_IDS = list(range(3, 23))


def renamed(tensors: Tensors, *rules: tuple[str, str]) -> Tensors:
    """Each name changed by the first rule (pattern, replacement) that matches its beginning."""

    def new(name: str) -> str:
        return next((re.sub(old, to, name) for old, to in rules if re.match(old, name)), name)

    return {new(name): tensor for name, tensor in tensors.items()}


def of_llava(tensors: Tensors) -> Tensors:
    return renamed(
        tensors,
        (r"language_model\.lm_head", "lm_head"),
        (r"language_model\.model\.", "model.language_model."),
        (r"(vision_tower|multi_modal_projector)", r"model.\1"),
    )


def of_qwen2_5_vl(tensors: Tensors) -> Tensors:
    return renamed(tensors, (r"model\.", "model.language_model."), (r"visual\.", "model.visual."))


def of_qwen3_vl_moe(tensors: Tensors) -> Tensors:
    def transposed(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.transpose(1, 2).contiguous() if ".experts." in name else tensor

    return {name: transposed(name, tensor) for name, tensor in tensors.items()}


OTHER: dict[str, Callable[[Tensors], Tensors]] = {
    "gemma3": of_llava,
    "mistral3": of_llava,
    "qwen2_5_vl": of_qwen2_5_vl,
    "qwen3_vl_moe": of_qwen3_vl_moe,
}


@pytest.mark.parametrize("family", OTHER)
def test_other_forms_load_and_unknown_tensors_are_refused(
    family: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    source = tiny_model(family, **VARIANTS[family, IN_ENGINE[family]])
    saved = load_file(source / "model.safetensors")
    other = OTHER[family](saved)
    assert any(not torch.equal(other.get(name, torch.ones(0)), t) for name, t in saved.items())
    assert any("vis" in name for name in other), "the towers are in the file"
    shutil.copy(source / "config.json", tmp_path)
    save_file(other, tmp_path / "model.safetensors", metadata={"format": "pt"})
    expected, actual = (
        logits_in_chunks(load(path), TOKEN_IDS, [20]) for path in (source, tmp_path)
    )
    torch.testing.assert_close(actual, expected)
    other["model.audio.weight"] = torch.ones(2)
    save_file(other, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"unexpected tensors: model\.audio\.weight"):
        load(tmp_path)


def test_layers_that_predict_further_tokens_are_left_out(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    source = tiny_model("glm4_moe", **VARIANTS["glm4_moe", "groups"])
    tensors = load_file(source / "model.safetensors")
    tensors |= {f"model.layers.3.{name}": torch.ones(2) for name in ("eh_proj.weight", "enorm.w")}
    shutil.copy(source / "config.json", tmp_path)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    load(tmp_path)
    save_file(tensors | {"model.layers.4.x": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"unexpected tensors: model\.layers\.4\.x"):
        load(tmp_path)


def test_projections_of_kv_that_layers_share_are_left_out(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    source = tiny_model("gemma4_text", **VARIANTS["gemma4_text", "e4b"])
    tensors = load_file(source / "model.safetensors")
    tensors |= {
        f"model.layers.5.self_attn.{name}.weight": torch.ones(2)
        for name in ("k_proj", "v_proj", "k_norm")
    }
    shutil.copy(source / "config.json", tmp_path)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    load(tmp_path)
    more = tensors | {"model.layers.1.self_attn.v_norm.weight": torch.ones(2)}
    save_file(more, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"unexpected tensors: model\.layers\.1\..*v_norm"):
        load(tmp_path)
