"""Fields that transformers' config classes compute from other fields, each class in its own way.

A rule for a model type completes the fields, whose types have been checked. Rules raise `Uncertain`
where versions of transformers differ, or where transformers raises an error.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from compiledllm.models.plain_rope import certain

Fields = dict[str, Any]
Rule = Callable[[Fields], None]
_FULL, _SLIDING = "full_attention", "sliding_attention"
LAYER_TYPES = {_FULL, _SLIDING, "chunked_attention", "linear_attention", "conv"}
# Older names, which some versions of transformers replace and others keep; the family knows both.
OLD_LAYER_TYPES = {"mamba", "attention"}


def complete(model_type: str, fields: Fields) -> None:
    """Compute the missing fields of a model type, and check its layer types."""
    if rule := _RULES.get(model_type):
        rule(fields)
    kinds = fields.get("layer_types")
    if kinds is not None:
        known = LAYER_TYPES | (OLD_LAYER_TYPES if model_type == "granitemoehybrid" else set())
        is_list = isinstance(kinds, list) and all(type(kind) is str for kind in kinds)
        certain(is_list and set(kinds) <= known, "unknown layer types")
        certain(len(kinds) == fields["num_hidden_layers"], "another number of layers")


def _interval(others: str, default: int, field: str = "") -> Rule:
    """A rule: every n-th layer attends to the whole context, the other layers are `others`.

    n is the value of `field`, or `default` if the file does not have the field.
    """

    def rule(fields: Fields) -> None:
        if fields.get("layer_types") is None:
            n = fields.get(field, default)
            certain(type(n) is int and n > 0, f"{field} is no interval")
            count = fields["num_hidden_layers"]
            fields["layer_types"] = [others if (i + 1) % n else _FULL for i in range(count)]

    return rule


def _window(fields: Fields) -> None:
    if not fields["use_sliding_window"]:
        fields["sliding_window"] = None


def _qwen(fields: Fields) -> None:
    """Layers before `max_window_layers` attend to the whole context; the others have the window."""
    _window(fields)
    if fields["layer_types"] is None:
        has_window, first = fields["sliding_window"] is not None, fields["max_window_layers"]
        fields["layer_types"] = [
            _SLIDING if has_window and i >= first else _FULL
            for i in range(fields["num_hidden_layers"])
        ]


def _qwen2_moe(fields: Fields) -> None:
    certain(not fields["use_sliding_window"], "windows")
    fields["sliding_window"] = 0
    if fields.get("layer_types") is None:
        fields["layer_types"] = [_FULL] * fields["num_hidden_layers"]


def _qwen3_vl_moe(fields: Fields) -> None:
    certain(fields.get("sliding_window") is None, "windows")
    fields["sliding_window"] = None


def _qwen3_next(fields: Fields) -> None:
    _interval("linear_attention", 4, "full_attention_interval")(fields)
    fields["mlp_only_layers"] = fields["mlp_only_layers"] or []


def _mistral(fields: Fields) -> None:
    certain("layer_types" not in fields, "transformers reads another type")


def _ministral(fields: Fields) -> None:
    if fields["layer_types"] is None:
        kind = _FULL if fields["sliding_window"] is None else _SLIDING
        fields["layer_types"] = [kind] * fields["num_hidden_layers"]


def _exaone4(fields: Fields) -> None:
    certain(fields["layer_types"] is not None, "layer types from a pattern")


def _smollm3(fields: Fields) -> None:
    """Layers without rotary embedding may have windows."""
    count, interval = fields["num_hidden_layers"], fields["no_rope_layer_interval"]
    if fields["no_rope_layers"] is None:
        certain(interval > 0, "no interval")
        fields["no_rope_layers"] = [int((i + 1) % interval != 0) for i in range(count)]
    certain(len(fields["no_rope_layers"]) >= count, "another number of layers")
    if fields["layer_types"] is None:
        has_window = fields["use_sliding_window"] and fields["sliding_window"] is not None
        rotated = fields["no_rope_layers"][:count]
        fields["layer_types"] = [_SLIDING if has_window and not r else _FULL for r in rotated]


def _gemma(fields: Fields) -> None:
    certain(fields["hidden_act"] != "gelu", "another activation is meant")


def _causal(fields: Fields) -> None:
    certain(fields["use_bidirectional_attention"] not in (True, "all"), "halved windows")


def _gemma3(fields: Fields) -> None:
    _causal(fields)
    _interval(_SLIDING, 6, "sliding_window_pattern")(fields)


def _gemma4(fields: Fields) -> None:
    _causal(fields)
    _interval(_SLIDING, 6)(fields)
    certain(fields["layer_types"][-1:] == [_FULL], "the last layer is changed")
    fields.setdefault("global_head_dim", 512)
    num_heads = fields.setdefault("num_global_key_value_heads", None)
    sizes = [
        fields["global_head_dim"],
        fields["sliding_window"],
        1 if num_heads is None else num_heads,
    ]
    certain(all(type(size) is int and size > 0 for size in sizes), "sizes of heads")


def _gemma3n(fields: Fields) -> None:
    _interval(_SLIDING, 5)(fields)
    count = fields["num_hidden_layers"]
    if type(fields["intermediate_size"]) is int:
        fields["intermediate_size"] = [fields["intermediate_size"]] * count
    if fields["activation_sparsity_pattern"] is None:
        sparse = 10 if count > 10 else 0
        fields["activation_sparsity_pattern"] = [0.95] * sparse + [0.0] * (count - sparse)
    for name in ("intermediate_size", "activation_sparsity_pattern"):
        values = fields[name]
        certain(isinstance(values, list) and len(values) == count, f"{name} of other layers")


def _with_eos(fields: Fields) -> None:
    certain(fields["eos_token_id"] is not None, "ids by default")


def _llama4(fields: Fields) -> None:
    count, step = fields["num_hidden_layers"], fields["interleave_moe_layer_step"]
    interval = fields["no_rope_layer_interval"]
    certain(step > 0 and interval > 0, "no interval")
    rotated = [int((i + 1) % interval != 0) for i in range(count)]
    fields["no_rope_layers"] = fields["no_rope_layers"] or rotated
    certain(len(fields["no_rope_layers"]) == count, "another number of layers")
    if fields["moe_layers"] is None:
        fields["moe_layers"] = list(range(step - 1, count, step))
    if fields["layer_types"] is None:
        kinds = ("chunked_attention" if rotates else _FULL for rotates in fields["no_rope_layers"])
        fields["layer_types"] = list(kinds)


def _ernie_moe(fields: Fields) -> None:
    if fields["moe_layer_end_index"] == -1:
        fields["moe_layer_end_index"] = fields["num_hidden_layers"] - 1


def _falcon(fields: Fields) -> None:
    certain(not fields.keys() & {"n_embed", "head_dim"}, "other names")
    if fields["ffn_hidden_size"] is None:
        fields["ffn_hidden_size"] = 4 * fields["hidden_size"]


def _granite_hybrid(fields: Fields) -> None:
    certain("time_step_limit" not in fields, "limits")
    certain(fields["layer_types"] is not None, "layer types by default")
    fields["time_step_limit"] = (0.0, math.inf)
    heads, expand = fields["mamba_n_heads"], fields["mamba_expand"]
    certain(type(heads) is int and type(expand) is int and heads > 0, "sizes of heads")
    size = expand * fields["hidden_size"]
    if fields["mamba_d_head"] == "auto":
        fields["mamba_d_head"] = size // heads
    head_dim = fields["mamba_d_head"]
    certain(type(head_dim) is int and head_dim * heads == size, "sizes of heads")


def _lfm2(fields: Fields) -> None:
    if fields["layer_types"] is None:
        count = fields["num_hidden_layers"]
        attending = fields["full_attn_idxs"]
        attending = range(count) if attending is None else attending
        fields["layer_types"] = [_FULL if i in attending else "conv" for i in range(count)]
    _tied_by_old_name(fields)
    fields["intermediate_size"] = fields.get("block_ff_dim", fields["intermediate_size"])
    certain(type(fields["intermediate_size"]) is int, "block_ff_dim is no size")


def _lfm2_moe(fields: Fields) -> None:
    certain(fields["layer_types"] is not None, "layer types by default")
    _tied_by_old_name(fields)


def _tied_by_old_name(fields: Fields) -> None:
    fields["tie_word_embeddings"] = fields.get("tie_embedding", fields["tie_word_embeddings"])
    certain(type(fields["tie_word_embeddings"]) is bool, "tie_embedding is no boolean")


def _minimax_m2(fields: Fields) -> None:
    """The published config has a number of rotated dimensions instead of their share."""
    if "rotary_dim" in fields:
        size, head_dim = fields["rotary_dim"], fields["head_dim"]
        certain(type(size) is int and 0 < size <= head_dim, "rotary_dim is no size")
        fields.setdefault("partial_rotary_factor", size / head_dim)


_RULES: dict[str, Rule] = {
    "ernie4_5_moe": _ernie_moe,
    "exaone4": _exaone4,
    "falcon": _falcon,
    "gemma": _gemma,
    "gemma2": _interval(_SLIDING, 2),
    "gemma3_text": _gemma3,
    "gemma3n_text": _gemma3n,
    "gemma4_text": _gemma4,
    "gemma4_unified_text": _gemma4,
    "glm": _with_eos,
    "glm4": _with_eos,
    "gpt_oss": _interval(_SLIDING, 2),
    "granitemoehybrid": _granite_hybrid,
    "lfm2": _lfm2,
    "lfm2_moe": _lfm2_moe,
    "llama4_text": _llama4,
    "minimax_m2": _minimax_m2,
    "ministral": _ministral,
    "mistral": _mistral,
    "olmo3": _interval(_SLIDING, 4),
    "qwen2": _qwen,
    "qwen2_5_vl_text": _qwen,
    "qwen2_moe": _qwen2_moe,
    "qwen3": _qwen,
    "qwen3_5_moe_text": _interval("linear_attention", 4, "full_attention_interval"),
    "qwen3_5_text": _interval("linear_attention", 4, "full_attention_interval"),
    "qwen3_moe": _window,
    "qwen3_next": _qwen3_next,
    "qwen3_vl_moe_text": _qwen3_vl_moe,
    "smollm3": _smollm3,
}
