"""Writers of GGUF files: tiny models as llama.cpp's converter names, orders and quantises them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import pre_tokenizers
from torch import Tensor

from compiledllm.models.formats.gguf_blocks import KINDS
from tests.support.gguf_blocks import random_blocks

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["h e", "Ġ t", "Ġ Ġ", "Ġt he"]
MERGED = ["he", "Ġt", "ĠĠ", "Ġthe", "xyz"]  # no merge leads to the last
TOKENS = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *MERGED]
VOCAB = 288  # more rows than tokens, as in many checkpoints
ARCHITECTURES = {
    "gemma3_text": "gemma3",
    "gemma4_text": "gemma4",
}  # model_type -> the architecture's name in GGUF, if the two differ
# Scales of Gemma 4's routers -> their names in GGUF.
_SCALES = {"scale": "ffn_gate_inp", "per_expert_scale": "ffn_down_exps"}
# Architectures whose q and k llama.cpp permutes. Its files of Mistral models name Llama.
_INTERLEAVED = ("llama", "mistral")
# Type -> largest code times largest small scale: a block's numbers divided by its float16 scale.
_SIZES = {"Q4_0": 8, "Q4_1": 15, "Q5_0": 16, "Q5_1": 31, "Q8_0": 127}
_SIZES |= {"Q4_K": 15 * 63, "Q5_K": 31 * 63, "Q6_K": 32 * 127}


def interleave(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """llama.cpp's order of q and k rows: the two halves of each head alternate."""
    halves = rows.reshape(num_heads, 2, -1, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)


def in_order(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """The inverse of `interleave`."""
    pairs = rows.reshape(num_heads, -1, 2, *rows.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)


def architecture_of(config: Any) -> str:
    return ARCHITECTURES.get(config.model_type, config.model_type)


def heads_of(name: str, config: Any) -> int:
    """Number of heads whose rows are interleaved in the file; 0: none."""
    if architecture_of(config) not in _INTERLEAVED:
        return 0
    if "q_proj" in name:
        return config.num_attention_heads
    return config.num_key_value_heads if "k_proj" in name else 0


@functools.cache
def _names(architecture: str, num_layers: int) -> Any:
    name = "llama" if architecture == "mistral" else architecture
    kind = next(arch for arch, known in gguf.MODEL_ARCH_NAMES.items() if known == name)
    return gguf.get_tensor_name_map(kind, num_layers)


def gguf_name(name: str, config: Any) -> str:
    names = _names(architecture_of(config), config.num_hidden_layers)
    block, _, scale = name.replace("model.layers", "blk").partition(".router.")
    if scale in _SCALES:
        return f"{block}.{_SCALES[scale]}.scale"
    if name.endswith(("layer_scalar", "experts.gate_up_proj", "experts.down_proj")):
        name += ".weight"
    found = names.get_name(name, try_suffixes=(".weight", ".bias"))
    assert found is not None, name
    return str(found)


def gguf_tensors(model: Any) -> dict[str, np.ndarray]:
    """The model's weights as llama.cpp's converter names and orders them."""
    config, tensors = model.config, {}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = weight.numpy()
        if config.model_type == "gemma3_text" and name.endswith("norm.weight"):
            values = values + 1
        if heads := heads_of(name, config):
            values = interleave(values, heads)
        tensors[gguf_name(name, config)] = values
    return tensors


def write_gguf(
    path: Path,
    tensors: dict[str, np.ndarray],
    kind: str = "F32",
    architecture: str = "llama",
    edit: Callable[[Any], None] = lambda writer: None,
    pre: str = "smollm",
    num_layers: int = 3,
    hidden_size: int = 64,
    intermediate_size: int = 96,
    head_dim: int = 16,
    kinds: dict[str, str] | None = None,
) -> Path:
    """Write a GGUF file of a model with 4 heads and 2 KV heads. Returns `path`.

    kind: the type in which matrices are stored. edit: may add metadata to the writer. kinds: name
    -> type, for tensors that are given as blocks.
    """
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_context_length(16384)
    writer.add_embedding_length(hidden_size)
    writer.add_block_count(num_layers)
    writer.add_feed_forward_length(intermediate_size)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(head_dim)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    edit(writer)
    stored = gguf.GGMLQuantizationType[kind]
    for name, values in tensors.items():
        if own := (kinds or {}).get(name):
            writer.add_tensor(name, values, raw_dtype=gguf.GGMLQuantizationType[own])
        elif values.ndim == 1 or kind == "F32":
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_quantized(
    path: Path,
    model: Any,
    kind_of: Callable[[str], str],
    left_out: tuple[str, ...] = (),
    **options: Any,
) -> dict[str, Tensor]:
    """Write a GGUF file with random blocks as matrices; returns the dequantised state dict.

    kind_of: name of a matrix in the checkpoint -> its type in the file. left_out: tensors of the
    file that are not written. options: of `write_gguf`.
    """
    config, tensors = model.config, gguf_tensors(model)
    for name in left_out:
        del tensors[name]
    state, kinds = dict(model.state_dict()), {}
    for seed, (name, weight) in enumerate(state.items()):
        theirs = gguf_name(name, config)
        if weight.dim() != 2 or theirs not in tensors:
            continue
        kinds[theirs] = kind = kind_of(name)
        num_rows, num_columns = weight.shape
        num_blocks = num_columns // gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0]
        spread = 0.15 / _SIZES[kind]
        blocks = random_blocks(kind, num_rows, num_blocks, seed, spread).numpy()
        tensors[theirs] = blocks
        values = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind])
        if heads := heads_of(name, config):
            values = in_order(values, heads)
        state[name] = torch.from_numpy(values)
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    own_head_dim = options.get("head_dim") or getattr(config, "head_dim", None)
    sizes = {
        "architecture": architecture_of(config),
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_layers": config.num_hidden_layers,
        "head_dim": own_head_dim or config.hidden_size // 4,
    }
    write_gguf(path, tensors, kinds=kinds, **sizes | options)
    return state


assert set(_SIZES) == set(KINDS)
