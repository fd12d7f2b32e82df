"""Tensor parallelism: each rank's part of a model is a smaller spec, from which a Decoder is built.

Heads, intermediate sizes, channels and the vocabulary are divided; norms, routers and positions are
not. Every rank has a part of each expert. The first matrix of mixer and MLP is divided by outputs
(column-parallel), the last by inputs (row-parallel), so that mixer and MLP need one sum each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from compiledllm.config import ConfigError
from compiledllm.models.formats.assign import HEAD, parts_of
from compiledllm.models.matrices import Formats, MixedSpec, QuantSpec
from compiledllm.models.mlp_specs import MlpSpec, MoeSpec
from compiledllm.models.spec import EXPERTS, AttentionSpec, LayerSpec, ModelSpec
from compiledllm.models.state_specs import DeltaNetSpec, Mamba2Spec, StateSpec

MAX_RANKS = 64  # the largest number of ranks that error messages propose
_BY_INPUTS = ("attn.out", *(f"{path}.down" for path in ("mlp", "mlp.shared", EXPERTS)))


class _Indivisible(ValueError):
    """The model cannot be divided. The message names the size that the ranks do not divide."""


def sharded(spec: ModelSpec, num_ranks: int) -> ModelSpec:
    """The part of each of `num_ranks` ranks. Raises ConfigError with the numbers that work."""
    if num_ranks == 1:
        return spec
    if spec.implementation == "transformers":
        raise ConfigError(
            f"tensor_parallel_size={num_ranks} is not supported for {spec.architecture} as "
            "transformers runs it; use 1"
        )
    try:
        return _sharded(spec, num_ranks)
    except _Indivisible as obstacle:
        counts = (n for n in range(1, MAX_RANKS + 1) if n == 1 or can_shard(spec, n))
        raise ConfigError(
            f"tensor_parallel_size={num_ranks} does not divide {obstacle} of {spec.architecture}; "
            f"use one of {', '.join(map(str, counts))}"
        ) from None


def can_shard(spec: ModelSpec, num_ranks: int) -> bool:
    try:
        _sharded(spec, num_ranks)
    except _Indivisible:
        return False
    return True


def _sharded(spec: ModelSpec, num_ranks: int) -> ModelSpec:
    defers = _can_defer_sums(spec)
    parts = {layer: _layer(layer, num_ranks, defers) for layer in spec.distinct_layers}
    layers = tuple(parts[layer] for layer in spec.layers)
    part = replace(spec, layers=layers, num_ranks=num_ranks, part_of=spec)
    head = {HEAD: {"": part.vocab_rows}}
    return replace(part, formats=_formats(spec.formats, head, {}))


def _can_defer_sums(spec: ModelSpec) -> bool:
    """Whether an RMSNorm follows each sum over ranks, with only the residual addition between."""
    norms = {spec.final_norm.kind, *(layer.norm.kind for layer in spec.layers)}
    is_plain = all(
        layer.residual == "pre"
        and layer.residual_scale == 1
        and layer.num_streams == 1
        and not (layer.experts or layer.token_size or layer.has_scalar)
        for layer in spec.layers
    )
    is_embedded_plainly = not (spec.embedding_size or spec.num_learned_positions)
    return is_plain and is_embedded_plainly and norms <= {"rms", "rms_plus_one"}


def _layer(layer: LayerSpec, num_ranks: int, defers_sum: bool) -> LayerSpec:
    part = replace(
        layer,
        mixer=_mixer(layer.mixer, num_ranks),
        mlp=_mlp(layer.mlp, num_ranks),
        experts=None if layer.experts is None else _experts(layer.experts, num_ranks),
        num_ranks=num_ranks,
        defers_sum=defers_sum,
        formats=(),
    )
    inputs = {m.name: m.num_inputs for m in part.weights.matrices if m.name in _BY_INPUTS}
    whole = {m.name: m.num_inputs for m in layer.weights.matrices}
    sizes = {name: (size, whole[name]) for name, size in inputs.items()}
    return replace(part, formats=_formats(layer.formats, parts_of(part), sizes))


def _mixer(mixer: AttentionSpec | StateSpec, num_ranks: int) -> AttentionSpec | StateSpec:
    if isinstance(mixer, AttentionSpec):
        return _attention(mixer, num_ranks)
    if isinstance(mixer, DeltaNetSpec):
        return replace(
            mixer,
            num_key_heads=_part(
                "key heads of its linear attention", mixer.num_key_heads, num_ranks
            ),
            num_value_heads=mixer.num_value_heads // num_ranks,
        )
    if isinstance(mixer, Mamba2Spec):  # heads share b, c and the norm of their outputs
        raise _Indivisible("the groups of Mamba-2 layers")
    return replace(mixer, width=_part("channels of its convolutions", mixer.width, num_ranks))


def _attention(attention: AttentionSpec, num_ranks: int) -> AttentionSpec:
    """A rank's heads. With fewer KV heads than ranks, neighbouring ranks hold the same KV head."""
    num_heads = _part("attention heads", attention.num_heads, num_ranks)
    num_kv_heads, replicas = attention.num_kv_heads, 1
    if num_kv_heads < num_ranks and num_ranks % num_kv_heads == 0:
        num_kv_heads, replicas = 1, num_ranks // num_kv_heads
    else:
        num_kv_heads = _part("KV heads", num_kv_heads, num_ranks)
    return replace(attention, num_heads=num_heads, num_kv_heads=num_kv_heads, kv_replicas=replicas)


def _mlp(mlp: object, num_ranks: int) -> MlpSpec | MoeSpec:
    assert isinstance(mlp, MlpSpec | MoeSpec), mlp
    if isinstance(mlp, MoeSpec):
        return _experts(mlp, num_ranks)
    size = _part("intermediate size", mlp.intermediate_size, num_ranks)
    return replace(mlp, intermediate_size=size)


def _experts(moe: MoeSpec, num_ranks: int) -> MoeSpec:
    size = _part("the experts' intermediate size", moe.intermediate_size, num_ranks)
    shared = _part("the shared expert's intermediate size", moe.shared_size, num_ranks)
    return replace(moe, intermediate_size=size, shared_size=shared)


def _part(what: str, size: int, num_ranks: int) -> int:
    if size % num_ranks:
        raise _Indivisible(f"{size} ({what})")
    return size // num_ranks


def _formats(
    formats: Formats,
    parts: Mapping[str, Mapping[str, int]],
    inputs: Mapping[str, tuple[int, int]],
) -> Formats:
    """The formats of a rank's matrices.

    parts: matrix -> part -> the rank's number of outputs. inputs: matrix that is divided by inputs
    -> the rank's number of inputs and that of all ranks.
    """
    found: list[tuple[str, QuantSpec | MixedSpec]] = []
    for path, format in formats:
        if isinstance(format, MixedSpec):
            format = MixedSpec(tuple(_run(run, parts[path]) for run in format.runs))
        elif path not in parts:
            pass  # the same on every rank
        elif path in inputs:
            _check_inputs(path, format, *inputs[path])
        else:
            _check_outputs(path, format, parts[path])
        found.append((path, format))
    return tuple(found)


_Run = tuple[tuple[str, ...], int, QuantSpec | None]


def _run(run: _Run, parts: Mapping[str, int]) -> _Run:
    names, _, format = run
    sizes = {name: parts[name] for name in names}
    if format is not None:
        _check_outputs("a fused matrix", format, sizes)
    return names, sum(sizes.values()), format


def _check_inputs(path: str, format: QuantSpec, size: int, of_all: int) -> None:
    """Raise unless a rank's inputs are whole groups."""
    if format.is_permuted:
        raise _Indivisible(f"the reordered groups (desc_act) of {path}")
    group = format.span or format.group_in_memory(of_all)
    if format.group and size % group:
        raise _Indivisible(f"{of_all} inputs of {path} in groups of {group}")


def _check_outputs(path: str, format: QuantSpec, parts: Mapping[str, int]) -> None:
    """Raise _Indivisible if a rank's outputs are not whole blocks of outputs that share scales.

    If a part other than the last is not whole blocks, each output gets scales of its own anyway.
    """
    sizes = [*parts.values()]
    if sizes[-1] % format.rows_in_memory(sizes):
        raise _Indivisible(f"{path} in blocks of {format.rows} outputs")
