"""Experts in one quantised tensor: the names and orders in which tools publish them."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from compiledllm.config import ConfigError
from compiledllm.models.registry import load_spec
from tests.models.test_families import load, logits_in_chunks
from tests.support.families import (
    DELTA_NET,
    EXPERTS_OF_GRANITE,
    GEMMA4,
    GEMMA4_DENSE,
    GPT_OSS,
    LFM2,
    LLAMA4,
    MAMBA2,
    MROPE,
)
from tests.support.greedy import load_reference
from tests.support.quantized import KINDS, Writer, edit_config

FILE = "model.safetensors"
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
SHARED = {"shared_expert_intermediate_size": 96}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3.5": ("qwen3_5_moe", DELTA_NET | EXPERTS | SHARED),
    "qwen3-vl": ("qwen3_vl_moe", EXPERTS | {"head_dim": 16, "rope_parameters": MROPE}),
    "llama 4": ("llama4_text", LLAMA4 | {"num_local_experts": 4, "intermediate_size": 96}),
    "gemma 4": (
        "gemma4",
        GEMMA4
        | GEMMA4_DENSE
        | {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2}
        | {"moe_intermediate_size": 96},
    ),
}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
ERNIE = {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 96}
FP8 = {"quant_method": "fp8", "activation_scheme": "static"}
BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128]}
MODELOPT = {"quant_method": "modelopt"}
# Name -> config, kind of matrix, what follows a stack's name, inputs first, one scale for all.
LAYOUTS: dict[str, tuple[dict[str, Any], str, dict[str, str], bool, bool]] = {
    "transformers, blocks": (
        BLOCKS,
        "fp8 blocks",
        {"weight": "", "weight_scale_inv": "_scale_inv"},
        False,
        False,
    ),
    "transformers, tensors": (
        FP8,
        "fp8 of halves",
        {"weight": "", "weight_scale": "_scale_inv", "input_scale": "_activation_scale"},
        False,
        False,
    ),
    "fbgemm": (
        {"quant_method": "fbgemm_fp8"},
        "fp8 of channels",
        {"weight": "", "weight_scale": "_scale"},
        True,
        False,
    ),
    "with dots": (
        FP8,
        "fp8 of channels",
        {"weight": ".weight", "weight_scale": ".weight_scale"},
        False,
        False,
    ),
    "modelopt fp8": (
        MODELOPT | {"quant_algo": "FP8"},
        "modelopt fp8",
        {"weight": "", "weight_scale": "_weight_scale", "input_scale": "_input_scale"},
        True,
        True,
    ),
    "modelopt nvfp4": (
        MODELOPT | {"quant_algo": "NVFP4"},
        "modelopt nvfp4",
        {"weight": "", "weight_scale": "_weight_scale", "weight_scale_2": "_weight_scale_2"},
        True,
        True,
    ),
    "modelopt nvfp4, outputs first": (
        MODELOPT | {"quant_algo": "NVFP4"},
        "modelopt nvfp4",
        {"weight": "", "weight_scale": "_weight_scale", "weight_scale_2": "_weight_scale_2"},
        False,
        True,
    ),
}


def of_halves(n: int, k: int) -> tuple[dict[str, Tensor], Tensor]:
    """FP8 with a scale for the gate and one for up, or a scale for down."""
    codes = torch.randn(n, k).clamp(-4, 4).to(torch.float8_e4m3fn)
    scales = torch.rand(2 if n == 192 else 1, 1) * 0.1 + 0.1
    matrix = codes.float() * scales.repeat_interleave(n // len(scales), 0)
    return {"weight": codes, "weight_scale": scales, "input_scale": torch.ones(())}, matrix


def stack_of(
    write: Writer, shape: tuple[int, int, int], has_one_scale: bool
) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of [experts, outputs, inputs], and the matrices that they stand for."""
    count, n, k = shape
    if has_one_scale:
        tensors, matrix = write(count * n, k)
        parts = {f: t.view(count, n, -1) if t.numel() > 1 else t for f, t in tensors.items()}
        return parts, matrix.view(shape)
    experts = [write(n, k) for _ in range(count)]
    fields = experts[0][0]
    stacked = {field: torch.stack([tensors[field] for tensors, _ in experts]) for field in fields}
    return stacked, torch.stack([matrix for _, matrix in experts])


def dense_of(dense: dict[str, Tensor], name: str, matrices: Tensor) -> dict[str, Tensor]:
    """The matrices of all experts under the names, and in the order, in which `dense` has them."""
    if name in dense:
        is_turned = dense[name].shape[1] != matrices.shape[1]
        return {name: matrices.transpose(1, 2).contiguous() if is_turned else matrices}
    prefix, _, matrix = name.rpartition(".")
    parts = {"gate_up_proj": ("gate_proj", "up_proj")}.get(matrix, (matrix,))
    return {
        f"{prefix}.{index}.{part}.weight": rows.contiguous()
        for index, expert in enumerate(matrices)
        for part, rows in zip(parts, expert.chunk(len(parts)), strict=True)
    }


def save_stacked(source: Path, folder: Path, layout: str, size: int = 96) -> tuple[Path, Path]:
    """Two copies of a checkpoint with other experts: quantised, and the same in float32.

    size: the experts' intermediate size.
    """
    config, kind, leaves, are_inputs_first, has_one_scale = LAYOUTS[layout]
    write = of_halves if kind == "fp8 of halves" else KINDS[kind][1]
    torch.manual_seed(0)
    dense = load_file(source / FILE)
    packed = {name: tensor for name, tensor in dense.items() if ".experts." not in name}
    prefixes = {m[0] for name in dense if (m := re.match(r".*\.experts(?=\.)", name))}
    for prefix in sorted(prefixes):
        for matrix, shape in (("gate_up_proj", (4, 2 * size, 64)), ("down_proj", (4, 64, size))):
            name = f"{prefix}.{matrix}"
            stacks, matrices = stack_of(write, shape, has_one_scale)
            dense |= dense_of(dense, name, matrices)
            for field, leaf in leaves.items():
                stack = stacks[field]
                is_turned = are_inputs_first and stack.dim() == 3
                if layout == "fbgemm" and matrix == "down_proj" and field != "weight":
                    is_turned = False  # as FBGEMM's files have it
                packed[name + leaf] = (stack.transpose(1, 2) if is_turned else stack).contiguous()
    for path, tensors in ((folder / "packed", packed), (folder / "dense", dense)):
        shutil.copytree(source, path)
        save_file(tensors, path / FILE, metadata={"format": "pt"})
    plain = sorted(n.removesuffix(".weight") for n in packed if ".experts." not in n)
    lists = {"modules_to_not_convert": plain, "exclude_modules": plain}
    edit_config(folder / "packed", quantization_config=config | lists)
    return folder / "packed", folder / "dense"


CASES = [
    *(("qwen3.5", layout) for layout in LAYOUTS),
    ("gemma 4", "transformers, blocks"),
    ("gemma 4", "modelopt nvfp4"),
    ("llama 4", "fbgemm"),
    ("llama 4", "modelopt nvfp4"),
    ("qwen3-vl", "fbgemm"),
    ("qwen3-vl", "modelopt fp8"),
]


@pytest.mark.parametrize(("model", "layout"), CASES)
def test_logits_equal_transformers_on_the_dequantised_weights(
    model: str, layout: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    family, changes = MODELS[model]
    packed, dense = save_stacked(tiny_model(family, **changes), tmp_path, layout)
    token_ids = torch.randint(0, 128, (24,)).tolist()
    with torch.inference_mode():
        expected = load_reference(dense)(torch.tensor([token_ids])).logits[0]
    spec = load_spec(packed)
    assert spec.quantization and any(layer.formats for layer in spec.layers)
    actual = logits_in_chunks(load(packed), token_ids, [24])
    torch.testing.assert_close(actual, expected, atol=3e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("layout", ["fbgemm", "modelopt fp8", "with dots"])
def test_the_order_of_a_square_stack_is_that_of_the_layer_s_other_stack(
    layout: str, size: int, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Gate and up of 32 together, or down of 64, are as large as the inputs."""
    family, changes = MODELS["qwen3.5"]
    source = tiny_model(family, **changes | {"moe_intermediate_size": size})
    packed, dense = save_stacked(source, tmp_path, layout, size)
    token_ids = torch.randint(0, 128, (24,)).tolist()
    expected = logits_in_chunks(load(dense), token_ids, [24])
    actual = logits_in_chunks(load(packed), token_ids, [24])
    torch.testing.assert_close(actual, expected, atol=3e-4, rtol=1e-4)


def test_experts_of_gpt_oss_that_a_tool_has_quantised_one_by_one(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Gate and up are apart there, where the stacks of published files have alternating rows."""
    source = tiny_model("gpt_oss", **GPT_OSS | {"num_local_experts": 4})
    config, write = KINDS["float of channels"]
    dense = load_file(source / FILE)
    packed = {name: tensor for name, tensor in dense.items() if ".experts." not in name}
    for name in [n for n in dense if n.endswith("down_proj")]:
        stack, prefix = dense[name], name.removesuffix("down_proj")
        gate_up, bias = dense[f"{prefix}gate_up_proj"], dense[f"{prefix}gate_up_proj_bias"]
        for expert in range(4):
            parts = {
                "gate_proj": (gate_up[expert][:, 0::2], bias[expert][0::2]),
                "up_proj": (gate_up[expert][:, 1::2], bias[expert][1::2]),
                "down_proj": (stack[expert], dense[f"{name}_bias"][expert]),
            }
            for part, (matrix, part_bias) in parts.items():
                tensors, values = write(matrix.shape[1], matrix.shape[0])
                matrix.copy_(values.T)
                tensors |= {"bias": part_bias.contiguous()}
                packed |= {f"{prefix}{expert}.{part}.{f}": t for f, t in tensors.items()}
    for path, tensors in ((tmp_path / "packed", packed), (tmp_path / "dense", dense)):
        shutil.copytree(source, path)
        save_file(tensors, path / FILE, metadata={"format": "pt"})
    skipped = ["lm_head", "re:.*self_attn", "re:.*router"]
    edit_config(tmp_path / "packed", quantization_config=config | {"ignore": skipped})
    token_ids = torch.randint(0, 128, (24,)).tolist()
    with torch.inference_mode():
        expected = load_reference(tmp_path / "dense")(torch.tensor([token_ids])).logits[0]
    model = load(tmp_path / "packed")
    assert dict(model.spec.layers[0].formats).keys() == {"mlp.gate_up", "mlp.down"}
    torch.testing.assert_close(
        logits_in_chunks(model, token_ids, [24]), expected, atol=3e-4, rtol=1e-4
    )


def linear_layers(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """The linear layers that tools make of a family's own experts, as views of the tensor."""
    if match := re.fullmatch(r"(.*\.experts\.\d+)\.(w[123])\.weight", name):
        part = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}[match[2]]
        return {f"{match[1]}.{part}": tensor}
    if re.fullmatch(r".*\.experts\.\d+\.(gate|up|down)_proj\.weight", name):
        return {name.removesuffix(".weight"): tensor}
    if match := re.fullmatch(r"(.*\.block_sparse_moe)\.(in|out)put_linear\.weight", name):
        names = ("gate_proj", "up_proj") if match[2] == "in" else ("down_proj",)
        parts = [expert.chunk(len(names)) for expert in tensor]
        experts = (f"{match[1]}.experts.{index}" for index in range(len(tensor)))
        return {
            f"{expert}.{part}": rows
            for expert, of_expert in zip(experts, parts, strict=True)
            for part, rows in zip(names, of_expert, strict=True)
        }
    return {name.removesuffix(".weight"): tensor} if ".shared_mlp." in name else {}


@pytest.mark.parametrize(
    ("family", "changes", "name", "theirs"),
    [
        ("mixtral", LOCAL, "", ""),
        ("mixtral", LOCAL, ".block_sparse_moe.", ".mlp."),
        ("minimax_m2", LOCAL, ".block_sparse_moe.", ".mlp."),
        ("ernie4_5_moe", ERNIE, ".moe_statics.", ".gate.moe_statics."),
        ("lfm2_moe", LFM2 | EXPERTS | {"num_dense_layers": 1}, "", ""),
        ("granitemoehybrid", MAMBA2 | EXPERTS_OF_GRANITE, "", ""),
    ],
)
def test_experts_that_a_tool_has_made_linear_layers(
    family: str,
    changes: dict[str, Any],
    name: str,
    theirs: str,
    tiny_model: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """Tools name gate, up and down alike in all families. Granite's shared MLP is quantised, too.

    theirs: what stands instead of `name` in files with the names of transformers' modules.
    """
    source = tiny_model(family, **changes)
    config, write = KINDS["float of channels"]
    dense, packed, skipped = load_file(source / FILE), {}, ["lm_head"]
    for own, tensor in dense.items():
        layers = linear_layers(own, tensor)
        for layer, rows in layers.items():
            tensors, values = write(*rows.shape)
            rows.copy_(values)
            packed |= {f"{layer}.{field}": part for field, part in tensors.items()}
        if not layers:
            packed[own] = tensor
            skipped.append(own.removesuffix(".weight"))
    packed = {own.replace(name, theirs): tensor for own, tensor in packed.items()}
    assert any(".experts.3.up_proj.weight_scale" in own for own in packed)
    for path, tensors in ((tmp_path / "packed", packed), (tmp_path / "dense", dense)):
        shutil.copytree(source, path)
        save_file(tensors, path / FILE, metadata={"format": "pt"})
    edit_config(tmp_path / "packed", quantization_config=config | {"ignore": skipped})
    token_ids = torch.randint(0, 128, (24,)).tolist()
    with torch.inference_mode():
        expected = load_reference(tmp_path / "dense")(torch.tensor([token_ids])).logits[0]
    actual = logits_in_chunks(load(tmp_path / "packed"), token_ids, [24])
    torch.testing.assert_close(actual, expected, atol=3e-4, rtol=1e-4)


def test_stacked_fp8_experts_of_gpt_oss(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """In transformers' order, in which rows of gate and up alternate; down is square."""
    changes = GPT_OSS | {"num_local_experts": 4, "intermediate_size": 64}
    source = tiny_model("gpt_oss", **changes)
    dense = load_file(source / FILE)
    packed = dict(dense)
    for name in [n for n in dense if n.endswith(("gate_up_proj", "down_proj"))]:
        codes = torch.randn(dense[name].shape).to(torch.float8_e4m3fn)
        scales = torch.rand(4, 1, codes.shape[2]) * 0.1 + 0.1
        packed |= {name: codes, f"{name}_scale": scales}
        dense[name] = codes.float() * scales
    for path, tensors in ((tmp_path / "packed", packed), (tmp_path / "dense", dense)):
        shutil.copytree(source, path)
        save_file(tensors, path / FILE, metadata={"format": "pt"})
    skipped = {"modules_to_not_convert": ["self_attn", "router"]}
    edit_config(tmp_path / "packed", quantization_config={"quant_method": "fbgemm_fp8"} | skipped)
    token_ids = torch.randint(0, 128, (24,)).tolist()
    expected = logits_in_chunks(load(tmp_path / "dense"), token_ids, [24])
    actual = logits_in_chunks(load(tmp_path / "packed"), token_ids, [24])
    torch.testing.assert_close(actual, expected, atol=3e-4, rtol=1e-4)


def test_a_stack_without_scales_or_with_unknown_tensors_is_refused_by_name(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    family, changes = MODELS["qwen3.5"]
    source = tiny_model(family, **changes)
    packed, _ = save_stacked(source, tmp_path, "modelopt nvfp4")
    tensors = load_file(packed / "model.safetensors")
    name = "model.language_model.layers.1.mlp.experts.down_proj"
    save_file({n: t for n, t in tensors.items() if n != f"{name}_weight_scale_2"}, packed / FILE)
    with pytest.raises(ConfigError, match=r"missing tensors: .*experts\.0\.down_proj\.weight_sc"):
        load(packed)
    save_file(tensors | {f"{name}_qzeros": torch.ones(2)}, packed / FILE)
    with pytest.raises(ConfigError, match=r"unexpected tensors: .*experts\.down_proj_qzeros"):
        load(packed)
    tensors[name] = tensors[name][:3]
    save_file(tensors, packed / FILE)
    with pytest.raises(ConfigError, match=r"experts\.0\.down_proj'.*weight has shape"):
        load(packed)
