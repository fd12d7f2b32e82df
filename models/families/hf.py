"""Reads the fields of transformers configs that families share, and refuses unsupported values."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

from compiledllm.config import ConfigError
from compiledllm.models.plain_rope import PARTIAL
from compiledllm.models.rope_scaling import Rotation, linear, llama3, longrope, yarn
from compiledllm.models.spec import AttentionSpec, LayerSpec, ModelSpec, NormSpec, RopeSpec

ROPE_SCALINGS = {"linear": linear, "llama3": llama3, "yarn": yarn, "longrope": longrope}


def expect(hf: Any, name: str, *allowed: object) -> None:
    """Raise ConfigError if a field of the config has a value that the family does not implement."""
    value = getattr(hf, name, None)
    if value not in allowed:
        raise ConfigError(
            f"{hf.model_type}: {name}={value!r} is not supported "
            f"(supported: {', '.join(map(repr, allowed))})"
        )


def positive(hf: Any, name: str) -> Any:
    """A field of the config. Raises ConfigError unless the value is a number above 0."""
    value = getattr(hf, name, None)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ConfigError(f"{hf.model_type}: {name} must be a number above 0, got {value!r}")
    return value


def of_layer(hf: Any, name: str, index: int) -> Any:
    """A layer's value in a field with a list of values, one per layer.

    Raises ConfigError if the field is no such list.
    """
    values = getattr(hf, name)
    if not isinstance(values, list | tuple) or len(values) != hf.num_hidden_layers:
        raise ConfigError(
            f"{hf.model_type}: {name} must list a value for each of {hf.num_hidden_layers} layers, "
            f"got {values!r:.60}"
        )
    return values[index]


def dtype_of(hf: Any) -> str:
    """The checkpoint's dtype, a name in torch; float32 if the config names none."""
    dtype = getattr(hf, "dtype", None)
    return str(dtype).removeprefix("torch.") if dtype is not None else "float32"


def eos_token_ids(hf: Any) -> tuple[int, ...]:
    eos = getattr(hf, "eos_token_id", None)
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, (list, tuple)) else (eos,)


def model_spec(
    hf: Any, architecture: str, layers: Iterable[LayerSpec], final_norm: NormSpec, **more: Any
) -> ModelSpec:
    """A ModelSpec from fields with the same names in most configs. more: further spec fields."""
    return ModelSpec(
        architecture=architecture,
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        layers=tuple(layers),
        final_norm=final_norm,
        tie_word_embeddings=bool(getattr(hf, "tie_word_embeddings", False)),
        max_position=hf.max_position_embeddings,
        dtype=dtype_of(hf),
        eos_token_ids=eos_token_ids(hf),
        initializer_range=getattr(hf, "initializer_range", 0.02),
        **more,
    )


def head_dim_of(hf: Any) -> int:
    """The config's `head_dim`, which most classes take even if they declare no such field."""
    if getattr(hf, "head_dim", None) is None:
        return int(hf.hidden_size // positive(hf, "num_attention_heads"))
    head_dim: int = positive(hf, "head_dim")
    return head_dim


def attention_of(
    hf: Any, head_dim: int | None = None, rope: RopeSpec | None = None, **changes: Any
) -> AttentionSpec:
    """An AttentionSpec from fields with the same names in most configs; `changes` override fields.

    head_dim, rope: None means those of the config.
    """
    num_heads = hf.num_attention_heads
    head_dim = head_dim or head_dim_of(hf)
    num_kv_heads = getattr(hf, "num_key_value_heads", None)
    common = {
        "num_heads": num_heads,
        "num_kv_heads": num_heads if num_kv_heads is None else num_kv_heads,
        "head_dim": head_dim,
        "scale": head_dim**-0.5,
        "rope": rope_from_hf(hf, head_dim) if rope is None else rope,
    }
    return AttentionSpec(**(common | changes))


ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "xielu": "xielu",
}


def activation_of(hf: Any, name: str = "hidden_act") -> str:
    """The config's activation, as `MlpSpec.activation`. Raises ConfigError if it is unsupported."""
    expect(hf, name, *ACTIVATIONS)
    return ACTIVATIONS[getattr(hf, name)]


def common_window(hf: Any) -> int:
    """Size of the sliding window of all layers, in tokens; 0: none."""
    return getattr(hf, "sliding_window", None) or 0


def window_of(hf: Any, layer: int) -> int:
    """Size of a layer's sliding window, in tokens; 0: none. For models that read `layer_types`.

    Raises ConfigError for other layer types, and for a sliding layer without a window.
    """
    kinds = hf.layer_types
    if kinds[layer] not in ("full_attention", "sliding_attention"):
        raise ConfigError(f"{hf.model_type}: layer_types has {kinds[layer]!r}: not supported")
    if kinds[layer] == "full_attention":
        return 0
    if not hf.sliding_window:
        raise ConfigError(
            f"{hf.model_type}: layer_types has 'sliding_attention', but sliding_window is "
            f"{hf.sliding_window!r}"
        )
    window: int = hf.sliding_window
    return window


def rope_from_hf(hf: Any, head_dim: int, kind: str | None = None) -> RopeSpec:
    """RopeSpec of a config. kind: the layer type, in configs with RoPE parameters per layer type.

    "dynamic" scaling has no effect within the context length. "longrope" has two sets of
    frequencies: the long set for contexts longer than the original one, the short set for others.
    """
    rope = _rope_parameters(hf, kind)
    scaling, theta = rope.get("rope_type", "default"), rope["rope_theta"]
    share = rope.get("partial_rotary_factor", 1.0)
    if share != 1.0 and hf.model_type not in PARTIAL:  # transformers ignores the field or fails
        raise ConfigError(
            f"{hf.model_type}: partial_rotary_factor={share!r} is not supported (supported: 1.0)"
        )
    for name, value, most in (("partial_rotary_factor", share, 1), ("rope_theta", theta, math.inf)):
        if not 0 < value <= most:
            raise ConfigError(f"{hf.model_type}: {name} must be in (0, {most}], got {value!r}")
    rotary_dim = int(head_dim * share)
    if scaling in ("default", "dynamic"):
        return rope_from_base(theta, rotary_dim)
    if scaling not in ROPE_SCALINGS:
        supported = ", ".join(map(repr, ("default", "dynamic", *ROPE_SCALINGS)))
        raise ConfigError(
            f"{hf.model_type}: rope_type={scaling!r} is not supported (supported: {supported})"
        )
    if scaling == "longrope":
        _check_factors(hf, rope, rotary_dim // 2)
    rotation = Rotation(theta, rotary_dim, hf.max_position_embeddings, rope)
    scaled = ROPE_SCALINGS[scaling](rotation)
    spec = RopeSpec(tuple(scaled.frequencies.tolist()), scaled.scale)
    if scaling != "longrope":
        return spec
    length = rotation.original_length
    short = longrope(replace(rotation, max_position=length)).frequencies
    return replace(spec, short_frequencies=tuple(short.tolist()), original_length=length)


def _check_factors(hf: Any, rope: dict[str, Any], count: int) -> None:
    for name in ("short_factor", "long_factor"):
        if len(rope[name]) != count:
            raise ConfigError(
                f"{hf.model_type}: {name} has {len(rope[name])} numbers and must have {count}, "
                "one for each pair of rotated dimensions"
            )


def _rope_parameters(hf: Any, kind: str | None) -> dict[str, Any]:
    """The RoPE parameters of a layer type, or of all layers.

    Raises ConfigError for parameters that transformers would not read.
    """
    given = hf.rope_parameters
    rope = dict(given if kind is None else given[kind])
    if kind is not None:
        beside = [name for name, value in given.items() if not isinstance(value, dict | None)]
        if beside:
            raise ConfigError(
                f"{hf.model_type}: rope_parameters has {beside[0]}={given[beside[0]]!r} for all "
                "layers, which is not supported; give the parameters of each layer type"
            )
        # transformers reads `truncate` only if all layers have the same parameters.
        rope.pop("truncate", None)
    elif getattr(hf, "original_max_position_embeddings", None) is not None:
        rope["original_max_position_embeddings"] = hf.original_max_position_embeddings
    old, new = rope.get("type"), rope.get("rope_type", "default")
    if old not in (None, new, "mrope"):  # the sections of mrope do not matter for text
        raise ConfigError(
            f"{hf.model_type}: RoPE parameters have type={old!r} and rope_type={new!r}; "
            "leave out type"
        )
    return rope


def rope_from_base(base: float, rotary_dim: int) -> RopeSpec:
    """RopeSpec of unscaled frequencies."""
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.int64).float() / rotary_dim
    return RopeSpec(tuple((1.0 / (base**exponents)).tolist()))
