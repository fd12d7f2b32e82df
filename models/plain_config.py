"""Reads an ordinary config.json as data, with the result of transformers' config classes.

Importing transformers takes seconds, and most configs need only its defaults. `plain_config` reads
the configs whose meaning is certain and returns None for all others, which transformers then reads:
other model types, scaled RoPE, and every value that transformers would convert or refuse.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

_COMMON: dict[str, Any] = {
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_size": 4096,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "eos_token_id": None,
    "rope_theta": 10000.0,
}
_QWEN: dict[str, Any] = _COMMON | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
# model_type -> the defaults of transformers' class for that type, of the fields that families read.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _COMMON
    | {
        "vocab_size": 32000,
        "intermediate_size": 11008,
        "num_key_value_heads": None,
        "max_position_embeddings": 2048,
        "eos_token_id": 2,
        "attention_bias": False,
        "mlp_bias": False,
        "head_dim": None,
    },
    "mistral": _COMMON
    | {
        "vocab_size": 32000,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "eos_token_id": 2,
        "sliding_window": 4096,
        "head_dim": None,
    },
    "qwen2": _QWEN,
    "qwen3": _QWEN | {"head_dim": 128, "attention_bias": False},
}
_ABSENT = type(None)
# Field -> types of its value; a field that is not listed has the type of its default.
_TYPES: dict[str, tuple[type, ...]] = {
    "eos_token_id": (int, list, _ABSENT),
    "layer_types": (list, _ABSENT),
    "sliding_window": (int, _ABSENT),
    "rope_theta": (int, float),
}
_MAY_BE_ZERO = {"max_window_layers", "eos_token_id"}
_DTYPES = (None, "float32", "float16", "bfloat16")
_LAYER_TYPES = {"full_attention", "sliding_attention"}
# Fields that change the meaning of other fields.
_LEFT_TO_TRANSFORMERS = {"text_config", "per_layer_config", "partial_rotary_factor", "auto_map"}


def plain_config(raw: dict[str, Any]) -> SimpleNamespace | None:
    """A config's attributes, as far as families read them; None if transformers has to read it.

    raw: the content of config.json.
    """
    model_type = raw.get("model_type")
    defaults = DEFAULTS.get(model_type) if isinstance(model_type, str) else None
    if defaults is None or _LEFT_TO_TRANSFORMERS & raw.keys():
        return None
    fields = defaults | raw
    fields["rope_theta"] = _rope_theta(raw, defaults["rope_theta"])
    if not all(_is_plain(name, fields[name], defaults[name]) for name in defaults):
        return None
    if fields["hidden_size"] % fields["num_attention_heads"]:
        return None
    fields["dtype"] = raw.get("dtype") or raw.get("torch_dtype")
    if fields["dtype"] not in _DTYPES or raw.get("torch_dtype") not in (None, fields["dtype"]):
        return None
    return _completed(SimpleNamespace(**fields))


def _rope_theta(raw: dict[str, Any], default: float) -> Any:
    """The base of unscaled RoPE; None if the config scales RoPE or names the base twice."""
    if raw.get("rope_scaling"):
        return None
    rope = raw.get("rope_parameters")
    if not rope:
        return raw.get("rope_theta", default)
    is_plain = isinstance(rope, dict) and rope.keys() == {"rope_type", "rope_theta"}
    is_plain = is_plain and rope["rope_type"] == "default" and "rope_theta" not in raw
    return rope["rope_theta"] if is_plain else None


def _is_plain(name: str, value: Any, default: Any) -> bool:
    """Whether transformers takes a field's value unchanged. A boolean is not a number here."""
    types = _TYPES.get(name) or ((int, _ABSENT) if default is None else (type(default),))
    if type(value) not in types:
        return False
    if isinstance(value, list):
        return all(type(item) is (str if name == "layer_types" else int) for item in value)
    if name == "initializer_range":
        return bool(0 <= value <= 1)
    return not (isinstance(value, int | float) and type(value) is not bool) or (
        value > 0 or (value == 0 and name in _MAY_BE_ZERO)
    )


def _completed(hf: SimpleNamespace) -> SimpleNamespace | None:
    """Fill in the fields that transformers' classes compute from other fields.

    None if transformers has to read the config.
    """
    if hf.num_key_value_heads is None:
        hf.num_key_value_heads = hf.num_attention_heads
    if hasattr(hf, "head_dim") and hf.head_dim is None:
        hf.head_dim = hf.hidden_size // hf.num_attention_heads
    hf.rope_parameters = {"rope_type": "default", "rope_theta": hf.rope_theta}
    if hf.model_type not in ("qwen2", "qwen3"):
        return hf if getattr(hf, "layer_types", None) is None else None
    if not hf.use_sliding_window:
        hf.sliding_window = None
    if hf.layer_types is None:
        first = hf.num_hidden_layers if hf.sliding_window is None else hf.max_window_layers
        full = min(first, hf.num_hidden_layers)
        sliding = hf.num_hidden_layers - full
        if max(full, sliding) > 10_000:  # more layers than `registry._check_sizes` allows
            return None
        hf.layer_types = ["full_attention"] * full + ["sliding_attention"] * sliding
    is_valid = set(hf.layer_types) <= _LAYER_TYPES
    return hf if is_valid and len(hf.layer_types) == hf.num_hidden_layers else None
