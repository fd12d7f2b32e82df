"""Random models of some thousand weights, saved as checkpoints that the engine loads."""

from __future__ import annotations

import shutil
import zlib
from pathlib import Path
from typing import Any

TINY: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TIED = {"tie_word_embeddings": True}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "depth": 1,
    "num_heads": 2,
    "out_hidden_size": 64,
    "num_position_embeddings": 16,
}
QWEN_VL_VISION = QWEN_VISION | {"deepstack_visual_indexes": [0]}
PIXTRAL = VISION | {"model_type": "pixtral", "num_channels": 3}
GLM_VISION = QWEN_VISION | {"image_size": 28, "patch_size": 14}
# Model type of a multimodal model, of which the engine runs the text -> options of its vision part.
VISION_OF: dict[str, dict[str, Any]] = {
    "gemma3": VISION,
    "gemma4": VISION | {"head_dim": 16, "num_key_value_heads": 2},
    "gemma4_unified": {"patch_size": 2, "mm_embed_dim": 32, "output_proj_dims": 32},
    "glm46v": GLM_VISION | {"model_type": "glm4v_vision"},
    "glm4v": GLM_VISION,
    "glm4v_moe": GLM_VISION,
    "llama4": VISION
    | {"projector_input_dim": 32, "projector_output_dim": 32}
    | {"vision_output_dim": 32, "model_type": "llama4_vision_model"},
    "mistral3": PIXTRAL,
    "qwen2_5_vl": QWEN_VISION,
    "qwen3_5": QWEN_VISION,
    "qwen3_5_moe": QWEN_VISION,
    "qwen3_vl": QWEN_VL_VISION,
    "qwen3_vl_moe": QWEN_VL_VISION,
}
# For a model that chats: what the default model's tokenizer and template need.
CHAT = {"vocab_size": 49152, "max_position_embeddings": 2048, "eos_token_id": 2}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def save_random_model(folder: Path, model_type: str, /, **changes: Any) -> None:
    """A random float32 checkpoint, the same for the same arguments.

    initializer_range: standard deviation of its weights, 0.15 if it is not given.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    key = repr((model_type, sorted(changes.items())))
    torch.manual_seed(zlib.crc32(key.encode()))  # so that earlier tests do not change the weights
    options = TINY | changes
    if model_type in VISION_OF:
        tied = TIED if model_type.startswith("gemma") else {"tie_word_embeddings": False}
        options = {"text_config": options | tied, "vision_config": VISION_OF[model_type]} | tied
    if model_type == "gemma3":
        options["mm_tokens_per_image"] = 4
    config = AutoConfig.for_model(model_type, **options)
    auto = AutoModelForImageTextToText if model_type in VISION_OF else AutoModelForCausalLM
    model = auto.from_config(config).float()
    with torch.no_grad():  # larger than the default 0.02, so that tokens differ clearly
        for name, parameter in model.named_parameters():
            is_norm = name.endswith("weight") and ("norm" in name or ".ln_" in name)
            is_weight = name.endswith("weight") and not is_norm
            spread = 0.3 if name.endswith("bias") else 0.15
            if is_weight and "initializer_range" in changes:
                spread = changes["initializer_range"]
            mean = -2.0 if name.endswith("A_log") else float(is_norm)  # states decay slowly
            parameter.normal_(mean, spread)
        for name, buffer in model.named_buffers():
            if name.endswith(("layer_scalar", "e_score_correction_bias")):
                buffer.normal_(float(name.endswith("scalar")), 0.15)
    model.save_pretrained(folder)


def save_first_layers(source: Path, folder: Path, count: int) -> None:
    """A checkpoint of the source's first layers, its edges and its tokenizer."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, num_hidden_layers=count)
    model.save_pretrained(folder)
    copy_tokenizer(source, folder)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """A checkpoint's tokenizer and chat template."""
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copy(source / name, folder)
