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
from compiledllm.models.formats.codes import dequantize
from compiledllm.models.formats.mxfp4 import from_mxfp4_blocks
from compiledllm.models.registry import load_spec
from compiledllm.models.weights import load_weights
from tests.models.test_families import logits_in_chunks

CONFIG = {
    "head_dim": 16,
    "intermediate_size": 96,  # whole blocks of 32
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}


def load(checkpoint: Path) -> Decoder:
    model = Decoder(load_spec(checkpoint), make_backend("torch"))
    load_weights(model, checkpoint)
    return model


def unpacked_by_transformers(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    unpacked: Tensor = convert_moe_packed_tensors(blocks, scales, dtype=dtype)
    return unpacked


def test_every_byte_under_every_scale_has_transformers_bits() -> None:
    scales = torch.arange(256).clamp(max=254).to(torch.uint8).view(2, 8, 16)
    blocks = torch.arange(256, dtype=torch.uint8).view(16, 16).expand(2, 8, 16, 16)
    blocks = torch.stack([blocks.roll(shift, 2) for shift in range(16)])  # each byte, each scale
    ours = torch.stack([dequantize(from_mxfp4_blocks(part, scales)) for part in blocks])
    theirs = torch.stack(
        [unpacked_by_transformers(part, scales, torch.float32) for part in blocks]
    ).transpose(2, 3)
    assert ours.shape == (16, 2, 8, 512)
    assert theirs.isfinite().float().mean() > 0.9
    bits = ours.view(torch.int32), theirs.contiguous().view(torch.int32)
    assert torch.equal(*bits)


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


def test_packed_checkpoint_gives_the_logits_of_the_bfloat16_one(
    checkpoints: tuple[Path, Path],
) -> None:
    packed, dense = map(load, checkpoints)
    token_ids = torch.randint(0, 128, (40,)).tolist()
    expected = logits_in_chunks(dense, token_ids, [40])
    for chunks in ([40], [1] * 40):
        actual = logits_in_chunks(packed, token_ids, chunks)
        torch.testing.assert_close(actual, expected, atol=2e-4, rtol=1e-4)
    experts = packed.layers[0].mlp.gate_up.weight
    assert experts.dtype == torch.int32 and experts.shape == (4, 192, 16)  # inputs padded to 128


def test_blocks_without_scales_are_named(checkpoints: tuple[Path, Path]) -> None:
    packed, _ = checkpoints
    name = "model.layers.1.mlp.experts.down_proj"
    tensors = load_file(packed / "model.safetensors")
    del tensors[f"{name}_scales"]
    save(tensors, packed)
    with pytest.raises(ConfigError, match=f"missing tensors: {name}_scales"):
        load(packed)
