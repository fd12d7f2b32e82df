"""MXFP4 of gpt-oss against transformers: the numbers bit for bit, and a packed checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from compiledllm.config import ConfigError
from compiledllm.kernels.attention import make_backend
from compiledllm.models.decoder import Decoder
from compiledllm.models.mxfp4 import dequantize_mxfp4
from compiledllm.models.registry import load_spec
from compiledllm.models.weights import load_weights

CONFIG = {
    "head_dim": 16,
    "intermediate_size": 96,  # whole blocks of 32
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def load(checkpoint: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    torch.set_default_dtype(dtype)
    try:
        model = Decoder(load_spec(checkpoint), make_backend("torch"))
    finally:
        torch.set_default_dtype(torch.float32)
    load_weights(model, checkpoint)
    return model


def unpacked_by_transformers(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    unpacked: Tensor = convert_moe_packed_tensors(blocks, scales, dtype=dtype)
    return unpacked


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_byte_under_every_scale_has_transformers_bits(dtype: torch.dtype) -> None:
    scales = torch.arange(256, dtype=torch.uint8).view(2, 8, 16)
    blocks = torch.arange(256, dtype=torch.uint8).view(16, 16).expand(2, 8, 16, 16)
    blocks = torch.stack([blocks.roll(shift, 2) for shift in range(16)])  # each byte, each scale
    scales = scales.expand(16, 2, 8, 16)
    ours = dequantize_mxfp4(blocks, scales, dtype)
    theirs = torch.stack(
        [unpacked_by_transformers(*pair, dtype) for pair in zip(blocks, scales, strict=True)]
    ).transpose(2, 3)
    assert ours.shape == (16, 2, 8, 512) and ours.dtype == dtype
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    finite = theirs.isfinite()
    assert finite.float().mean() > 0.1
    assert torch.equal(ours.view(bits)[finite], theirs.contiguous().view(bits)[finite])
    assert torch.equal(ours.nan_to_num(7.0), theirs.nan_to_num(7.0))  # infinities and NaN


@pytest.fixture
def checkpoints(tiny_model: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path]:
    """The same model, packed and as bfloat16."""
    dense = Path(shutil.copytree(tiny_model("gpt_oss", **CONFIG), tmp_path / "dense"))
    packed = Path(shutil.copytree(dense, tmp_path / "packed"))
    tensors = load_file(dense / "model.safetensors")
    packed_tensors = dict(tensors)
    for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
        num_experts, inputs, outputs = tensors[name].shape
        shape = num_experts, outputs, inputs // 32
        blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8)
        scales = torch.randint(120, 126, shape, dtype=torch.uint8)
        del packed_tensors[name]
        packed_tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        tensors[name] = unpacked_by_transformers(blocks, scales, torch.bfloat16)
    save(tensors, dense)
    save(packed_tensors, packed, quantization_config={"quant_method": "mxfp4"})
    return packed, dense


def save(tensors: dict[str, Tensor], checkpoint: Path, **config: object) -> None:
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_checkpoint_is_the_bfloat16_one(
    checkpoints: tuple[Path, Path], dtype: torch.dtype
) -> None:
    packed, dense = (load(checkpoint, dtype).state_dict() for checkpoint in checkpoints)
    assert packed.keys() == dense.keys()
    for name, tensor in packed.items():
        assert tensor.dtype == dtype and torch.equal(tensor, dense[name]), name


def test_blocks_without_scales_are_named(checkpoints: tuple[Path, Path]) -> None:
    packed, _ = checkpoints
    name = "model.layers.1.mlp.experts.down_proj"
    tensors = load_file(packed / "model.safetensors")
    del tensors[f"{name}_scales"]
    save(tensors, packed)
    with pytest.raises(ConfigError, match=f"unexpected tensors: {name}_blocks"):
        load(packed)


def test_other_families_and_methods_refuse(
    checkpoints: tuple[Path, Path], tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    llama = Path(shutil.copytree(tiny_llama(), tmp_path / "llama"))
    for checkpoint, method in ((llama, "mxfp4"), (checkpoints[0], "gptq")):
        path = checkpoint / "config.json"
        config = json.loads(path.read_text()) | {"quantization_config": {"quant_method": method}}
        path.write_text(json.dumps(config))
        with pytest.raises(ConfigError, match=rf"quantised checkpoints \({method}\)"):
            load_spec(checkpoint)
