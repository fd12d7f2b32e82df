"""Fields of published models' config.json, and the models' billions of parameters.

Fields that no family reads and fields of towers are left out. `MODELS`, read from
real_configs.json, has one or two models of each row of the table in models/README.md that says
"runs". `QUANTIZED` has the quantization_configs of published quantised files of these models.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Config = dict[str, Any]
MODELS: dict[str, tuple[float, Config]] = {
    name: (billions, config)
    for name, (billions, config) in json.loads(
        Path(__file__).with_suffix(".json").read_text()
    ).items()
}

_CT_FP8 = {"num_bits": 8, "type": "float", "symmetric": True, "observer": "minmax"}
_CT_INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
_NVFP4 = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}


def _compressed(format: str, ignore: list[str], inputs: Config | None, **weights: Any) -> Config:
    group = {"input_activations": inputs, "output_activations": None, "targets": ["Linear"]}
    return {
        "config_groups": {"group_0": group | {"weights": weights}},
        "format": format,
        "global_compression_ratio": None,
        "ignore": ignore,
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


# Name -> the model, its quantization_config, and its name in reports.
QUANTIZED: dict[str, tuple[str, Config, str]] = {
    "Qwen3-30B-A3B-FP8": (
        "Qwen3-30B-A3B",
        {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8"}
        | {"weight_block_size": [128, 128]}
        | {
            "modules_to_not_convert": [
                "lm_head",
                *(f"model.layers.{i}.mlp.gate" for i in range(48)),
                *(f"model.layers.{i}.input_layernorm" for i in range(48)),
            ]
        },
        "fp8 in blocks of 128x128",
    ),
    "Qwen3.6-35B-A3B-FP8": (
        "Qwen3.6-35B-A3B",
        {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8"}
        | {"weight_block_size": [128, 128]}
        | {
            "modules_to_not_convert": [
                "lm_head",
                "model.language_model.embed_tokens",
                *(
                    f"model.language_model.layers.{i}.{name}"
                    for i in range(40)
                    for name in (
                        *("linear_attn.conv1d", "linear_attn.in_proj_a", "linear_attn.in_proj_b"),
                        *("mlp.gate", "mlp.shared_expert_gate", "input_layernorm"),
                    )
                ),
                "model.visual.blocks.0.attn.qkv",
            ]
        },
        "fp8 in blocks of 128x128",
    ),
    "Qwen3-4B-AWQ": (
        "Qwen3-4B-Instruct-2507",
        {"backend": "autoawq", "bits": 4, "do_fuse": False, "exllama_config": None}
        | {"fuse_max_seq_len": None, "group_size": 128, "modules_to_fuse": None}
        | {"modules_to_not_convert": None, "quant_method": "awq", "version": "gemm"}
        | {"zero_point": True},
        "awq int4",
    ),
    "Qwen3-30B-A3B-GPTQ-Int4": (
        "Qwen3-30B-A3B",
        {"bits": 4, "checkpoint_format": "gptq", "desc_act": False, "group_size": 128}
        | {"lm_head": False, "meta": {"quantizer": ["gptqmodel:2.2.0"]}, "pack_dtype": "int32"}
        | {"quant_method": "gptq", "sym": True, "true_sequential": True, "static_groups": False},
        "gptq int4",
    ),
    "Qwen3-30B-A3B-NVFP4": (
        "Qwen3-30B-A3B",
        {
            "config_groups": {
                "group_0": {"input_activations": _NVFP4, "weights": _NVFP4, "targets": ["Linear"]}
            },
            "ignore": ["lm_head", *(f"model.layers.{i}.mlp.gate" for i in range(48))],
            "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
            "producer": {"name": "modelopt", "version": "0.33.0"},
            "quant_algo": "NVFP4",
            "quant_method": "modelopt",
        },
        "modelopt NVFP4",
    ),
    "Qwen3.5-9B-W4A16": (
        "Qwen3.5-9B",
        _compressed(
            "pack-quantized",
            ["lm_head", "re:.*visual.*", "re:.*linear_attn.in_proj_[ab]$"],
            None,
            **_CT_INT4,
            group_size=128,
            actorder=None,
            dynamic=False,
            block_structure=None,
            observer="mse",
            observer_kwargs={},
        ),
        "compressed-tensors",
    ),
    "gemma-4-26B-A4B-FP8-Dynamic": (
        "gemma-4-26B-A4B",
        _compressed(
            "float-quantized",
            ["lm_head", "re:.*vision_tower.*", "re:.*embed_vision.*", "re:.*router.*"],
            _CT_FP8 | {"dynamic": True, "strategy": "token"},
            **_CT_FP8,
            strategy="channel",
            dynamic=False,
        ),
        "compressed-tensors",
    ),
    "GLM-4.5-Air-FP8": (
        "GLM-4.5-Air",
        _compressed(
            "float-quantized",
            ["lm_head", *(f"model.layers.{i}.mlp.gate" for i in range(1, 46))],
            _CT_FP8 | {"dynamic": True, "strategy": "token"},
            **_CT_FP8,
            strategy="channel",
            dynamic=False,
        ),
        "compressed-tensors",
    ),
    "Ministral-3-8B-FP8": (
        "Ministral-3-8B",
        {"activation_scheme": "static", "dequantize": False, "quant_method": "fp8"}
        | {"modules_to_not_convert": ["model.vision_tower", "model.multi_modal_projector"]}
        | {"weight_block_size": None},
        "fp8 per tensor or channel",
    ),
    "MiniMax-M2-FP8": (
        "MiniMax-M2",
        {"activation_scheme": "dynamic", "fmt": "float8_e4m3fn", "quant_method": "fp8"}
        | {"modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"]}
        | {"weight_block_size": [128, 128]},
        "fp8 in blocks of 128x128",
    ),
    "MiniMax-M2.5-AWQ": (
        "MiniMax-M2",
        {"bits": 4, "group_size": 128, "quant_method": "awq", "version": "gemm"}
        | {"modules_to_not_convert": ["self_attn", "block_sparse_moe.gate", "model.layers.0."]}
        | {"zero_point": True},
        "awq int4",
    ),
    "gpt-oss-20b-MXFP4": (
        "gpt-oss-20b",
        {"quant_method": "mxfp4"}
        | {
            "modules_to_not_convert": [
                *("model.layers.*.self_attn", "model.layers.*.mlp.router"),
                *("model.embed_tokens", "lm_head"),
            ]
        },
        "mxfp4 experts",
    ),
    "Llama-4-Maverick-FP8": (
        "Llama-4-Maverick",
        _compressed(
            "float-quantized",
            ["re:.*lm_head", "re:.*self_attn", "re:.*router", "re:.*vision_model.*"]
            + ["re:.*multi_modal_projector.*", "re:.*shared_expert"],
            _CT_FP8 | {"dynamic": True, "strategy": "token"},
            **_CT_FP8,
            strategy="channel",
            dynamic=False,
        ),
        "compressed-tensors",
    ),
}
