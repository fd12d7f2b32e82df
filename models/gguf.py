"""GGUF files (llama.cpp's format), turned into an ordinary Hugging Face checkpoint directory.

`convert_gguf` checks every offset and shape against the file's size, undoes what llama.cpp changed
(the row order of q and k, RoPE scaling stored as a tensor) and writes config, tokenizer and
safetensors. What cannot be converted exactly is refused by name: no model rather than a wrong one.
The header is read here and not by gguf.GGUFReader, which loops without end on some damaged files
and takes 3 s for a vocabulary; dequantisation is the gguf package's. Knows nothing of the cache.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, processors
from tokenizers import pre_tokenizers as pre
from tqdm import tqdm

from compiledllm.config import ConfigError

FloatArray: TypeAlias = "np.ndarray[Any, np.dtype[np.float32]]"

_STRING, _ARRAY = 8, 9  # metadata value types; the rest are scalars
_SCALARS = dict(enumerate(("<u1", "<i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?"))) | dict(
    enumerate(("<u8", "<i8", "<f8"), start=10)
)
_MAX_COUNT = 2**24  # of keys, tensors, items of an array or bytes of text; real ones are far below
_CONTROL, _USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type
_FLOAT_KINDS = {GGMLQuantizationType.F32, GGMLQuantizationType.F16}
_SAFETENSORS_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def convert_gguf(gguf_path: Path, target_dir: Path) -> None:
    """Write the model of `gguf_path` into `target_dir` as config, safetensors and tokenizer files.

    Quantised weights become bfloat16, others keep their dtype. Memory: one tensor at a time.
    Raises ConfigError for a damaged file and for anything that could not be converted exactly.
    """
    try:
        file = read_gguf(gguf_path)
        architecture = _architecture(file)
        config = architecture.config(file)
        rules = _match_tensors(file, architecture, config)
        tokenizer = _tokenizer(file)
        target_dir.mkdir(parents=True, exist_ok=True)
        _write_json(target_dir / "config.json", config)
        _write_json(target_dir / "generation_config.json", _generation_config(file, config))
        _write_tokenizer(file, tokenizer, config, target_dir)
        _write_weights(file, rules, config, target_dir / "model.safetensors")
    except ValueError as error:
        raise ConfigError(f"cannot convert {gguf_path}: {error}") from error


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where a tensor lies in the file; `shape` is in numpy's order, the reverse of the file's."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class GgufFile:
    """A checked header over the mapped file."""

    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    data: mmap.mmap

    @property
    def num_embeddings(self) -> int:
        """Rows of the embedding: the vocabulary of the weights, padding included."""
        if "token_embd.weight" not in self.tensors:
            raise ValueError("tensor 'token_embd.weight' is missing")
        return self.tensors["token_embd.weight"].shape[0]

    def load(self, name: str) -> FloatArray:
        """One tensor, dequantised, as a fresh float32 array."""
        tensor = self.tensors[name]
        raw = np.frombuffer(self.data, np.uint8, tensor.num_bytes, tensor.offset)
        try:
            values = dequantize(raw.reshape(*tensor.shape[:-1], -1), tensor.kind)
        except NotImplementedError:
            raise ValueError(
                f"tensor '{name}' is stored as {tensor.kind.name}, which the gguf package cannot "
                "dequantise; use another quantisation of the model, such as Q8_0"
            ) from None
        return np.array(values, dtype=np.float32)

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number of the metadata."""
        value = self.metadata.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"metadata key '{key}' must be a number, got {_brief(value)}")
        if not 0 < value < 2**31:
            raise ValueError(f"metadata key '{key}' must be in (0, 2^31), got {value}")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive integer of the metadata."""
        value = self.number(key, default)
        if not isinstance(value, int):
            raise ValueError(f"metadata key '{key}' must be an integer, got {value}")
        return value

    def strings(self, key: str) -> list[str]:
        """A list of strings of the metadata."""
        value = self.metadata.get(key)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ValueError(f"metadata key '{key}' must be a list of strings, got {_brief(value)}")
        return value

    def token_id(self, role: str) -> int | None:
        """The id of a special token, such as `eos` or `padding`, if the metadata names one."""
        value = self.metadata.get(f"tokenizer.ggml.{role}_token_id")
        num_tokens = len(self.strings("tokenizer.ggml.tokens"))
        if value is not None and (not isinstance(value, int) or not 0 <= value < num_tokens):
            raise ValueError(f"the {role} token must be in [0, {num_tokens}), got {_brief(value)}")
        return value

    def token(self, role: str) -> str | None:
        """The text of a special token."""
        index = self.token_id(role)
        return None if index is None else self.strings("tokenizer.ggml.tokens")[index]


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


class _Header:
    """Reads the header front to back; every step is checked against the end of the file."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.position = 0

    def take(self, num_bytes: int) -> bytes:
        start, self.position = self.position, self.position + num_bytes
        if self.position > len(self.data):
            raise ValueError(
                f"the file is truncated or damaged: its header reaches byte {self.position}, the "
                f"file has {len(self.data)}; download it again"
            )
        return self.data[start : self.position]

    def numbers(self, dtype: str, count: int) -> list[Any]:
        raw = self.take(count * np.dtype(dtype).itemsize)
        values: list[Any] = np.frombuffer(raw, dtype).tolist() if count else []
        return values

    def u32(self) -> int:
        return int.from_bytes(self.take(4), "little")

    def u64(self) -> int:
        return int.from_bytes(self.take(8), "little")

    def count(self) -> int:
        value = self.u64()
        if value > _MAX_COUNT:
            raise ValueError(
                f"the header is damaged: it announces {value} items; download it again"
            )
        return value

    def string(self) -> str:
        try:
            return self.take(self.count()).decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"the header is damaged: {error}; download it again") from error

    def value(self) -> Any:
        kind = self.u32()
        if kind == _STRING:
            return self.string()
        is_array = kind == _ARRAY
        kind, count = (self.u32(), self.count()) if is_array else (kind, 1)
        if is_array and kind == _STRING:
            return [self.string() for _ in range(count)]
        if kind not in _SCALARS:
            raise ValueError(f"the header is damaged: a metadata value is of unknown type {kind}")
        values = self.numbers(_SCALARS[kind], count)
        return values if is_array else values[0]

    def tensor_info(self) -> tuple[str, _TensorInfo]:
        name, num_dims = self.string(), self.u32()
        if not 1 <= num_dims <= 4:
            raise ValueError(f"tensor '{name}' has {num_dims} dimensions (1 to 4 are possible)")
        dims = self.numbers("<u8", num_dims)
        return name, _TensorInfo(dims, kind=self.u32(), offset=self.u64())


@dataclass(frozen=True, slots=True)
class _TensorInfo:
    """A tensor as the header gives it: dims fastest first, offset from the start of the data."""

    dims: list[int]
    kind: int
    offset: int


def read_gguf(path: Path) -> GgufFile:
    """Map a GGUF file (version 2 or 3, little endian). Raises ValueError saying what is damaged."""
    with path.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise ValueError("it is not a GGUF file (those begin with the letters GGUF)")
        data = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    header = _Header(data)
    header.take(4)
    if (version := header.u32()) not in (2, 3):
        raise ValueError(f"GGUF version {version:#x} is not supported (2 and 3 are, little endian)")
    num_tensors, num_keys = header.count(), header.count()
    metadata = {header.string(): header.value() for _ in range(num_keys)}
    infos = dict(header.tensor_info() for _ in range(num_tensors))
    if len(metadata) != num_keys or len(infos) != num_tensors:
        raise ValueError("the header is damaged: a metadata key or tensor name occurs twice")
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"general.alignment must be a positive integer, got {_brief(alignment)}")
    start = -(-header.position // alignment) * alignment
    tensors = {name: _place(name, info, start, len(data)) for name, info in infos.items()}
    return GgufFile(metadata, tensors, data)


def _place(name: str, info: _TensorInfo, start: int, file_size: int) -> GgufTensor:
    """The tensor's place in the file, checked to be inside it."""
    shape = tuple(reversed(info.dims))
    try:
        kind = GGMLQuantizationType(info.kind)
    except ValueError:
        raise ValueError(f"tensor '{name}' is of unknown type {info.kind}") from None
    block_size, block_bytes = GGML_QUANT_SIZES[kind]
    if min(shape) < 1 or shape[-1] % block_size:
        raise ValueError(f"tensor '{name}' has shape {shape}, which is impossible in {kind.name}")
    num_bytes = math.prod(shape) // block_size * block_bytes
    end = start + info.offset + num_bytes
    if end > file_size:
        raise ValueError(
            f"the file is truncated or damaged: tensor '{name}' ends at byte {end}, the file has "
            f"{file_size}; download it again"
        )
    return GgufTensor(shape, kind, start + info.offset, num_bytes)


@dataclass(frozen=True, slots=True)
class _Rule:
    """What a tensor is called in the checkpoint, and the names of its sizes (see `_sizes`).

    heads: the config entry with the number of heads whose rows are interleaved, if they are.
    """

    name: str
    shape: tuple[str, ...]
    heads: str | None = None


@dataclass(frozen=True, slots=True)
class _Architecture:
    """How one architecture is converted. In names, `{}` is the layer."""

    config: Callable[[GgufFile], dict[str, Any]]
    rules: dict[str, _Rule]
    layer_rules: dict[str, _Rule]


def _architecture(file: GgufFile) -> _Architecture:
    name = str(file.metadata.get("general.architecture"))
    if name not in _ARCHITECTURES:
        supported = ", ".join(_ARCHITECTURES)
        raise ValueError(f"architecture {name[:40]!r} is not supported; supported: {supported}")
    if file.metadata.get("split.count", 1) not in (0, 1):
        raise ValueError(
            "it is one part of a split model; join the parts with 'llama-gguf-split --merge'"
        )
    return _ARCHITECTURES[name]


def _llama_config(file: GgufFile) -> dict[str, Any]:
    """config.json of a LlamaForCausalLM, in the names that checkpoints on the hub use."""
    _refuse_unknown_keys(file, "llama.", _LLAMA_KEYS)
    hidden = file.integer("llama.embedding_length")
    heads = file.integer("llama.attention.head_count")
    kv_heads = file.integer("llama.attention.head_count_kv", heads)
    head_dim = file.integer("llama.attention.key_length", hidden // heads)
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if file.integer(key, head_dim) != head_dim:
            raise ValueError(f"{key} must be the head size {head_dim}, got {file.metadata[key]}")
    if head_dim % 2 or heads % kv_heads:
        raise ValueError(f"{heads} heads of {head_dim} with {kv_heads} KV heads are impossible")
    theta = _shortest(file.number("llama.rope.freq_base", 10000.0))
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": file.num_embeddings,
        "hidden_size": hidden,
        "intermediate_size": file.integer("llama.feed_forward_length"),
        "num_hidden_layers": file.integer("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": file.integer("llama.context_length"),
        "rms_norm_eps": _shortest(file.number("llama.attention.layer_norm_rms_epsilon")),
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(file, head_dim, theta),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": file.token_id("bos"),
        "eos_token_id": file.token_id("eos"),
        "pad_token_id": file.token_id("padding"),
        "dtype": _stored_dtype(file),
        "torch_dtype": _stored_dtype(file),  # its name before transformers 5
    }


def _refuse_unknown_keys(file: GgufFile, prefix: str, known: frozenset[str]) -> None:
    """A key nobody reads may change the model (experts, logit scale): refuse it unless it is 0."""
    for key, value in file.metadata.items():
        if key.startswith(prefix) and key.removeprefix(prefix) not in known and value:
            raise ValueError(f"metadata key '{key}' = {_brief(value)} is not supported")


def _shortest(value: float) -> float:
    """The short decimal that a float32 of the metadata stands for: 9.99999975e-06 -> 1e-05."""
    return float(str(np.float32(value)))


def _rope_scaling(file: GgufFile, head_dim: int, theta: float) -> dict[str, Any] | None:
    """The config entry that means the same as the file's RoPE scaling; ValueError if none does."""
    kind = file.metadata.get("llama.rope.scaling.type", "linear")
    has_factor = file.metadata.get("llama.rope.scaling.factor")  # llama.cpp takes 0 for none
    factor = _shortest(file.number("llama.rope.scaling.factor")) if has_factor else 1.0
    is_scaled = kind != "none" and factor != 1.0
    has_divisors = "rope_freqs.weight" in file.tensors
    if kind not in ("none", "linear") or (is_scaled and has_divisors):
        raise ValueError(f"RoPE scaling {kind!r} with factor {factor} is not supported")
    if not has_divisors:
        return {"rope_type": "linear", "factor": factor} if is_scaled else None
    divisors = file.load("rope_freqs.weight")
    scaling = {"rope_type": "llama3", "factor": _shortest(divisors.max()), **_LLAMA3_ROPE}
    expected = _llama3_divisors(scaling, head_dim, theta)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-4):
        raise ValueError("tensor 'rope_freqs.weight' is a RoPE scaling other than Llama 3's")
    return scaling


def _llama3_divisors(scaling: dict[str, Any], head_dim: int, theta: float) -> FloatArray:
    """What Llama 3 divides each RoPE frequency by: 1 for short waves, factor for long ones."""
    waves = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] / waves
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return np.asarray(1 / ((1 - smooth) / scaling["factor"] + smooth), dtype=np.float32)


def _stored_dtype(file: GgufFile) -> str:
    kinds = {tensor.kind for tensor in file.tensors.values()}
    if kinds == {GGMLQuantizationType.F32}:
        return "float32"
    return "float16" if kinds <= _FLOAT_KINDS else "bfloat16"


_LLAMA3_ROPE = {  # of all Llama 3.1 to 3.3 releases; a GGUF keeps only the divisors they lead to
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_LLAMA_KEYS = frozenset(
    (
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.layer_norm_rms_epsilon",
        "attention.value_length",
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "rope.dimension_count",
        "rope.freq_base",
        "rope.scaling.factor",
        "rope.scaling.finetuned",
        "rope.scaling.original_context_length",
        "rope.scaling.type",
        "tensor_data_layout",
        "vocab_size",
    )
)
_ARCHITECTURES = {
    "llama": _Architecture(
        config=_llama_config,
        rules={
            "token_embd.weight": _Rule("model.embed_tokens.weight", ("vocab", "hidden")),
            "output_norm.weight": _Rule("model.norm.weight", ("hidden",)),
            "output.weight": _Rule("lm_head.weight", ("vocab", "hidden")),
        },
        layer_rules={
            f"blk.{{}}.{theirs}.weight": _Rule(f"model.layers.{{}}.{ours}.weight", shape, heads)
            for theirs, ours, shape, heads in (
                ("attn_norm", "input_layernorm", ("hidden",), None),
                ("attn_q", "self_attn.q_proj", ("q", "hidden"), "num_attention_heads"),
                ("attn_k", "self_attn.k_proj", ("kv", "hidden"), "num_key_value_heads"),
                ("attn_v", "self_attn.v_proj", ("kv", "hidden"), None),
                ("attn_output", "self_attn.o_proj", ("hidden", "q"), None),
                ("ffn_norm", "post_attention_layernorm", ("hidden",), None),
                ("ffn_gate", "mlp.gate_proj", ("ffn", "hidden"), None),
                ("ffn_up", "mlp.up_proj", ("ffn", "hidden"), None),
                ("ffn_down", "mlp.down_proj", ("hidden", "ffn"), None),
            )
        },
    ),
}


def _generation_config(file: GgufFile, config: dict[str, Any]) -> dict[str, Any]:
    """generation_config.json: all tokens that end an answer (eos, end of turn, of message)."""
    ids = dict.fromkeys(file.token_id(role) for role in ("eos", "eot", "eom"))
    eos = [i for i in ids if i is not None]
    return {
        "bos_token_id": config["bos_token_id"],
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "pad_token_id": config["pad_token_id"],
    }


def _match_tensors(
    file: GgufFile, architecture: _Architecture, config: dict[str, Any]
) -> dict[str, _Rule]:
    """Tensor name in the file -> its rule; ValueError for one missing, unknown or misshapen."""
    num_layers = config["num_hidden_layers"]
    if num_layers > len(file.tensors):
        raise ValueError(f"{num_layers} layers cannot be in {len(file.tensors)} tensors")
    rules = dict(architecture.rules)
    if config["tie_word_embeddings"]:
        del rules["output.weight"]
    for layer in range(num_layers):
        for name, rule in architecture.layer_rules.items():
            rules[name.format(layer)] = _Rule(rule.name.format(layer), rule.shape, rule.heads)
    present = file.tensors.keys() - {"rope_freqs.weight"}  # that one went into the config
    for what, names in (("missing", rules.keys() - present), ("unknown", present - rules.keys())):
        if names:
            raise ValueError(f"{len(names)} {what} tensors: {_brief(sorted(names))}")
    sizes = _sizes(config)
    for name, rule in rules.items():
        shape, expected = file.tensors[name].shape, tuple(sizes[size] for size in rule.shape)
        if shape != expected:
            raise ValueError(f"tensor '{name}' has shape {shape}, the metadata says {expected}")
    return rules


def _sizes(config: dict[str, Any]) -> dict[str, int]:
    return {
        "vocab": config["vocab_size"],
        "hidden": config["hidden_size"],
        "ffn": config["intermediate_size"],
        "q": config["num_attention_heads"] * config["head_dim"],
        "kv": config["num_key_value_heads"] * config["head_dim"],
    }


def _write_weights(
    file: GgufFile, rules: dict[str, _Rule], config: dict[str, Any], path: Path
) -> None:
    """A safetensors file, tensor by tensor (safetensors' own save_file wants all in memory)."""
    dtype: torch.dtype = getattr(torch, config["torch_dtype"])
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, rule in rules.items():
        shape = file.tensors[name].shape
        start, end = end, end + math.prod(shape) * dtype.itemsize
        code = _SAFETENSORS_DTYPES[config["torch_dtype"]]
        header[rule.name] = {"dtype": code, "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as out:
        out.write(struct.pack("<Q", len(encoded)) + encoded)
        for name, rule in tqdm(rules.items(), desc="Converting GGUF", unit="tensor", disable=None):
            values = file.load(name)
            if rule.heads:
                values = _uninterleave(values, config[rule.heads])
            out.write(torch.from_numpy(values).to(dtype).view(torch.uint8).numpy().data)
        out.flush()
        os.fsync(out.fileno())


def _uninterleave(rows: FloatArray, num_heads: int) -> FloatArray:
    """Put the rows of each head, which llama.cpp stores as 0 32 1 33 …, in order again."""
    pairs = rows.reshape(num_heads, -1, 2, *rows.shape[1:])  # [heads, head_dim / 2, 2, in]
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_NAMES = ("llama-bpe", "llama-v3", "llama3")


def _pre_tokenizer(name: object) -> pre.PreTokenizer:
    """How text is split before merging, by the name llama.cpp gives the scheme."""
    if name == "gpt-2":
        return pre.ByteLevel(add_prefix_space=False)
    if name == "smollm":
        return pre.Sequence([pre.Digits(individual_digits=True), _pre_tokenizer("gpt-2")])
    if name in _LLAMA3_NAMES:
        split = pre.Split(Regex(_LLAMA3_SPLIT), "isolated")
        return pre.Sequence([split, pre.ByteLevel(add_prefix_space=False, use_regex=False)])
    known = ", ".join(("gpt-2", "smollm", *_LLAMA3_NAMES))
    raise ValueError(f"tokenizer.ggml.pre {name!r} is not supported; supported: {known}")


def _tokenizer(file: GgufFile) -> Tokenizer:
    """The byte-level BPE tokenizer that the metadata describes."""
    if (model := file.metadata.get("tokenizer.ggml.model")) != "gpt2":
        raise ValueError(
            f"tokenizer.ggml.model {model!r} is not supported (gpt2, byte-level BPE, is); "
            "use the model's Hugging Face checkpoint"
        )
    scheme = file.metadata.get("tokenizer.ggml.pre")
    vocab = _vocabulary(file)
    merges = [_pair(merge) for merge in file.strings("tokenizer.ggml.merges")]
    try:  # Llama 3 takes a piece that is a token whole, without asking the merges
        bpe = models.BPE(vocab, merges, ignore_merges=scheme in _LLAMA3_NAMES)
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(f"the merges do not fit the vocabulary: {error}") from error
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = _pre_tokenizer(scheme)
    tokenizer.decoder = decoders.ByteLevel()
    types = file.metadata.get("tokenizer.ggml.token_type")
    if not isinstance(types, list) or len(types) != len(vocab):
        raise ValueError("metadata key 'tokenizer.ggml.token_type' must have a number per token")
    for token, kind in zip(vocab, types, strict=True):
        if kind in (_CONTROL, _USER_DEFINED):
            added = AddedToken(token, special=kind == _CONTROL, normalized=False)
            tokenizer.add_tokens([added])
    tokenizer.post_processor = _post_processor(file, vocab)
    return tokenizer


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right


def _vocabulary(file: GgufFile) -> dict[str, int]:
    """Token -> id, in the order of ids."""
    tokens = file.strings("tokenizer.ggml.tokens")
    vocab = {token: i for i, token in enumerate(tokens)}
    if not len(vocab) == len(tokens) <= file.num_embeddings:
        raise ValueError(
            f"{len(tokens)} tokens, {len(vocab)} of them different, do not fit an embedding of "
            f"{file.num_embeddings} rows"
        )
    return vocab


def _is_added(file: GgufFile, role: str) -> bool:
    """Whether encoding adds the bos or eos token; where the file is silent, as llama.cpp does."""
    default = role == "bos" and file.metadata.get("tokenizer.ggml.pre") in _LLAMA3_NAMES
    is_wanted = file.metadata.get(f"tokenizer.ggml.add_{role}_token", default)
    return bool(is_wanted) and file.token_id(role) is not None


def _post_processor(file: GgufFile, vocab: dict[str, int]) -> processors.TemplateProcessing:
    bos, eos = ([str(file.token(r))] if _is_added(file, r) else [] for r in ("bos", "eos"))
    return processors.TemplateProcessing(
        single=[*bos, "$A", *eos],
        pair=[*bos, "$A", *eos, *(f"{token}:1" for token in bos), "$B:1", *eos],
        special_tokens=[(token, vocab[token]) for token in dict.fromkeys(bos + eos)],
    )


def _write_tokenizer(
    file: GgufFile, tokenizer: Tokenizer, config: dict[str, Any], target_dir: Path
) -> None:
    roles = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    special = {f"{ours}_token": file.token(theirs) for ours, theirs in roles.items()}
    tokenizer.save(str(target_dir / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name: token for name, token in special.items() if token is not None},
        **{f"add_{role}_token": _is_added(file, role) for role in ("bos", "eos")},
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
    }
    _write_json(target_dir / "tokenizer_config.json", tokenizer_config)
    template = file.metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        (target_dir / "chat_template.jinja").write_text(template, encoding="utf-8")
