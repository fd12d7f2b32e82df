"""RoPE parameters of a config.json that is read as data, in the form that transformers gives them.

Files of transformers 4 have `rope_theta` and `rope_scaling`, files of transformers 5
`rope_parameters`, for all layers or for each layer type. Raises `Uncertain` for whatever
transformers would complete, convert or refuse in another way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Uncertain(Exception):
    """transformers has to read the config."""


Rope = dict[str, Any]

_WITHOUT_ROPE = {"gpt2", "opt"}
# Models that may rotate a share of a head's dimensions only -> the default share.
PARTIAL = {
    **dict.fromkeys(("glm", "glm4", "glm4_moe", "glm4v_moe_text", "phi"), 0.5),
    **dict.fromkeys(("gpt_neox", "stablelm", "qwen3_next", "qwen3_5_text"), 0.25),
    "qwen3_5_moe_text": 0.25,
    **dict.fromkeys(("glm4v_text", "minimax_m2", "phi3"), 1.0),
}
# Models with RoPE parameters per layer type -> the default bases of full and sliding attention.
_BASES = {
    "gemma3_text": (1_000_000.0, 10_000.0),
    "gemma3n_text": (1_000_000.0, 10_000.0),
    "olmo3": (500_000.0, 500_000.0),
}
_LISTED_BY_LAYER_TYPE = {"gemma4_text", "gemma4_unified_text"}
_SCALED_BY_DEFAULT = {"apertus", "gpt_oss", "ministral3"}
# Types of scaling -> the parameters that they need.
_NEEDED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
    "proportional": ("partial_rotary_factor",),
}
_OPTIONAL = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
_LENGTH = "original_max_position_embeddings"


def certain(is_certain: object, doubt: str) -> None:
    """Raise Uncertain, with the doubt as its message, unless `is_certain`."""
    if not is_certain:
        raise Uncertain(doubt)


def is_number(value: object) -> bool:
    return type(value) in (int, float)


def rope_parameters(model_type: str, fields: Mapping[str, Any], base: float | None) -> Rope | None:
    """The parameters of all layers, or of each layer type; None for models without RoPE.

    fields: the file's fields, with the config class's defaults. base: the default `rope_theta`.
    """
    if model_type in _WITHOUT_ROPE:
        return None
    given = [fields.get("rope_scaling"), fields.get("rope_parameters")]
    certain(all(isinstance(rope, dict | None) for rope in given), "no object")
    certain(all(None not in (rope or {}).values() for rope in given), "null among the parameters")
    given = [rope or None for rope in given]
    certain(None in given, "two sets of parameters")
    if model_type in _LISTED_BY_LAYER_TYPE or model_type in _BASES:
        return _by_layer_type(model_type, fields, *given)
    rope = given[0] or given[1]
    certain(rope or model_type not in _SCALED_BY_DEFAULT, "scaled by default")
    return _checked(model_type, _flat(model_type, fields, rope or {}, base), fields)


def _flat(model_type: str, fields: Mapping[str, Any], given: Rope, base: float | None) -> Rope:
    rope = dict(given)
    kind = rope.get("rope_type", rope.get("type", "default"))
    certain(rope.get("type", kind) == kind, "two types")
    if model_type == "qwen2_5_vl_text" and kind == "mrope":
        kind = "default"
    rope["rope_type"] = kind
    names = ("rope_theta", "partial_rotary_factor")
    if model_type == "gpt_neox":
        certain(not fields.keys() & set(names), "names of other models")
        names = ("rotary_emb_base", "rotary_pct")
    rope["rope_theta"] = _given_once(rope.get("rope_theta"), fields, names[0], base)
    share = rope.get("partial_rotary_factor")
    partial = _given_once(share, fields, names[1], PARTIAL.get(model_type))
    if partial is not None:
        rope["partial_rotary_factor"] = partial
    if kind in ("llama3", "yarn", "longrope") and _LENGTH in fields:
        certain(model_type == "phi3", f"{_LENGTH} outside of the parameters")
        rope[_LENGTH] = fields["original_max_position_embeddings"]
    return rope


def _given_once(inside: Any, fields: Mapping[str, Any], name: str, default: Any) -> Any:
    """The value inside the RoPE parameters, or the config's field `name`, or the default."""
    if name not in fields:
        return default if inside is None else inside
    certain(inside is None or inside == fields[name], f"two values of {name}")
    certain(fields[name] is not None, f"{name} is null")
    return fields[name]


def _by_layer_type(
    model_type: str, fields: Mapping[str, Any], scaling: Rope | None, listed: Rope | None
) -> Rope:
    kinds = ("full_attention", "sliding_attention")
    certain({*kinds} <= {*fields["layer_types"]}, "layers of one type only")
    old = ("rope_theta", "rope_local_base_freq", "partial_rotary_factor", _LENGTH)
    if listed is not None:
        certain(listed.keys() == {*kinds} and not fields.keys() & {*old}, "parameters in two forms")
        ropes = [listed[kind] for kind in kinds]
        certain(
            all(isinstance(r, dict) and {"rope_type", "rope_theta"} <= r.keys() for r in ropes), ""
        )
        return {k: _checked(model_type, r, fields) for k, r in zip(kinds, ropes, strict=True)}
    certain(model_type in _BASES and not fields.keys() & {*old[2:]}, "default parameters")
    certain(scaling is None or "rope_type" in scaling, "no type")
    names, bases = old[:2], _BASES[model_type]
    certain(model_type != "olmo3" or fields.get("rope_theta") == bases[0], "base of one type")
    if model_type == "olmo3":
        names = ("rope_theta", "rope_theta")
    ropes = [scaling or {}, {}]
    found = {}
    for kind, rope, name, base in zip(kinds, ropes, names, bases, strict=True):
        theta = _given_once(rope.get("rope_theta"), fields, name, base)
        full = {"rope_type": "default"} | rope | {"rope_theta": theta}
        found[kind] = _checked(model_type, full, fields)
    return found


def _checked(model_type: str, rope: Rope, fields: Mapping[str, Any]) -> Rope:
    kind = rope["rope_type"]
    certain(isinstance(kind, str) and kind in _NEEDED, "unknown type")
    certain(model_type != "phi3" or kind in ("default", "longrope"), "not of Phi-3")
    certain(kind != "proportional" or model_type in _LISTED_BY_LAYER_TYPE, "not of Gemma 4")
    numbers = ["rope_theta", *(n for n in _NEEDED[kind] if not n.startswith(("short", "long")))]
    numbers += [name for name in (*_OPTIONAL, "partial_rotary_factor", "alpha") if name in rope]
    certain(
        all(is_number(rope.get(n)) and rope[n] > 0 for n in numbers), "a parameter is no number"
    )
    certain(rope.get("partial_rotary_factor", 1) <= 1, "more dimensions than there are")
    certain(type(rope.get(_LENGTH, 1)) is int, f"{_LENGTH} is no integer")
    certain(type(rope.get("truncate", True)) is bool, "truncate is no boolean")
    certain(
        "llama_4_scaling_beta" not in rope or is_number(rope["llama_4_scaling_beta"]), "no number"
    )
    if kind == "longrope":
        _check_factors(rope, fields)
    return rope


def _check_factors(rope: Rope, fields: Mapping[str, Any]) -> None:
    head_dim = fields["hidden_size"] // fields["num_attention_heads"]
    certain((fields.get("head_dim") or head_dim) == head_dim, "heads of another size")
    size = int(head_dim * rope.get("partial_rotary_factor", 1.0)) // 2
    for name in ("short_factor", "long_factor"):
        factors: Any = rope.get(name)
        is_list = isinstance(factors, list) and all(map(is_number, factors))
        certain(is_list and len(factors) == size and all(f > 0 for f in factors), f"{name}")
