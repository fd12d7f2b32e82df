"""Reading transformers configs: what every family needs, and refusing what none supports."""

from __future__ import annotations

from typing import Any

from compiledllm.config import ConfigError
from compiledllm.models.spec import RopeScaling, RopeSpec


def expect(hf: Any, name: str, *allowed: object) -> None:
    """Refuse to load a config whose field has a value the family does not implement."""
    value = getattr(hf, name, None)
    if value not in allowed:
        raise ConfigError(
            f"{hf.model_type}: {name}={value!r} is not supported "
            f"(supported: {', '.join(map(repr, allowed))})"
        )


def dtype_of(hf: Any) -> str:
    """The checkpoint's dtype as a name; float32 when the config does not say."""
    dtype = getattr(hf, "dtype", None)
    return str(dtype).removeprefix("torch.") if dtype is not None else "float32"


def eos_token_ids(hf: Any) -> tuple[int, ...]:
    eos = getattr(hf, "eos_token_id", None)
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, (list, tuple)) else (eos,)


def rope_from_hf(hf: Any, head_dim: int) -> RopeSpec:
    """RopeSpec of a config with one set of rotary parameters for all layers."""
    rope = dict(hf.rope_parameters)
    kind = rope.pop("rope_type", "default")
    theta = rope.pop("rope_theta")
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(f"{hf.model_type}: partial_rotary_factor other than 1 is not supported")
    if kind == "default":
        return RopeSpec(theta, head_dim)
    if kind == "linear":
        return RopeSpec(theta, head_dim, RopeScaling("linear", rope["factor"]))
    if kind == "llama3":
        scaling = RopeScaling(
            "llama3",
            rope["factor"],
            rope["low_freq_factor"],
            rope["high_freq_factor"],
            rope["original_max_position_embeddings"],
        )
        return RopeSpec(theta, head_dim, scaling)
    raise ConfigError(
        f"{hf.model_type}: rope_type={kind!r} is not supported "
        "(supported: 'default', 'linear', 'llama3')"
    )
