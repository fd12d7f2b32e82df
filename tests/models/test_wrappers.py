"""Checkpoints with further parts, in forms that transformers does not write; unknown parts."""

from __future__ import annotations

import json
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
from tests.support.greedy import load_reference

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


def of_gemma4(tensors: Tensors) -> Tensors:
    """The names of files that transformers before version 4.52 would have written."""
    return renamed(tensors, (r"model\.language_model\.", "language_model.model."), (r"model\.", ""))


def of_qwen2_5_vl(tensors: Tensors) -> Tensors:
    return renamed(tensors, (r"model\.", "model.language_model."), (r"visual\.", "model.visual."))


def of_qwen3_vl_moe(tensors: Tensors) -> Tensors:
    def transposed(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.transpose(1, 2).contiguous() if ".experts." in name else tensor

    return {name: transposed(name, tensor) for name, tensor in tensors.items()}


OTHER: dict[str, Callable[[Tensors], Tensors]] = {
    "gemma3": of_llava,
    "gemma4": of_gemma4,
    "gemma4_unified": of_gemma4,
    "mistral3": of_llava,
    "qwen2_5_vl": of_qwen2_5_vl,
    "qwen3_vl_moe": of_qwen3_vl_moe,
}


@pytest.mark.parametrize("family", OTHER)
def test_other_forms_load_and_unknown_tensors_are_refused(
    family: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    variant = next(v for f, v in VARIANTS if f == family)
    source = tiny_model(family, **VARIANTS[family, variant])
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


@pytest.mark.parametrize("is_tied", [True, None])
def test_head_that_only_the_whole_models_config_ties(
    is_tied: bool | None, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """In published Mistral files the head is stored, and the text's config decides."""
    source = tiny_model("mistral3", **VARIANTS["mistral3", "text of a multimodal model"])
    config = json.loads((source / "config.json").read_text())
    config |= {"tie_word_embeddings": is_tied}
    if is_tied is None:
        del config["tie_word_embeddings"]  # True by default
    config["text_config"]["tie_word_embeddings"] = False
    tensors = load_file(source / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert not load(tmp_path).spec.tie_word_embeddings
    del tensors["language_model.lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = load(tmp_path)
    assert model.spec.tie_word_embeddings
    with torch.inference_mode():
        expected = load_reference(tmp_path)(torch.tensor([TOKEN_IDS])).logits[0]
    torch.testing.assert_close(logits_in_chunks(model, TOKEN_IDS, [20]), expected)


def test_wrapper_without_its_head_runs_as_its_text(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    source = tiny_model("gemma3", **VARIANTS["gemma3", IN_ENGINE["gemma3"]])
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["Gemma3Model"]}))
    tensors = load_file(source / "model.safetensors")
    bare = renamed(tensors, (r"language_model\.model\.", "language_model."))
    assert bare.keys() != tensors.keys()
    save_file(bare, tmp_path / "model.safetensors", metadata={"format": "pt"})
    expected, actual = (
        logits_in_chunks(load(path), TOKEN_IDS, [20]) for path in (source, tmp_path)
    )
    torch.testing.assert_close(actual, expected)


STACKED = ["qwen3_moe", "mixtral", "minimax_m2", "glm4_moe", "ernie4_5_moe"]
STACKED += ["qwen3_next", "lfm2_moe", "granitemoehybrid"]


@pytest.mark.parametrize("family", STACKED)
def test_experts_load_under_the_names_that_transformers_has_in_memory(
    family: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    source = tiny_model(family, **VARIANTS[family, IN_ENGINE[family]])
    load_reference(source).save_pretrained(tmp_path, save_original_format=False)
    names, others = (set(load_file(p / "model.safetensors")) for p in (source, tmp_path))
    assert any(name.endswith("experts.gate_up_proj") for name in others - names)
    expected, actual = (
        logits_in_chunks(load(path), TOKEN_IDS, [20]) for path in (source, tmp_path)
    )
    torch.testing.assert_close(actual, expected)


# Wrappers whose towers need packages that are not here: the text's tensors under their names.
TOWERS_OF = {
    "gemma3n_text": ("gemma3n", ("model.vision_tower", "model.audio_tower", "model.embed_audio")),
}


def save_wrapped(source: Path, folder: Path, model_type: str, towers: tuple[str, ...]) -> None:
    """A text checkpoint as the published wrapper has it, with a tensor of each tower."""
    text = json.loads((source / "config.json").read_text())
    architecture = text.pop("architectures")[0].replace("ForCausalLM", "ForConditionalGeneration")
    config = {"architectures": [architecture], "model_type": model_type, "text_config": text}
    ends = {name: text[name] for name in ("tie_word_embeddings", "eos_token_id")}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config | ends))
    tensors = renamed(
        load_file(source / "model.safetensors"), (r"model\.", "model.language_model.")
    )
    tensors |= {f"{tower}.blocks.0.weight": torch.ones(2) for tower in towers}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("family", TOWERS_OF)
def test_published_wrappers_run_as_their_text(
    family: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    source = tiny_model(family, **VARIANTS[family, IN_ENGINE[family]])
    folder = tmp_path / "wrapped"
    save_wrapped(source, folder, *TOWERS_OF[family])
    model = load(folder)
    assert model.spec.architecture.endswith("ForConditionalGeneration")
    expected = logits_in_chunks(load(source), TOKEN_IDS, [20])
    torch.testing.assert_close(logits_in_chunks(model, TOKEN_IDS, [20]), expected)
    save_wrapped(source, tmp_path / "more", TOWERS_OF[family][0], ("model.other_tower",))
    with pytest.raises(ConfigError, match=r"unexpected tensors: model\.other_tower"):
        load(tmp_path / "more")


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
