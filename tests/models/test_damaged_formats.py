"""Quantised files that contradict themselves or their config: one line, naming tensor and field."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from compiledllm import ConfigError
from compiledllm.kernels.attention import make_backend
from compiledllm.models.decoder import Decoder
from compiledllm.models.registry import load_spec
from compiledllm.models.weights import load_weights
from tests.support.quantized import save_quantized

SIZES = {"intermediate_size": 128, "num_hidden_layers": 1}
MATRIX = "model.layers.0.mlp.down_proj"
Change = Callable[[dict[str, Tensor]], object]  # of a matrix's tensors, in place


def refusal(folder: Path) -> str:
    """The error with which a checkpoint is refused."""
    with pytest.raises(ConfigError) as caught:
        load_weights(Decoder(load_spec(folder), make_backend("torch")), folder)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 500
    return text


@pytest.fixture
def checkpoint(tiny_model: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """checkpoint(kind, change, edit): with changed tensors of MATRIX and an edited config."""

    def make(kind: str, change: Change | None = None, edit: Change | None = None) -> Path:
        folder, _ = save_quantized(tiny_model("llama", **SIZES), tmp_path / "made", kind)
        path, config = folder / "model.safetensors", folder / "config.json"
        if change is not None:
            tensors = load_file(path)
            own = {name: t for name, t in tensors.items() if name.startswith(MATRIX)}
            fields = {name.removeprefix(f"{MATRIX}."): t for name, t in own.items()}
            change(fields)
            others = {name: t for name, t in tensors.items() if name not in own}
            changed = {f"{MATRIX}.{name}": t.contiguous() for name, t in fields.items()}
            save_file(others | changed, path, {"format": "pt"})
        if edit is not None:
            content = json.loads(config.read_text())
            edit(content["quantization_config"])
            config.write_text(json.dumps(content))
        return folder

    return make


def put(field: str, value: float, at: int = 0) -> Change:
    """One number of a tensor."""

    def change(tensors: dict[str, Tensor]) -> None:
        wide = tensors[field].flatten().to(torch.float64)
        wide[at] = value
        tensors[field] = wide.to(tensors[field].dtype).view_as(tensors[field])

    return change


def zero(field: str) -> Change:
    return lambda tensors: tensors.update({field: torch.zeros_like(tensors[field])})


def as_scalar(field: str) -> Change:
    return lambda tensors: tensors.update({field: tensors[field].flatten()[0].clone()})


def weights_of(**changes: Any) -> Change:
    """Fields of the only group's weights; None: without the field."""

    def edit(config: dict[str, Any]) -> None:
        weights = config["config_groups"]["group_0"]["weights"]
        for name, value in changes.items():
            weights[name] = value

    return edit


TENSORS: dict[str, tuple[str, Change, str]] = {
    "order is missing": ("gptq permuted", lambda t: t.pop("g_idx"), r"missing tensors: .*\.g_idx"),
    "no such group": ("gptq permuted", put("g_idx", -1), "g_idx does not put 16 inputs into each"),
    "group too large": ("gptq permuted", put("g_idx", 9), "g_idx does not put 16 inputs into each"),
    "NaN in FP8": ("fp8 of channels", put("weight", float("nan")), "weight holds a NaN"),
    "NaN in blocks": ("float blocks", put("weight", float("nan")), "weight holds a NaN"),
    "one scale": ("float of channels", as_scalar("weight_scale"), r"weight_scale has shape \[\]"),
    "one scale, packed": ("packed 8 bits", as_scalar("weight_scale"), r"weight_scale has shape \["),
    "one scale, int8": ("int8", as_scalar("weight_scale"), r"weight_scale has shape \[\]"),
    "no matrix": ("int8", as_scalar("weight"), r"weight has shape \[\], expected a matrix"),
    "negative scale": ("nvfp4", put("weight_scale", -1), "weight_scale holds a negative number"),
    "negative factor": ("nvfp4", put("weight_global_scale", -1), "weight_global_scale is -1, exp"),
    "negative factor 2": ("modelopt nvfp4", put("weight_scale_2", -1), "weight_scale_2 is -1"),
    "negative, FP8": ("fp8 blocks", put("weight_scale_inv", -1), "weight_scale_inv holds a negat"),
    "zeros, FP8": ("fp8 of channels", zero("weight_scale"), "its weight_scale holds only zeros"),
    "zeros, NVFP4": ("nvfp4", zero("weight_scale"), "its weight_scale holds only zeros"),
    "zeros, GPTQ": ("gptq", zero("scales"), "its scales holds only zeros, and its codes do not"),
    "negative shape": ("packed 4 bits", put("weight_shape", -64), r"weight_shape is \[-64, "),
    "huge shape": ("packed 4 bits", put("weight_shape", 2**40, 1), "weight_packed has shape"),
}
CONFIGS: dict[str, tuple[str, Change, str]] = {
    "zeros though symmetric": (
        "packed 4 bits, asymmetric",
        weights_of(symmetric=True),
        "matrix 'model.layers.0.*weight_zero_point is not neutral, the config says 'symm",
    ),
    "zeros though none": (
        "awq",
        lambda config: config.update(zero_point=False),
        "matrix 'model.layers.0.*qzeros are not all 8, the config says 'zero_point' is false",
    ),
    "no group size": (
        "float of channels",
        weights_of(strategy="group"),
        r"group_0.weights: group_size=None is not supported \(strategy 'group' needs it\)",
    ),
    "group does not divide": (
        "packed 4 bits",
        weights_of(group_size=48),
        "matrix 'model.layers.0.*are not whole groups of 48",
    ),
    "one scale, though of channels": (
        "modelopt fp8",
        lambda config: config.update(quant_algo="FP8_PER_CHANNEL_PER_TOKEN"),
        r"matrix 'model.layers.0.*weight_scale has shape \[\], expected \[\d+\] or",
    ),
    "groups of another size": (
        "modelopt nvfp4",
        lambda config: config.update(group_size=32),
        "quantization_config: group_size=32 is not supported",
    ),
    "bad pattern to ignore": (
        "packed 4 bits",
        lambda config: config.update(ignore=["re:("]),
        r"quantization_config: ignore='\(' is not supported \(no regular expression: missing \)",
    ),
    "bad pattern of targets": (
        "packed 4 bits",
        lambda config: config["config_groups"]["group_0"].update(targets=["re:*"]),
        r"group_0: targets='\*' is not supported \(no regular expression: nothing to repeat",
    ),
    "bad pattern of overrides": (
        "gptq",
        lambda config: config.update(dynamic={"+:(": {}}),
        r"dynamic: \+:\(='\(' is not supported \(no regular expression",
    ),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_contradict_the_config_are_named(
    name: str, checkpoint: Callable[..., Path]
) -> None:
    kind, change, match = TENSORS[name]
    text = refusal(checkpoint(kind, change))
    assert MATRIX in text and re.search(match, text), text


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_that_contradict_the_tensors_or_themselves_are_named(
    name: str, checkpoint: Callable[..., Path]
) -> None:
    kind, edit, match = CONFIGS[name]
    text = refusal(checkpoint(kind, edit=edit))
    assert re.search(match, text), text


KINDS_OF_CODE = ("fp8 blocks", "packed 4 bits, asymmetric", "int8", "nvfp4", "gptq permuted", "awq")
DAMAGES: dict[str, Callable[[Tensor], Tensor]] = {
    "truncated": lambda tensor: tensor[:-1] if len(tensor) > 1 else tensor[:0],
    "of another dtype": lambda tensor: tensor.to(torch.int16),
    "of three dimensions": lambda tensor: tensor[None, None],
}


@pytest.mark.parametrize("kind", KINDS_OF_CODE)
def test_every_damaged_tensor_is_named(kind: str, checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint(kind)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    own = [name for name in tensors if name.startswith(MATRIX)]
    assert len(own) >= 2
    for name in own:
        for what, damage in DAMAGES.items():
            save_file(tensors | {name: damage(tensors[name])}, path, {"format": "pt"})
            text = refusal(folder)
            assert MATRIX in text, (name, what)
