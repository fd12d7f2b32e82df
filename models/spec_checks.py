"""Refuses specs whose numbers do not fit together; errors use the names of the config's fields.

Without these checks, such models would fail in the middle of a start, or give wrong results.
"""

from __future__ import annotations

from collections.abc import Iterator

from compiledllm.config import ConfigError
from compiledllm.models.spec import AttentionSpec, LayerSpec, MlpSpec, ModelSpec, MoeSpec
from compiledllm.models.state_specs import ConvSpec, DeltaNetSpec, Mamba2Spec

Requirement = tuple[bool, str]  # whether the requirement holds, and the error if it does not


def check_spec(spec: ModelSpec) -> None:
    """Raise ConfigError for the first requirement that does not hold."""
    requirements = [_is_number("logit_scale", spec.logit_scale)]
    requirements += [each for layer in spec.distinct_layers for each in _of_layer(layer)]
    for holds, text in requirements:
        if not holds:
            raise ConfigError(f"{spec.architecture}: {text}")


def _of_layer(layer: LayerSpec) -> Iterator[Requirement]:
    mixer = layer.mixer
    if isinstance(mixer, AttentionSpec):
        yield from _of_attention(mixer)
    else:
        yield from _of_state(mixer)
    for mlp in (layer.mlp, layer.experts):
        if isinstance(mlp, MlpSpec | MoeSpec):
            size = mlp.intermediate_size
            yield size >= 1, f"intermediate_size of an MLP must be at least 1, got {size}"
        if isinstance(mlp, MoeSpec):
            yield from _of_experts(mlp)
    yield _is_number("the eps of norms", layer.norm.eps)


def _of_attention(attention: AttentionSpec) -> Iterator[Requirement]:
    yield _divides(
        ("num_key_value_heads", attention.num_kv_heads),
        ("num_attention_heads", attention.num_heads),
    )
    window = attention.sliding_window
    is_size = isinstance(window, int) and window >= 0
    yield is_size, f"sliding_window={window} must be a number of tokens"
    head_dim = attention.head_dim
    yield (
        attention.rope.rotary_dim <= head_dim,
        f"heads have {head_dim} dimensions, and rotary embedding needs an even number; check "
        "head_dim, or hidden_size and num_attention_heads",
    )


def _of_state(state: DeltaNetSpec | ConvSpec | Mamba2Spec) -> Iterator[Requirement]:
    size = state.kernel_size
    yield size > 1, f"a convolution over {size} tokens is not supported; there must be at least 2"
    if isinstance(state, DeltaNetSpec):
        yield _divides(
            ("linear_num_key_heads", state.num_key_heads),
            ("linear_num_value_heads", state.num_value_heads),
        )
    if isinstance(state, Mamba2Spec):
        yield _divides(("mamba_n_groups", state.num_groups), ("mamba_n_heads", state.num_heads))


def _of_experts(moe: MoeSpec) -> Iterator[Requirement]:
    count, groups, chosen = moe.num_experts, moe.router.num_groups, moe.router.top_groups
    yield count >= 1, f"number of experts must be at least 1, got {count}"
    yield _within("number of experts per token", moe.top_k, count, "the number of experts")
    yield _divides(("n_group", groups), ("number of experts", count))
    yield _within("topk_group", chosen, groups, "n_group")
    size = count // max(groups, 1)
    yield (
        groups == 1 or size > 1,
        f"n_group={groups} makes groups of one of {count} experts, and a group needs two",
    )
    yield _within(
        "number of experts per token", moe.top_k, chosen * size, "the experts of topk_group groups"
    )


def _divides(divisor: tuple[str, int], number: tuple[str, int]) -> Requirement:
    (small, by), (large, size) = divisor, number
    return by >= 1 and size % by == 0, f"{small}={by} must divide {large}={size}"


def _within(name: str, number: int, limit: int, meaning: str) -> Requirement:
    is_within = isinstance(number, int) and 1 <= number <= limit
    return is_within, f"{name} must be in [1, {limit}], {meaning}, got {number}"


def _is_number(name: str, value: object) -> Requirement:
    return isinstance(value, int | float), f"{name} must be a number, got {value!r}"
