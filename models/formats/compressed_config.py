"""Reads the quantization_config of compressed-tensors (llm-compressor).

The config divides the modules into groups, and each group has a format of its own.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from compiledllm.models.formats.codes import QuantizedMatrix, expect_shape
from compiledllm.models.formats.compressed_tensors import (
    MXFP4_GROUP,
    NVFP4_GROUP,
    from_float_quantized,
    from_int_quantized,
    from_mxfp4_pack_quantized,
    from_nvfp4_pack_quantized,
    from_pack_quantized,
)
from compiledllm.models.formats.fp8 import BLOCK
from compiledllm.models.formats.stored import (
    Fields,
    Scheme,
    Stored,
    expression_of,
    is_embedding,
    matches,
    runs_of,
)
from compiledllm.models.matrices import QuantSpec

NVFP4 = QuantSpec("fp4", NVFP4_GROUP, scale_dtype="float8_e4m3fn", has_row_factor=True)
MXFP4 = QuantSpec("fp4", MXFP4_GROUP, scale_dtype="float8_e8m0fnu")
_UNUSED = (
    *(".input_scale", ".input_zero_point", ".input_global_scale", ".input_g_idx"),
    *(".output_scale", ".output_zero_point", ".k_scale", ".v_scale"),
)
_FORMATS = (
    "pack-quantized",
    "int-quantized",
    "naive-quantized",
    "float-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
)


def compressed_tensors(fields: Fields, scale_dtype: str) -> Scheme:
    """The scheme of the config's groups; modules in no group are not quantised.

    Groups without weights say how activations were quantised, such as those of attention.
    scale_dtype: a name in torch, for formats in which files store scales in any floating dtype.
    """
    fields.expect("quantization_status", "compressed", "frozen", default="compressed")
    for name in ("sparsity_config", "transform_config"):
        value = fields.get(name)
        is_dense = isinstance(value, dict) and value.get("format") == "dense"
        if value and not (name == "sparsity_config" and is_dense):
            raise fields.refusal(name, value, "use a checkpoint without this field")
    groups = [
        (tuple(group.names("targets")), _make_stored(group, fields, scale_dtype))
        for group in fields.section("config_groups").sections().values()
        if group.get("weights") is not None or group.get("format") not in (None, "dense")
    ]
    titles = dict.fromkeys(format.spec.title for _, format in groups)
    title = f"compressed-tensors {' and '.join(titles)}"
    return _Groups(title, tuple(groups), tuple(fields.names("ignore")))


@dataclass(frozen=True)
class _Groups:
    title: str
    groups: tuple[tuple[tuple[str, ...], Stored], ...]
    ignored: tuple[str, ...]

    @property
    def suffixes(self) -> tuple[str, ...]:
        return tuple(suffix for _, format in self.groups for suffix in format.suffixes)

    def stored(self, name: str) -> Stored | None:
        if matches(name, self.ignored):
            return None
        by_name, by_pattern = self._targets
        found = (by_name[run] for run in runs_of(name) if run in by_name)
        matching = (format for pattern, format in by_pattern if pattern.match(name))
        kind = "Embedding" if is_embedding(name) else "Linear"
        return next(found, None) or next(matching, None) or by_name.get(kind)

    @functools.cached_property
    def _targets(self) -> tuple[dict[str, Stored], list[tuple[re.Pattern[str], Stored]]]:
        """Names and classes -> formats, and (pattern, format) pairs in alphabetical order.

        As in the library, names take precedence over patterns and patterns over classes, whichever
        groups they are in. If several groups have the same target, the last group counts.
        """
        found = {target: format for targets, format in self.groups for target in targets}
        patterns = ((expression_of(target), found[target]) for target in sorted(found))
        by_pattern = [(pattern, format) for pattern, format in patterns if pattern is not None]
        return {t: f for t, f in found.items() if expression_of(t) is None}, by_pattern


def _make_stored(group: Fields, fields: Fields, scale_dtype: str) -> Stored:
    format = group.get("format") or fields.get("format")
    weights = group.section("weights")
    if format not in _FORMATS:
        raise group.refusal("format", format, f"supported: {', '.join(_FORMATS)}")
    kind = weights.expect("type", "int", "float", default="int")
    if weights.get("dynamic"):
        raise weights.refusal("dynamic", weights.get("dynamic"), "supported: false")
    if format == "nvfp4-pack-quantized":
        return _fp4(weights, NVFP4)
    if format == "mxfp4-pack-quantized":
        return _fp4(weights, MXFP4)
    if format == "pack-quantized":
        return _pack_quantized(weights, scale_dtype)
    is_float = format == "float-quantized" or (format == "naive-quantized" and kind == "float")
    if is_float:
        weights.expect("num_bits", 8)
        return _float_quantized(weights, scale_dtype)
    return _int_quantized(weights, scale_dtype)


def _bits_of_integers(weights: Fields, default: int) -> int:
    num_bits = weights.integer("num_bits", default=default)
    if not 1 <= num_bits <= 8:
        raise weights.refusal("num_bits", num_bits, "supported: 1 to 8")
    return num_bits


def _group_of(weights: Fields) -> int:
    """Number of inputs that share a scale; 0: all."""
    if weights.expect("strategy", "tensor", "channel", "group") != "group":
        return 0
    if weights.get("group_size") is None:
        raise weights.refusal("group_size", None, "strategy 'group' needs it")
    return weights.group("group_size", default=-1)


def _check_scales(strategy: str, scale: Tensor, weight: Tensor) -> None:
    """Raise ValueError for scales whose shape does not fit the config's strategy."""
    if strategy == "channel" and weight.ndim == 2:
        expect_shape("weight_scale", scale, (*weight.shape[:1], 1), weight.shape[:1])
    if strategy == "tensor":
        expect_shape("weight_scale", scale, (1,), (), (1, 1))


def _pack_quantized(weights: Fields, scale_dtype: str) -> Stored:
    num_bits = _bits_of_integers(weights, default=4)
    weights.expect("type", "int", default="int")
    group, strategy = _group_of(weights), weights.get("strategy")
    is_symmetric = weights.flag("symmetric", default=True)
    order = weights.get("actorder")
    if order not in (None, False, True, "group", "weight", "static", "dynamic"):
        raise weights.refusal("actorder", order, "supported: group, weight, null")
    is_permuted = order in (True, "group", "dynamic") and group != 0
    spec = QuantSpec(
        "int8" if num_bits > 4 else "int4",
        group,
        has_zeros=not is_symmetric,
        is_permuted=is_permuted,
        scale_dtype=scale_dtype,
    )

    def read(tensors: Mapping[str, Tensor]) -> QuantizedMatrix:
        _check_scales(strategy, tensors["weight_scale"], tensors["weight_packed"])
        return from_pack_quantized(
            **tensors, num_bits=num_bits, group_size=group or None, is_symmetric=is_symmetric
        )

    required = (".weight_packed",), (".weight_scale",), (".weight_shape",)
    if is_symmetric:
        return Stored(spec, required, read, (".weight_g_idx", ".weight_zero_point"), _UNUSED)
    return Stored(spec, (*required, (".weight_zero_point",)), read, (".weight_g_idx",), _UNUSED)


def _int_quantized(weights: Fields, scale_dtype: str) -> Stored:
    """Integers with a byte each; files of W4A8 have four bits in it."""
    _bits_of_integers(weights, default=8)
    group, strategy = _group_of(weights), weights.get("strategy")
    is_symmetric = weights.flag("symmetric", default=True)
    spec = QuantSpec("int8", group, has_zeros=not is_symmetric, scale_dtype=scale_dtype)

    def read(tensors: Mapping[str, Tensor]) -> QuantizedMatrix:
        _check_scales(strategy, tensors["weight_scale"], tensors["weight"])
        return from_int_quantized(**tensors, group_size=group or None, is_symmetric=is_symmetric)

    required = (".weight",), (".weight_scale",)
    if is_symmetric:
        return Stored(spec, required, read, (".weight_zero_point",), _UNUSED)
    return Stored(spec, (*required, (".weight_zero_point",)), read, (), _UNUSED)


def _float_quantized(weights: Fields, scale_dtype: str) -> Stored:
    strategy = weights.expect("strategy", "tensor", "channel", "group", "block")
    weights.expect("symmetric", True, default=True)
    block: Any = None
    if strategy == "block":
        block = weights.get("block_structure")
        if block not in ([BLOCK, BLOCK], f"{BLOCK}x{BLOCK}"):
            raise weights.refusal("block_structure", block, f"supported: [{BLOCK}, {BLOCK}]")
        spec = QuantSpec("fp8", BLOCK, BLOCK, scale_dtype=scale_dtype)
    else:
        spec = QuantSpec("fp8", _group_of(weights), scale_dtype=scale_dtype)

    def read(tensors: Mapping[str, Tensor]) -> QuantizedMatrix:
        _check_scales(strategy, tensors["weight_scale"], tensors["weight"])
        return from_float_quantized(
            tensors["weight"],
            tensors["weight_scale"],
            block_structure=(BLOCK, BLOCK) if block else None,
            group_size=spec.group or None if strategy == "group" else None,
        )

    required = ((".weight",), (".weight_scale",))
    return Stored(spec, required, read, (), (*_UNUSED, ".weight_zero_point"))


def _fp4(weights: Fields, spec: QuantSpec) -> Stored:
    group = spec.group
    if weights.get("group_size", default=group) != group:
        raise weights.refusal("group_size", weights.get("group_size"), f"supported: {group}")
    weights.expect("num_bits", 4)

    def read_nvfp4(tensors: Mapping[str, Tensor]) -> QuantizedMatrix:
        return from_nvfp4_pack_quantized(**tensors)

    def read_mxfp4(tensors: Mapping[str, Tensor]) -> QuantizedMatrix:
        return from_mxfp4_pack_quantized(**tensors)

    required: tuple[tuple[str, ...], ...] = ((".weight_packed",), (".weight_scale",))
    if spec == MXFP4:
        return Stored(spec, required, read_mxfp4, (), _UNUSED)
    return Stored(spec, (*required, (".weight_global_scale",)), read_nvfp4, (), _UNUSED)
