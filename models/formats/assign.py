"""Adds to a ModelSpec which of its matrices are quantised, and in which formats."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from operator import itemgetter

from compiledllm.config import ConfigError
from compiledllm.models.formats.gguf_config import GgufScheme
from compiledllm.models.formats.stored import Scheme
from compiledllm.models.matrices import MixedSpec, QuantSpec
from compiledllm.models.names import NameRules
from compiledllm.models.spec import (
    EMBEDDING,
    EXPERTS,
    TOKEN_PROJECTION,
    TOKEN_TABLE,
    AttentionSpec,
    LayerSpec,
    ModelSpec,
    MoeSpec,
    OpaqueSpec,
)
from compiledllm.models.state_specs import DeltaNetSpec, Mamba2Spec, StateSpec

# Parts that `quantization` leaves in 16 bits: they are small, and decays are exponentials of them.
_NOT_ONLINE = {"attn.qkvzba": {"ba", "b", "a"}, "attn.zxbcdt": {"dt"}}
HEAD = "lm_head"

# Value of the option `quantization` -> how the matrices are kept.
ONLINE = {
    "fp8": QuantSpec("fp8", online="fp8"),
    "fp8_block": QuantSpec("fp8", 128, 128, online="fp8_block"),
    "int8": QuantSpec("int8", online="int8"),
    "int4": QuantSpec("int4", 128, scale_dtype="bfloat16", online="int4"),
}


def quantized_online(spec: ModelSpec, method: str) -> ModelSpec:
    """The spec with all matrices of the blocks quantised while loading; the head stays as it is."""

    def quantized(layer: LayerSpec) -> LayerSpec:
        formats = {path: _online(path, parts, method) for path, parts in parts_of(layer).items()}
        return replace(layer, formats=tuple(formats.items()))

    layers = tuple(map(quantized, spec.layers))
    return replace(spec, layers=layers, quantization=f"{method}, quantised while loading")


def _online(path: str, parts: Mapping[str, int], method: str) -> QuantSpec | MixedSpec:
    plain = _NOT_ONLINE.get(path, ())
    found = _fused(parts, [None if part in plain else ONLINE[method] for part in parts])
    assert found is not None
    return found


def _fused(
    parts: Mapping[str, int], formats: Sequence[QuantSpec | None]
) -> QuantSpec | MixedSpec | None:
    """The format of a matrix from the formats of its parts."""
    sized = zip(parts.items(), formats, strict=True)
    grouped = itertools.groupby(sized, key=itemgetter(1))
    runs = [(dict(part for part, _ in run), format) for format, run in grouped]
    if len(runs) == 1:
        return formats[0]
    return MixedSpec(tuple((tuple(run), sum(run.values()), format) for run, format in runs))


def quantized_as_stored(
    spec: ModelSpec, scheme: Scheme, rules: NameRules, names: Collection[str]
) -> ModelSpec:
    """The spec with the formats of the checkpoint's matrices.

    names: names of the checkpoint's tensors; empty if they are not known, as without weight files.
    Raises ConfigError if the experts of a layer have different formats.
    """
    known = {name.rpartition(".")[0] for name in names}
    for suffix in scheme.suffixes:
        if suffix.startswith("_"):
            known |= {name.removesuffix(suffix) for name in names}
    reader = _Reader(scheme, rules, known)
    layers = tuple(reader.layer(index, layer) for index, layer in enumerate(spec.layers))
    if spec.tie_word_embeddings and reader.has(HEAD):
        spec = replace(spec, tie_word_embeddings=False)
    paths = [EMBEDDING] if spec.tie_word_embeddings else [EMBEDDING, HEAD]
    paths += [TOKEN_TABLE, TOKEN_PROJECTION] if spec.token_size else []
    found = ((path, reader.format_at(path)) for path in paths)
    formats = tuple((path, format) for path, format in found if format is not None)
    is_quantized = bool(formats) or any(layer.formats for layer in layers)
    title = scheme.title if is_quantized or isinstance(scheme, GgufScheme) else ""
    return replace(spec, layers=layers, formats=formats, quantization=title)


class _Reader:
    """Finds the formats of matrices by the names under which the checkpoint stores their parts.

    known: the checkpoint's matrices by name, without ".weight"; empty if they are not known.
    """

    def __init__(self, scheme: Scheme, rules: NameRules, known: Collection[str]) -> None:
        self._scheme, self._rules, self._known = scheme, rules, known

    def layer(self, index: int, layer: LayerSpec) -> LayerSpec:
        experts = _paths_of_experts(layer)
        formats: dict[str, QuantSpec | MixedSpec] = {}
        for path, parts in parts_of(layer).items():
            where = f"layers.{index}.{path}"
            if (format := self.format_of(where, parts, experts.get(path, 0))) is not None:
                formats[path] = format
        if experts:
            _check_experts(index, *map(formats.get, experts))
        return replace(layer, formats=tuple(formats.items()))

    def format_of(
        self, path: str, parts: Mapping[str, int], experts: int = 0
    ) -> QuantSpec | MixedSpec | None:
        """The format of a matrix, or of the matrices of all experts; None: not quantised."""
        if experts:
            return self._of_experts(path, parts, experts)
        return _fused(parts, [self._stored(_slot(path, part))[1] for part in parts])

    def format_at(self, path: str) -> QuantSpec | None:
        """The format of a matrix outside the blocks; None: not quantised."""
        return self._stored(_slot_outside(path))[1]

    def has(self, path: str) -> bool:
        """Whether the checkpoint stores the matrix `path`, outside the blocks, quantised."""
        name, format = self._stored(_slot_outside(path))
        return format is not None and name in self._known

    def _of_experts(self, path: str, parts: Iterable[str], count: int) -> QuantSpec | None:
        """The format that all parts of all experts share; None: not quantised.

        The op of experts multiplies inputs in their own order. As files with desc_act may hold them
        in order, the `MatrixSlot` refuses those that do not.
        """
        slots = [_slot(f"{path}.{expert}", part) for expert in range(count) for part in parts]
        first, format = self._stored(slots[0])
        for name, other in map(self._stored, slots):
            if other != format:
                raise ConfigError(
                    f"'{first}' ({_title(format)}) and '{name}' ({_title(other)}) are one matrix "
                    "here and must be quantised alike: use another checkpoint, or change the "
                    "quantization_config if the weights are in fact alike"
                )
        return None if format is None else replace(format, is_permuted=False)

    def _stored(self, slot: str) -> tuple[str, QuantSpec | None]:
        """The matrix's name in the checkpoint, and its format."""
        name = self._name_of(slot)
        stored = self._scheme.stored(name)
        return name, None if stored is None else stored.spec

    def _name_of(self, slot: str) -> str:
        """The name under which the checkpoint stores the matrix, of several possible names."""
        names = [s.removesuffix(".weight") for s in self._rules.sources_of(slot)] or [slot]
        return next((name for name in names if name in self._known), names[0])


def _slot_outside(path: str) -> str:
    return path if path in (EMBEDDING, TOKEN_TABLE) else _slot(path, "")


def _slot(path: str, part: str) -> str:
    return f"{path}.weight:{part}" if part else f"{path}.weight"


def parts_of(layer: LayerSpec) -> dict[str, dict[str, int]]:
    """The matrices of a block that may be quantised: path -> part -> number of outputs.

    Routers, and the gates of shared experts, are left out because they are never quantised.
    """
    mlp, hidden = layer.mlp, layer.hidden_size
    if isinstance(mlp, OpaqueSpec):
        return {}
    found = _parts_of_mixer(layer.mixer, hidden) | {"mlp.down": {"": hidden}}
    if isinstance(mlp, MoeSpec) or mlp.gated:
        found["mlp.gate_up"] = dict.fromkeys(("gate", "up"), mlp.intermediate_size)
    else:
        found["mlp.up"] = {"": mlp.intermediate_size}
    if isinstance(mlp, MoeSpec) and mlp.shared_size:
        found["mlp.shared.gate_up"] = dict.fromkeys(("gate", "up"), mlp.shared_size)
        found["mlp.shared.down"] = {"": hidden}
    if layer.experts is not None:
        up = dict.fromkeys(("gate", "up"), layer.experts.intermediate_size)
        found |= {f"{EXPERTS}.gate_up": up, f"{EXPERTS}.down": {"": hidden}}
    if size := layer.token_size:
        found |= {"token_input.gate": {"": size}, "token_input.out": {"": hidden}}
    if rank := layer.laurel_rank:
        found |= {"laurel.left": {"": rank}, "laurel.right": {"": hidden}}
    return found


def _paths_of_experts(layer: LayerSpec) -> dict[str, int]:
    """Paths of the experts' matrices, gate_up and down -> number of experts."""
    at = {"mlp": layer.mlp, EXPERTS: layer.experts}
    path, spec = next(((p, s) for p, s in at.items() if isinstance(s, MoeSpec)), ("", None))
    return (
        {} if spec is None else dict.fromkeys((f"{path}.gate_up", f"{path}.down"), spec.num_experts)
    )


def _parts_of_mixer(mixer: AttentionSpec | StateSpec, hidden: int) -> dict[str, dict[str, int]]:
    out = {"attn.out": {"": hidden}}
    if isinstance(mixer, AttentionSpec):
        return {"attn.qkv": mixer.qkv_parts} | out
    if isinstance(mixer, DeltaNetSpec):
        return {"attn.qkvzba": mixer.input_parts} | out
    if isinstance(mixer, Mamba2Spec):
        return {"attn.zxbcdt": mixer.input_parts} | out
    return {"attn.bcx": {"": 3 * mixer.width}} | out


def _check_experts(
    index: int, gate_up: QuantSpec | MixedSpec | None, down: QuantSpec | MixedSpec | None
) -> None:
    """Raise ConfigError for experts whose two matrices no single op can multiply."""
    assert not isinstance(gate_up, MixedSpec) and not isinstance(down, MixedSpec)
    codes = [None if format is None else format.code for format in (gate_up, down)]
    if codes[0] != codes[1]:
        raise ConfigError(
            f"layer {index}: the experts' gate and up ({_title(gate_up)}) and down "
            f"({_title(down)}) must be quantised alike: use another checkpoint"
        )


def _title(format: QuantSpec | None) -> str:
    return "not quantised" if format is None else format.title
