"""Reads config.json as data, with the result of transformers' config classes.

Importing transformers takes seconds, and most configs need only its defaults, which
config_fields.json has for the model types of all families. `plain_config` reads the configs whose
meaning is certain and returns None for all others, which transformers then reads: other model
types, and every value that transformers would convert or refuse.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from compiledllm.models.plain_rope import Uncertain, certain, rope_parameters
from compiledllm.models.plain_rules import complete

Raw = dict[str, Any]

# Model type of a multimodal model -> the model types that its text model may have. If there is only
# one, it is the default.
_TEXTS: dict[str, tuple[str, ...]] = {
    "gemma3": ("gemma3_text",),
    "gemma3n": ("gemma3n_text",),
    "gemma4": ("gemma4_text",),
    "gemma4_unified": ("gemma4_unified_text",),
    "glm46v": ("glm4v_text",),
    "glm4v": ("glm4v_text",),
    "glm4v_moe": ("glm4v_moe_text",),
    "llama4": ("llama4_text",),
    "mistral3": ("mistral", "ministral", "ministral3"),
    "qwen2_5_vl": ("qwen2_5_vl_text",),
    "qwen3_5": ("qwen3_5_text",),
    "qwen3_5_moe": ("qwen3_5_moe_text",),
    "qwen3_vl": ("qwen3_vl_text",),
    "qwen3_vl_moe": ("qwen3_vl_moe_text",),
}
_TOWERS = ("vision_config", "audio_config")
# Fields that change the meaning of other fields or of the file. transformers reads such files.
_LEFT_TO_TRANSFORMERS = {"per_layer_config", "configuration_files", "decoder", "generator"}
_LEFT_TO_TRANSFORMERS |= {"text_encoder"}
_DTYPES = (None, "float32", "float16", "bfloat16")
_MAX_LAYERS = 10_000  # as in `registry._check_sizes`
# Model types in which the number of heads must divide the hidden size even if head_dim is given.
_DIVIDED = {"gemma2", "gemma3_text", "gemma3n_text", "gpt_neox", "llama"}
_ROPE = ("rope_parameters", "rope_scaling", "rope_theta")
_TYPES: dict[str, type] = {
    "bool": bool,
    "int": int,
    "float": float,
    "str": str,
    "null": type(None),
    "dict": dict,
}


class PlainConfig(SimpleNamespace):
    """The attributes of a config that families read, under transformers' names."""

    def get_text_config(self) -> PlainConfig:
        text: PlainConfig = getattr(self, "text_config", self)
        return text


def plain_config(raw: Raw) -> PlainConfig | None:
    """The config; None if transformers has to read it. raw: the content of config.json."""
    try:
        _check_code(raw.get("auto_map", {}))
        model_type = _text_of(raw.get("model_type"))
        if model_type not in _TEXTS:
            return _text(raw, model_type)
        return _whole(raw, model_type)
    except Uncertain:
        return None


def _text_of(value: object) -> str:
    certain(type(value) is str, "no type")
    return str(value)


def _check_code(names: object) -> None:
    """Check the form of `auto_map`, which names code of the checkpoint. The code is never run."""
    certain(isinstance(names, dict) and isinstance(names.get("AutoConfig", ""), str), "auto_map")


@cache
def _table() -> Raw:
    table: Raw = json.loads(Path(__file__).with_name("config_fields.json").read_text("utf-8"))
    return table


def _whole(raw: Raw, model_type: str) -> PlainConfig:
    """The config of a multimodal model, with the text model's config as `text_config`."""
    certain(all(isinstance(raw.get(name), dict | None) for name in _TOWERS), "towers")
    kinds = _TEXTS[model_type]
    text_raw: Any = raw.get("text_config")
    if text_raw is None and model_type == "qwen2_5_vl":
        names = _table()["types"][kinds[0]]["fields"].keys() | {*_ROPE}
        text_raw = {name: raw[name] for name in names & raw.keys()}
        text_raw.pop("tie_word_embeddings", None)
    certain(isinstance(text_raw, dict), "no text")
    kind = _text_of(text_raw.get("model_type", kinds[0] if len(kinds) == 1 else None))
    certain(kind in kinds, "a text of another type")
    whole = _fields(raw, model_type)
    text = _text(text_raw, kind)
    is_moved = getattr(text, "tie_word_embeddings", False) and not whole["tie_word_embeddings"]
    certain(not is_moved or model_type not in _MOVES_TIES, "a field of another part")
    config = _config(whole)
    config.text_config = text
    return config


# For these models, some versions of transformers take `tie_word_embeddings` from the text's config.
_MOVES_TIES = {"glm4v", "glm4v_moe", "qwen2_5_vl"}


def _text(raw: Raw, model_type: str) -> PlainConfig:
    certain("text_config" not in raw, "a text of a text")
    fields = _fields(raw, model_type)
    _check_sizes(fields, model_type)
    complete(model_type, fields)
    theta = _table()["types"][model_type]["rope_theta"]
    fields["rope_parameters"] = rope_parameters(model_type, fields, theta)
    return _config(fields)


def _fields(raw: Raw, model_type: str) -> Raw:
    """The fields of one part of a config under its class's names, with the class's defaults."""
    declared = _table()["types"].get(model_type)
    certain(declared is not None, "unknown type")
    refused = {*_LEFT_TO_TRANSFORMERS, *declared["uncertain"], *declared["refused"]}
    certain(not refused & raw.keys(), "names with meanings of their own")
    certain(raw.get("is_encoder_decoder", False) is False, "an encoder")
    fields = _without_aliases(raw, declared["aliases"])
    needed = {*_table()["read"], *declared["aliases"].values()}  # families may read the alias
    for name, (types, *default) in declared["fields"].items():
        if name in fields:
            certain(_is_of(types, fields[name]), f"{name} of another type")
        elif default:
            fields[name] = default[0]
        else:
            certain(name not in needed, f"no {name}")
    fields |= {alias: fields[name] for alias, name in declared["aliases"].items() if name in fields}
    fields |= {"model_type": model_type, "dtype": _dtype(raw)}
    certain(0 <= fields.get("initializer_range", 0) <= 1, "initializer_range")
    return fields


def _without_aliases(raw: Raw, aliases: dict[str, str]) -> Raw:
    fields = dict(raw)
    for alias, name in aliases.items():
        if alias in raw:
            certain(name not in raw, f"{name} by two names")
            fields[name] = fields.pop(alias)
    return fields


def _is_of(types: str, value: object) -> bool:
    """Whether transformers takes a field's value unchanged. types: joined by "|"."""
    return any(_is_of_type(name, value) for name in types.split("|"))


def _is_of_type(name: str, value: object) -> bool:
    """Whether `value` is of a type of config_fields.json.

    name: a type ("int"), a list of a type ("ints"), or a quoted string, which allows itself only.
    """
    if name in _TYPES:
        return type(value) is _TYPES[name]
    if name.removesuffix("s") in _TYPES:
        is_item = _TYPES[name.removesuffix("s")]
        return isinstance(value, list) and all(type(item) is is_item for item in value)
    return repr(value) == name


def _dtype(raw: Raw) -> str | None:
    new, old = raw.get("dtype"), raw.get("torch_dtype")
    certain(new in _DTYPES and old in _DTYPES, "an unusual dtype")
    certain(None in (new, old) or new == old, "two dtypes")
    dtype: str | None = new or old
    return dtype


def _check_sizes(fields: Raw, model_type: str) -> None:
    sizes = [fields[name] for name in ("num_hidden_layers", "hidden_size", "num_attention_heads")]
    certain(all(size > 0 for size in sizes) and sizes[0] <= _MAX_LAYERS, "sizes")
    head_dim = fields.get("head_dim")
    is_divided = sizes[1] % sizes[2] == 0
    certain(is_divided or (head_dim is not None and model_type not in _DIVIDED), "odd heads")
    certain(
        head_dim is None or (type(head_dim) is int and head_dim > 0 and head_dim % 2 == 0), "heads"
    )


def _config(fields: Raw) -> PlainConfig:
    read = fields.keys() & {*_table()["read"]}
    return PlainConfig(**{name: fields[name] for name in read})
