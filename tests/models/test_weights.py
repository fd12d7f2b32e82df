"""Loading: every tensor accounted for, every failure named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compiledllm.config import ConfigError
from compiledllm.kernels.attention import make_backend
from compiledllm.models.decoder import Decoder
from compiledllm.models.registry import load_spec
from compiledllm.models.weights import fill_with_random_weights, load_weights
from tests.support.families import GPT_OSS

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def checkpoint(tiny_llama: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny_llama(), tmp_path / "checkpoint"))


def load(checkpoint: Path) -> Decoder:
    model = Decoder(load_spec(checkpoint), make_backend("torch"))
    load_weights(model, checkpoint)
    return model


def edit_weights(checkpoint: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    edit(tensors)
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})


def edit_config(checkpoint: Path, **changes: object) -> None:
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_missing_tensor_is_named_as_in_the_checkpoint(checkpoint: Path) -> None:
    edit_weights(checkpoint, lambda tensors: tensors.pop(Q_PROJ))
    with pytest.raises(ConfigError, match=f"missing tensors: {Q_PROJ}"):
        load(checkpoint)


def test_unexpected_tensor_is_named(checkpoint: Path) -> None:
    edit_weights(checkpoint, lambda t: t.update({"model.layers.7.mlp.x": torch.zeros(1)}))
    with pytest.raises(ConfigError, match="unexpected tensors: model.layers.7.mlp.x"):
        load(checkpoint)


def test_our_own_parameter_names_are_not_checkpoint_names(checkpoint: Path) -> None:
    edit_weights(checkpoint, lambda t: t.update({"embedding": t["model.embed_tokens.weight"] + 0}))
    with pytest.raises(ConfigError, match="unexpected tensors: embedding"):
        load(checkpoint)


def test_wrong_shape_is_named_with_both_shapes(checkpoint: Path) -> None:
    edit_weights(checkpoint, lambda tensors: tensors.update({Q_PROJ: torch.zeros(64, 32)}))
    with pytest.raises(ConfigError, match=r"q_proj.weight' has shape \[64, 32\].*\[64, 64\]"):
        load(checkpoint)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.bool, torch.complex64])
def test_a_tensor_that_is_not_floating_point_is_named(checkpoint: Path, dtype: torch.dtype) -> None:
    edit_weights(checkpoint, lambda tensors: tensors.update({Q_PROJ: tensors[Q_PROJ].to(dtype)}))
    with pytest.raises(ConfigError, match=rf"q_proj.weight' has dtype {str(dtype)[6:]}, expected"):
        load(checkpoint)


@pytest.mark.parametrize("damage", [torch.flatten, lambda tensor: tensor[0, 0]])
def test_a_stack_that_cannot_be_taken_apart_is_named(
    damage: Callable[[torch.Tensor], torch.Tensor], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    name = "model.layers.1.mlp.experts.gate_up_proj_bias"
    checkpoint = Path(shutil.copytree(tiny_model("gpt_oss", **GPT_OSS), tmp_path / "damaged"))
    edit_weights(checkpoint, lambda tensors: tensors.update({name: damage(tensors[name]).clone()}))
    with pytest.raises(ConfigError, match=f"tensor '{name}' cannot be taken apart") as error:
        load(checkpoint)
    assert "\n" not in str(error.value)


def test_derived_and_doubly_stored_tensors_are_let_pass(
    tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = Path(shutil.copytree(tiny_llama(tie_word_embeddings=True), tmp_path / "tied"))

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    edit_weights(checkpoint, add)
    load(checkpoint)


def test_tensor_stored_in_two_shards_is_refused(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "model-00001-of-00002.safetensors")
    save_file({Q_PROJ: torch.zeros(64, 64)}, checkpoint / "model-00002-of-00002.safetensors")
    with pytest.raises(ConfigError, match="stored twice, in model-00001.* and model-00002"):
        load(checkpoint)


def test_missing_shard_is_named(checkpoint: Path) -> None:
    index = {"weight_map": {Q_PROJ: "model-00002-of-00002.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r"missing: model-00002-of-00002.safetensors"):
        load(checkpoint)


@pytest.mark.parametrize("keep", [0, 7, 1000, -100])
def test_corrupt_safetensors_is_named(checkpoint: Path, keep: int) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ConfigError, match="model.safetensors is not a readable safetensors file"):
        load(checkpoint)


def test_no_weights_at_all_says_what_is_loaded(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="no .safetensors files"):
        load(checkpoint)


def test_unknown_architecture_lists_the_supported_ones(checkpoint: Path) -> None:
    edit_config(checkpoint, architectures=["RwkvForCausalLM"])
    with pytest.raises(ConfigError, match="'RwkvForCausalLM' is not supported; .*LlamaForCausalLM"):
        load_spec(checkpoint)


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_broken_config_is_named(checkpoint: Path, text: str) -> None:
    (checkpoint / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json"):
        load_spec(checkpoint)


def test_dummy_weights_depend_on_the_seed_alone(checkpoint: Path) -> None:
    def fill(seed: int) -> list[torch.Tensor]:
        model = Decoder(load_spec(checkpoint), make_backend("torch"))
        fill_with_random_weights(model, seed)
        return list(model.parameters())

    first, again, other = fill(3), fill(3), fill(4)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
