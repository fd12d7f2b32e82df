"""Reads a checkpoint's quantization_config into a `Scheme`, with a function for each quant_method.

A new method is a function here (or in a file of its own) and a line in `METHODS`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from compiledllm.config import ConfigError
from compiledllm.models.formats.awq import from_awq
from compiledllm.models.formats.codes import QuantizedMatrix, expect_shape
from compiledllm.models.formats.compressed_config import NVFP4, compressed_tensors
from compiledllm.models.formats.fp8 import BLOCK, from_fp8
from compiledllm.models.formats.gguf_config import METHOD, gguf
from compiledllm.models.formats.gptq import from_gptq
from compiledllm.models.formats.modelopt import from_modelopt_fp8_blocks, from_modelopt_nvfp4
from compiledllm.models.formats.mxfp4 import from_mxfp4_blocks
from compiledllm.models.formats.stored import Fields, Scheme, Stored, Uniform, is_embedding, matches
from compiledllm.models.matrices import QuantSpec

FP8_UNUSED = (
    *(".input_scale", ".activation_scale", ".input_scale_inv", ".input_scale_ub"),
    *(".k_scale", ".v_scale", ".output_scale"),
)


def fp8(fields: Fields, _scale_dtype: str) -> Scheme:
    """FP8 of DeepSeek, Qwen and Mistral: per tensor, per channel, or in blocks of 128x128."""
    fields.expect("activation_scheme", "dynamic", "static", default="dynamic")
    fields.expect("fmt", "e4m3", "float8_e4m3fn", default="e4m3")
    block = fields.get("weight_block_size")
    if block is not None and block != [BLOCK, BLOCK]:
        raise fields.refusal("weight_block_size", block, f"supported: [{BLOCK}, {BLOCK}]")
    spec = QuantSpec("fp8") if block is None else QuantSpec("fp8", BLOCK, BLOCK)

    def read(tensors: Mapping[str, Tensor]) -> QuantizedMatrix:
        field = "weight_scale" if "weight_scale" in tensors else "weight_scale_inv"
        return from_fp8(tensors["weight"], tensors[field], block, scale_field=field)

    scales = (".weight_scale_inv", ".weight_scale")
    stored = Stored(spec, ((".weight",), scales if block else scales[::-1]), read, (), FP8_UNUSED)
    ignored = fields.names("modules_to_not_convert", "ignored_layers")
    layout = "per tensor or channel" if block is None else "in blocks of 128x128"
    return Uniform(f"fp8 {layout}", stored, _all_but(ignored))


def gptq(fields: Fields, scale_dtype: str) -> Scheme:
    """GPTQ, version 1 and 2, with overrides for some modules ("dynamic")."""
    layout = fields.expect(("checkpoint_format", "format"), "gptq", "gptq_v2", default="gptq")
    version = {"gptq": 1, "gptq_v2": 2}[layout]
    fields.expect("is_marlin_format", False, default=False)
    base = _gptq_format(fields, fields, version, scale_dtype)
    dynamic = fields.section("dynamic")
    rules = [
        (dynamic.pattern(name, name[2:] if name[:2] in ("-:", "+:") else name), name, changes)
        for name, changes in dynamic.sections().items()
    ]
    return _Gptq(
        f"gptq {base.spec.title}",
        base,
        tuple(
            (regex, None if p.startswith("-:") else _gptq_format(c, fields, version, scale_dtype))
            for regex, p, c in rules
        ),
        fields.flag("lm_head", default=False),
        tuple(_flat(fields, "modules_in_block_to_quantize")),
    )


@dataclass(frozen=True)
class _Gptq:
    title: str
    base: Stored
    overrides: tuple[tuple[re.Pattern[str], Stored | None], ...]
    has_head: bool
    in_block: tuple[str, ...]  # names of a block's modules that are quantised; empty: all

    @property
    def suffixes(self) -> tuple[str, ...]:
        return self.base.suffixes

    def stored(self, name: str) -> Stored | None:
        if is_embedding(name) or (_is_head(name) and not self.has_head):
            return None
        for pattern, format in self.overrides:
            if pattern.match(name):
                return format
        is_chosen = not self.in_block or _is_head(name) or matches(name, self.in_block)
        return self.base if is_chosen else None


def _gptq_format(changes: Fields, fields: Fields, version: int, scale_dtype: str) -> Stored:
    bits = changes.integer("bits", default=fields.get("bits"))
    if bits not in (2, 4, 8):
        raise changes.refusal("bits", bits, "supported: 2, 4, 8")
    group = changes.group("group_size", default=fields.get("group_size", default=128))
    is_symmetric = changes.flag("sym", default=fields.flag("sym", default=True))
    is_permuted = changes.flag("desc_act", default=fields.flag("desc_act", default=False))
    code = "int8" if bits == 8 else "int4"
    spec = QuantSpec(
        code, group, has_zeros=not is_symmetric, is_permuted=is_permuted, scale_dtype=scale_dtype
    )

    def read(tensors: Mapping[str, Tensor]) -> QuantizedMatrix:
        return from_gptq(
            **tensors,
            bits=bits,
            group_size=group or -1,
            is_symmetric=is_symmetric,
            version=version,
        )

    required = ((".qweight",), (".qzeros",), (".scales",))
    if is_permuted and group:
        return Stored(spec, (*required, (".g_idx",)), read)
    return Stored(spec, required, read, (".g_idx",))


def awq(fields: Fields, scale_dtype: str) -> Scheme:
    """AWQ in the layout of its `gemm` kernel."""
    for name in ("version", "checkpoint_format", "format"):  # of AutoAWQ, and of GPTQModel
        if (layout := fields.get(name, default="gemm")) not in ("gemm", "GEMM"):
            raise fields.refusal(name, layout, "a packing for another kernel; supported: gemm")
    if overrides := fields.get("dynamic"):
        raise fields.refusal("dynamic", overrides, "use a checkpoint without overrides")
    bits = fields.integer("bits", "w_bit", default=4)
    if bits != 4:
        raise fields.refusal("bits", bits, "supported: 4")
    group = fields.group("group_size", "q_group_size", default=128)
    has_zeros = fields.flag("zero_point", default=True)
    spec = QuantSpec("int4", group, has_zeros=has_zeros, scale_dtype=scale_dtype)

    def read(tensors: Mapping[str, Tensor]) -> QuantizedMatrix:
        parts = tensors["qweight"], tensors.get("qzeros"), tensors["scales"]
        return from_awq(*parts, group_size=group or -1, is_symmetric=not has_zeros)

    required = (".qweight",), (".scales",)
    if has_zeros:
        stored = Stored(spec, (*required, (".qzeros",)), read)
    else:
        stored = Stored(spec, required, read, (".qzeros",))
    ignored = fields.names("modules_to_not_convert")
    return Uniform(f"awq {stored.spec.title}", stored, _all_but(ignored))


def mxfp4(fields: Fields, _scale_dtype: str) -> Scheme:
    """gpt-oss: the experts are MXFP4, everything else is not quantised."""
    spec = QuantSpec("fp4", 32, scale_dtype="float8_e8m0fnu")
    stored = Stored(spec, (("_blocks",), ("_scales",)), _from_mxfp4)
    ignored = fields.names("modules_to_not_convert")

    def is_quantized(name: str) -> bool:
        return ".mlp.experts." in name and not matches(name, ignored)

    return Uniform("mxfp4 experts", stored, is_quantized)


def _from_mxfp4(tensors: Mapping[str, Tensor]) -> QuantizedMatrix:
    return from_mxfp4_blocks(tensors["blocks"], tensors["scales"])


def modelopt(fields: Fields, _scale_dtype: str) -> Scheme:
    """FP8 and NVFP4 of NVIDIA's ModelOpt."""
    fields = fields.section("quantization") if fields.get("quantization") else fields
    algorithm = _algorithm_of(fields)
    ignored = fields.names("ignore", "exclude_modules")
    spec, suffixes, read = _MODELOPT[algorithm]
    if algorithm == "NVFP4":
        fields.expect("group_size", NVFP4.group, default=NVFP4.group)
    stored = Stored(spec, tuple((suffix,) for suffix in suffixes), read, (), FP8_UNUSED)
    return Uniform(f"modelopt {algorithm}", stored, _all_but(ignored))


def _algorithm_of(fields: Fields) -> str:
    """A key of `_MODELOPT`. ModelOpt itself writes "fp8_pb_wo" in lower case."""
    name = fields.get("quant_algo")
    if isinstance(name, str) and name.upper() in _MODELOPT:
        return name.upper()
    raise fields.refusal("quant_algo", name, f"supported: {', '.join(_MODELOPT)}")


def _modelopt_fp8(tensors: Mapping[str, Tensor]) -> QuantizedMatrix:
    return from_fp8(tensors["weight"], tensors["weight_scale"])


def _modelopt_fp8_of_blocks(tensors: Mapping[str, Tensor]) -> QuantizedMatrix:
    return from_modelopt_fp8_blocks(tensors["weight"], tensors["weight_scale"])


def _modelopt_fp8_of_channels(tensors: Mapping[str, Tensor]) -> QuantizedMatrix:
    weight, scale = tensors["weight"], tensors["weight_scale"]
    expect_shape("weight_scale", scale, weight.shape[:1], (*weight.shape[:1], 1))
    return from_fp8(weight, scale)


def _modelopt_nvfp4(tensors: Mapping[str, Tensor]) -> QuantizedMatrix:
    return from_modelopt_nvfp4(
        tensors["weight"], tensors["weight_scale"], tensors["weight_scale_2"]
    )


_SCALED = (".weight", ".weight_scale")
_MODELOPT = {
    "FP8": (QuantSpec("fp8"), _SCALED, _modelopt_fp8),
    "FP8_PER_CHANNEL_PER_TOKEN": (QuantSpec("fp8"), _SCALED, _modelopt_fp8_of_channels),
    "FP8_PB_WO": (QuantSpec("fp8", BLOCK, BLOCK), _SCALED, _modelopt_fp8_of_blocks),
    "NVFP4": (NVFP4, (*_SCALED, ".weight_scale_2"), _modelopt_nvfp4),
}

# quant_method -> function of the fields and the scales' dtype (a name in torch) -> Scheme.
METHODS: dict[str, Callable[[Fields, str], Scheme]] = {
    "fp8": fp8,
    "fbgemm_fp8": fp8,
    "compressed-tensors": compressed_tensors,
    "gptq": gptq,
    "awq": awq,
    "mxfp4": mxfp4,
    "modelopt": modelopt,
    METHOD: gguf,
}


def make_scheme(fields: Mapping[str, object], scale_dtype: str) -> Scheme:
    """Read a quantization_config. Raises ConfigError for unsupported methods and values.

    scale_dtype: dtype of the scales in memory, a name in torch, where the method does not fix it.
    """
    method = fields.get("quant_method")
    method = "modelopt" if method == "modelopt_fp4" else method
    if not isinstance(method, str) or method not in METHODS:
        raise ConfigError(
            f"quantization_config: quant_method={method!r} is not supported (supported: "
            f"{', '.join(METHODS)}); use the unquantised model and quantization='fp8' or another"
        )
    return METHODS[method](Fields(fields), scale_dtype)


def _all_but(ignored: list[str]) -> Callable[[str], bool]:
    """A function that says, by a matrix's name, whether the matrix is quantised.

    All matrices are, except the ignored ones, the embedding and the head. Methods that use this
    function never quantise embedding and head, whether the list of ignored modules has them or not.
    """

    def is_quantized(name: str) -> bool:
        return not _is_head(name) and not is_embedding(name) and not matches(name, ignored)

    return is_quantized


def _is_head(name: str) -> bool:
    return name.rpartition(".")[2] in ("lm_head", "embed_out")


def _flat(fields: Fields, name: str) -> list[str]:
    """The names in a field that lists names, or lists of names; [] if the field is absent."""
    value = fields.get(name, default=[])
    if not isinstance(value, list):
        raise fields.refusal(name, value, "it must be a list of names")
    found = [n for part in value for n in (part if isinstance(part, list) else [part])]
    if not all(isinstance(part, str) for part in found):
        raise fields.refusal(name, value, "it must be a list of names")
    return found
