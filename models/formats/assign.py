"""Writes into a ModelSpec which of its matrices are quantised, and how they are kept."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from compiledllm.config import ConfigError
from compiledllm.models.formats.stored import Scheme
from compiledllm.models.matrices import QuantSpec
from compiledllm.models.names import NameRules
from compiledllm.models.spec import LayerSpec, ModelSpec, MoeSpec, OpaqueSpec

# Path of a matrix within a block -> the parts that it is fused of. Router and gate of a shared
# expert are left out: they are never quantised.
_ATTENTION = {"attn.qkv": ("q", "k", "v"), "attn.out": ("",)}
_GATE_UP = ("gate", "up")
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
        return replace(layer, formats=tuple((path, ONLINE[method]) for path in _parts_of(layer)))

    layers = tuple(map(quantized, spec.layers))
    return replace(spec, layers=layers, quantization=f"{method}, quantised while loading")


def quantized_as_stored(
    spec: ModelSpec, scheme: Scheme, rules: NameRules, names: Collection[str]
) -> ModelSpec:
    """The spec with the formats of the checkpoint's matrices.

    names: names of the checkpoint's tensors; empty if they are not known. Raises ConfigError if the
    parts of a fused matrix have different formats.
    """
    known = {name.rpartition(".")[0] for name in names}
    reader = _Reader(scheme, rules, known)
    layers = tuple(reader.layer(index, layer) for index, layer in enumerate(spec.layers))
    head = None if spec.tie_word_embeddings else reader.format_of(HEAD, ("",))
    formats = () if head is None else ((HEAD, head),)
    is_quantized = bool(formats) or any(layer.formats for layer in layers)
    title = scheme.title if is_quantized else ""
    return replace(spec, layers=layers, formats=formats, quantization=title)


class _Reader:
    """Finds the formats of matrices by the names under which the checkpoint stores their parts.

    known: the checkpoint's matrices by name, without ".weight"; empty if they are not known.
    """

    def __init__(self, scheme: Scheme, rules: NameRules, known: Collection[str]) -> None:
        self._scheme, self._rules, self._known = scheme, rules, known

    def layer(self, index: int, layer: LayerSpec) -> LayerSpec:
        experts = layer.mlp.num_experts if isinstance(layer.mlp, MoeSpec) else 0
        formats: dict[str, QuantSpec] = {}
        for path, parts in _parts_of(layer).items():
            is_expert = experts > 0 and path in ("mlp.gate_up", "mlp.down")
            count = range(experts) if is_expert else None
            format = self.format_of(f"layers.{index}.{path}", parts, count)
            if format is not None:
                formats[path] = format
        if experts:
            _check_experts(index, formats)
        return replace(layer, formats=tuple(formats.items()))

    def format_of(
        self, path: str, parts: tuple[str, ...], experts: range | None = None
    ) -> QuantSpec | None:
        """The format that all parts, and all experts, of a matrix share; None: not quantised."""
        middles = [""] if experts is None else [f".{expert}" for expert in experts]
        suffixes = [f":{part}" if part else "" for part in parts]
        first: tuple[str, QuantSpec | None] | None = None
        for slot in (f"{path}{middle}.weight{suffix}" for middle in middles for suffix in suffixes):
            name = self._name_of(slot)
            stored = self._scheme.stored(name)
            format = None if stored is None else stored.spec
            if first is not None and first[1] != format:
                raise ConfigError(
                    f"'{first[0]}' ({_title(first[1])}) and '{name}' ({_title(format)}) are one "
                    "matrix here and must be quantised alike: use another checkpoint, or change "
                    "the quantization_config if the weights are in fact alike"
                )
            first = first or (name, format)
        return None if first is None else first[1]

    def _name_of(self, slot: str) -> str:
        """The name under which the checkpoint stores the matrix, of several possible names."""
        names = [s.removesuffix(".weight") for s in self._rules.sources_of(slot)] or [slot]
        return next((name for name in names if name in self._known), names[0])


def _parts_of(layer: LayerSpec) -> dict[str, tuple[str, ...]]:
    """Path -> parts of the matrices of a block that may be quantised."""
    if isinstance(layer.mlp, OpaqueSpec):
        return {}
    found = dict(_ATTENTION)
    if isinstance(layer.mlp, MoeSpec) or layer.mlp.gated:
        found["mlp.gate_up"] = _GATE_UP
    else:
        found["mlp.up"] = ("",)
    found["mlp.down"] = ("",)
    if isinstance(layer.mlp, MoeSpec) and layer.mlp.shared_size:
        found |= {"mlp.shared.gate_up": _GATE_UP, "mlp.shared.down": ("",)}
    return found


def _check_experts(index: int, formats: dict[str, QuantSpec]) -> None:
    """Raise ConfigError for experts whose two matrices no single op can multiply."""
    gate_up, down = formats.get("mlp.gate_up"), formats.get("mlp.down")
    codes = [None if format is None else format.code for format in (gate_up, down)]
    if codes[0] != codes[1]:
        raise ConfigError(
            f"layer {index}: the experts' gate and up ({_title(gate_up)}) and down "
            f"({_title(down)}) must be quantised alike: use another checkpoint"
        )
    if any(format is not None and format.is_permuted for format in (gate_up, down)):
        raise ConfigError(
            f"layer {index}: desc_act (act order) is not supported for experts; use a checkpoint "
            "without"
        )


def _title(format: QuantSpec | None) -> str:
    if format is None:
        return "not quantised"
    group = f" in groups of {format.group}" if format.group else ""
    zeros = ", asymmetric" if format.has_zeros else ""
    return f"{format.code}{group}{zeros}"
