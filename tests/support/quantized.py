"""Writers of quantised checkpoints in the layouts that the formats' public definitions give.

A writer draws random codes and scales for a matrix [N, K]. It returns the tensors of the file and
the float32 matrix that they stand for, computed without the code under test.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Writer = Callable[[int, int], tuple[dict[str, Tensor], Tensor]]
GROUP = 16
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # nibble i of a word holds this column


def words_of(numbers: Tensor, bits: int, order: list[int] | None = None) -> Tensor:
    """[rows, columns] -> int32 [rows, columns * bits / 32], the first number in the lowest bits."""
    per_word = 32 // bits
    numbers = torch.nn.functional.pad(numbers, (0, -numbers.shape[1] % per_word))
    out = torch.zeros(numbers.shape[0], numbers.shape[1] // per_word, dtype=torch.int64)
    for i, column in enumerate(order or range(per_word)):
        out |= numbers[:, column::per_word].long() << (bits * i)
    return torch.where(out >= 2**31, out - 2**32, out).to(torch.int32)


def nibble_bytes(codes: Tensor) -> Tensor:
    return (codes[:, 0::2] | codes[:, 1::2] << 4).to(torch.uint8)


def scales_of(*shape: int, spread: float = 0.03) -> Tensor:
    """Random float32 scales that are exact in 16 bits."""
    return ((torch.rand(shape) + 0.5) * spread).half().bfloat16().float()


def fp8_codes(n: int, k: int) -> Tensor:
    return torch.randn(n, k).clamp(-4, 4).to(torch.float8_e4m3fn)


def fp8(scale_shape: Callable[[int, int], tuple[int, ...]], **more: Tensor) -> Writer:
    """weight and weight_scale, of a tensor ([], [1]) or of channels ([N, 1])."""

    def write(n: int, k: int) -> tuple[dict[str, Tensor], Tensor]:
        codes, scales = fp8_codes(n, k), scales_of(*scale_shape(n, k), spread=0.15)
        copies = {name: tensor.clone() for name, tensor in more.items()}
        return {"weight": codes, "weight_scale": scales} | copies, codes.float() * scales

    return write


def fp8_block(field: str) -> Writer:
    def write(n: int, k: int) -> tuple[dict[str, Tensor], Tensor]:
        codes = fp8_codes(n, k)
        scales = scales_of(-(-n // 128), -(-k // 128), spread=0.15)
        rows, columns = torch.arange(n) // 128, torch.arange(k) // 128
        return {"weight": codes, field: scales}, codes.float() * scales[rows][:, columns]

    return write


def integers(
    n: int, k: int, bits: int, group: int, is_symmetric: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """codes [N, K], zeros and scales [N, G], and the float32 matrix."""
    size = k if group == -1 else group
    codes = torch.randint(0, 2**bits, (n, k))
    zeros = torch.randint(2 ** (bits - 1) - 2, 2 ** (bits - 1) + 3, (n, k // size))
    if is_symmetric:
        zeros = torch.full_like(zeros, 2 ** (bits - 1))
    scales = scales_of(n, k // size, spread=0.5 / 2**bits)
    where = torch.arange(k) // size
    return codes, zeros, scales, (codes - zeros[:, where]) * scales[:, where]


def gptq(bits: int, is_symmetric: bool, version: int, group: int, is_permuted: bool) -> Writer:
    order: dict[int, Tensor] = {}

    def write(n: int, k: int) -> tuple[dict[str, Tensor], Tensor]:
        codes, zeros, scales, matrix = integers(n, k, bits, group, is_symmetric)
        g_idx = torch.arange(k) // (k if group == -1 else group)
        if is_permuted:  # one permutation for each K, as fused matrices must share theirs
            permutation = order.setdefault(k, torch.randperm(k))
            codes, matrix = codes[:, permutation], matrix[:, permutation]
            g_idx = g_idx[permutation]
        qzeros = words_of(zeros.T, bits)
        if version == 1:
            ones = sum(1 << shift for shift in range(0, 32, bits))
            wide = (qzeros.long() - ones) % 2**32
            qzeros = torch.where(wide >= 2**31, wide - 2**32, wide).to(torch.int32)
        tensors = {
            "qweight": words_of(codes, bits).T.contiguous(),
            "qzeros": qzeros,
            "scales": scales.T.contiguous().half(),
            "g_idx": g_idx.int(),
        }
        return tensors, matrix

    return write


def awq(n: int, k: int) -> tuple[dict[str, Tensor], Tensor]:
    codes, zeros, scales, matrix = integers(n, k, 4, GROUP, False)
    tensors = {
        "qweight": words_of(codes.T, 4, AWQ_ORDER),
        "qzeros": words_of(zeros.T, 4, AWQ_ORDER),
        "scales": scales.T.contiguous().half(),
    }
    return tensors, matrix


def packed(bits: int, group: int, is_symmetric: bool) -> Writer:
    """pack-quantized of compressed-tensors."""

    def write(n: int, k: int) -> tuple[dict[str, Tensor], Tensor]:
        codes, zeros, scales, matrix = integers(n, k, bits, group, is_symmetric)
        tensors = {
            "weight_packed": words_of(codes, bits),
            "weight_scale": scales,
            "weight_shape": torch.tensor([n, k]),
        }
        if not is_symmetric:
            tensors["weight_zero_point"] = words_of(zeros.T, bits).T.contiguous()
        return tensors, matrix

    return write


def int8(n: int, k: int) -> tuple[dict[str, Tensor], Tensor]:
    codes, scales = torch.randint(-127, 128, (n, k)), scales_of(n, 1, spread=0.002)
    return {"weight": codes.to(torch.int8), "weight_scale": scales}, codes * scales


def nvfp4(packed_field: str, global_field: str, divides: bool) -> Writer:
    def write(n: int, k: int) -> tuple[dict[str, Tensor], Tensor]:
        codes = torch.randint(0, 16, (n, k))
        scales = (torch.rand(n, k // 16) + 0.5).to(torch.float8_e4m3fn)
        factor = torch.tensor([0.03125])
        tensors = {
            packed_field: nibble_bytes(codes),
            "weight_scale": scales,
            global_field: 1 / factor if divides else factor,
        }
        return tensors, E2M1[codes] * (scales.float() * factor)[:, torch.arange(k) // 16]

    return write


def mxfp4(n: int, k: int) -> tuple[dict[str, Tensor], Tensor]:
    codes, exponents = torch.randint(0, 16, (n, k)), torch.randint(121, 124, (n, k // 32))
    scales = 2.0 ** (exponents - 127)
    tensors = {"weight_packed": nibble_bytes(codes), "weight_scale": exponents.to(torch.uint8)}
    return tensors, E2M1[codes] * scales[:, torch.arange(k) // 32]


def compressed(format: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*mlp.gate$"],
        "quantization_status": "compressed",
    }


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
STATIC = FP8 | {"activation_scheme": "static", "ignored_layers": ["lm_head"]}
BLOCKS = FP8 | {"weight_block_size": [128, 128], "modules_to_not_convert": ["mlp.gate", "lm_head"]}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
NVFP4 = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head", "*.mlp.gate"]}
INT = {"type": "int", "symmetric": True}
FLOAT = {"type": "float", "num_bits": 8, "symmetric": True}
FP4 = {"type": "float", "num_bits": 4, "symmetric": True, "strategy": "tensor_group"}

# Name -> (quantization_config, writer).
KINDS: dict[str, tuple[dict[str, Any], Writer]] = {
    "fp8 of tensors": (STATIC, fp8(lambda n, k: (), input_scale=torch.ones(()))),
    "fp8 of channels": (FP8, fp8(lambda n, k: (n, 1))),
    "fp8 blocks": (BLOCKS, fp8_block("weight_scale_inv")),
    "float of tensors": (
        compressed("float-quantized", **FLOAT, strategy="tensor"),
        fp8(lambda n, k: (1,), input_scale=torch.ones(1)),
    ),
    "float of channels": (
        compressed("float-quantized", **FLOAT, strategy="channel"),
        fp8(lambda n, k: (n, 1)),
    ),
    "float blocks": (
        compressed("float-quantized", **FLOAT, strategy="block", block_structure=[128, 128]),
        fp8_block("weight_scale"),
    ),
    "packed 4 bits": (
        compressed("pack-quantized", **INT, num_bits=4, strategy="group", group_size=GROUP),
        packed(4, GROUP, True),
    ),
    "packed 4 bits, asymmetric": (
        compressed(
            "pack-quantized",
            **(INT | {"symmetric": False}),
            num_bits=4,
            strategy="group",
            group_size=GROUP,
        ),
        packed(4, GROUP, False),
    ),
    "packed 4 bits of channels": (
        compressed("pack-quantized", **INT, num_bits=4, strategy="channel"),
        packed(4, -1, True),
    ),
    "packed 8 bits": (
        compressed("pack-quantized", **INT, num_bits=8, strategy="channel"),
        packed(8, -1, True),
    ),
    "int8": (compressed("int-quantized", **INT, num_bits=8, strategy="channel"), int8),
    "nvfp4": (
        compressed("nvfp4-pack-quantized", **FP4, group_size=16),
        nvfp4("weight_packed", "weight_global_scale", True),
    ),
    "mxfp4": (
        compressed("mxfp4-pack-quantized", **FP4 | {"strategy": "group"}, group_size=32),
        mxfp4,
    ),
    "gptq": (GPTQ, gptq(4, True, 1, GROUP, False)),
    "gptq v2, asymmetric": (
        GPTQ | {"sym": False, "checkpoint_format": "gptq_v2"},
        gptq(4, False, 2, GROUP, False),
    ),
    "gptq permuted": (GPTQ | {"desc_act": True}, gptq(4, True, 1, GROUP, True)),
    "gptq 8 bits of channels": (
        GPTQ | {"bits": 8, "group_size": -1},
        gptq(8, True, 1, -1, False),
    ),
    "awq": (AWQ, awq),
    "modelopt fp8": (
        {"quant_method": "modelopt", "quant_algo": "FP8", "exclude_modules": ["lm_head"]},
        fp8(lambda n, k: (), input_scale=torch.ones(()), k_scale=torch.ones(())),
    ),
    "modelopt nvfp4": (NVFP4, nvfp4("weight", "weight_scale_2", False)),
}


def is_quantized(name: str, tensor: Tensor) -> bool:
    """Whether a tensor is a block's matrix (but no router) or projects per-layer token inputs."""
    is_router = name.endswith((".gate.weight", ".shared_expert_gate.weight", ".router.proj.weight"))
    is_of_block = ".layers." in name or "per_layer_model_projection" in name
    is_plain = is_router or ".altup." in name
    return tensor.dim() == 2 and is_of_block and name.endswith(".weight") and not is_plain


def save_quantized(
    source: Path,
    folder: Path,
    kind: str,
    choose: Callable[[str, Tensor], bool] = is_quantized,
    **config: Any,
) -> tuple[Path, Path]:
    """Two copies of a checkpoint with new random weights: quantised, and the same in float32."""
    packed_folder, dense_folder = folder / "packed", folder / "dense"
    quantization, write = KINDS[kind]
    tensors = load_file(source / "model.safetensors")
    packed_tensors, dense_tensors = dict(tensors), dict(tensors)
    torch.manual_seed(0)
    for name, tensor in sorted(tensors.items()):
        if choose(name, tensor):
            stored, dense_tensors[name] = write(*tensor.shape)
            del packed_tensors[name]
            matrix = name.removesuffix("weight")
            packed_tensors |= {matrix + field: part for field, part in stored.items()}
    for copy, content in ((packed_folder, packed_tensors), (dense_folder, dense_tensors)):
        shutil.copytree(source, copy)
        contiguous = {name: tensor.contiguous() for name, tensor in content.items()}
        save_file(contiguous, copy / "model.safetensors", metadata={"format": "pt"})
    edit_config(packed_folder, quantization_config=quantization | config)
    return packed_folder, dense_folder


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
