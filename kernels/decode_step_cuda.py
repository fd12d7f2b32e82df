"""Launches `cuda/decode_step.cu`: all decoder blocks of a decode step of few rows."""

from __future__ import annotations

import functools
from ctypes import c_float, c_int
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from compiledllm.kernels.backend import FP8, AttentionMetadata
from compiledllm.kernels.code_macros import options_of
from compiledllm.kernels.cuda_kernel import CudaKernel, compile_together
from compiledllm.kernels.decode_step import ALL_ROWS, MAX_ROWS, DecodeShape, DecodeStep, Layouts
from compiledllm.kernels.launch import HOPPER_SHARED_MEMORY, num_multiprocessors
from compiledllm.kernels.packed import Layout, record_bytes
from compiledllm.kernels.quantized import PACKED_BITS
from compiledllm.kernels.records import TILE, UNIT

_SOURCE = "decode_step.cu"
_LARGE = 70_000_000  # weights of a layer; with more, separate kernels read long FP8 caches faster
# By the form of the weights: for layers of at most so many weights, the numbers of rows with which
# one launch was faster than separate kernels on an H200; the first entry that is large enough
# counts. Llama-3.2-1B has 61 million weights per layer, Llama-3.1-8B 218 million. README.md has the
# measurements.
_FASTER = {
    "16 bits": ((_LARGE, ALL_ROWS), (220_000_000, range(2, 4))),
    "fp8, 0 groups": ((220_000_000, range(1, 5)),),
    "fp8, 1 groups": ((220_000_000, range(1, 5)),),
    "int4, 1 groups": ((220_000_000, range(1, 5)),),
}
_ROW_COUNTS = (1, 2, 4, MAX_ROWS)  # of the variants of the kernel
_ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}
_WARPS = 8  # that compute; another warpgroup copies weights
_THREADS = 32 * _WARPS + 128
_MIN_STAGES = 3
_IN_FLIGHT = 136 * 1024  # bytes of slots that are on their way at once
_IN_FLIGHT_OF_LARGE = 208 * 1024  # of 16-bit weights of at least _LARGE_HIDDEN
_LARGE_HIDDEN = 4096
_SEGMENT_BYTES = 2048  # of an output in a slot
_SMALL_SEGMENT_BYTES = 1024  # where a matrix has few slots, and of 8-bit weights
_SMALL_HIDDEN = 2048
_PADDING = 64  # bytes between the rows of a slot
_SMALL = 256  # bytes
_MAX_HELD = 32  # times eight inputs that a thread can hold, as `MOST_HELD` in the kernel
_MAX_TAGGED = 2048  # activations that are read with tags
_MIN_TAGGED_LAYERS, _MAX_TAGGED_LAYERS = 3, 126  # see `Activation` in the kernel
_MAX_TILES = 28  # of 16 outputs of a matrix in a thread block, whose sums are in registers
_ALIGNMENT = 128


@dataclass(frozen=True, slots=True)
class _Sizes:
    """What the kernel's code depends on beside the dtype; the macros have the same names."""

    HIDDEN: int
    INTERMEDIATE: int
    NUM_HEADS: int
    NUM_KV_HEADS: int
    HEAD_DIM: int
    ROTARY_DIM: int
    BLOCK_SIZE: int

    @staticmethod
    def of(shape: DecodeShape) -> _Sizes:
        return _Sizes(
            shape.hidden_size,
            shape.intermediate_size,
            shape.num_heads,
            shape.num_kv_heads,
            shape.head_dim,
            shape.rotary_dim,
            shape.block_size,
        )


def why_not(shape: DecodeShape, device: torch.device) -> str | None:
    """See `decode_step.Kernel`."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] != 9:
        return "the kernel needs compute capability 9.0"
    if shape.dtype not in (torch.bfloat16, torch.float16):
        return f"the kernel has no {str(shape.dtype).removeprefix('torch.')}"
    if reason := _why_not_layouts(shape.layouts):
        return reason
    if shape.kv_dtype not in (shape.dtype, FP8):
        return f"the kernel has no KV cache in {str(shape.kv_dtype).removeprefix('torch.')}"
    return _why_not_sizes(shape)


def _why_not_layouts(layouts: Layouts) -> str | None:
    layout = layouts[0]
    if any(other != layout for other in layouts):
        return "the matrices of a layer are in different forms"
    if layout is not None and layout.groups and layout.code not in PACKED_BITS:
        are_blocks = layout.groups == 1 and layout.block_rows % 8 == 0
        if not are_blocks or layout.scale_dtype != "float32" or layout.has_zeros:
            return "the kernel has no 8-bit weights with zeros or with such scales of groups"
    return None


def _has_blocks(shape: DecodeShape) -> bool:
    """Whether 8-bit weights have scales of blocks of 128 inputs and several outputs."""
    layout = shape.layouts[0]
    return layout is not None and layout.groups > 0 and layout.code not in PACKED_BITS


def _why_not_sizes(shape: DecodeShape) -> str | None:
    factor = 32 if shape.layouts[0] is None else 4 * UNIT if _has_blocks(shape) else UNIT
    multiples = {
        "hidden_size": (shape.hidden_size, factor),
        "intermediate_size": (shape.intermediate_size, factor),
        "num_heads * head_dim": (shape.q_size, factor),
        "head_dim": (shape.head_dim, 32),
        "block_size": (shape.block_size, 16),
    }
    for name, (size, factor) in multiples.items():
        if size % factor:
            return f"{name}={size} is not a multiple of {factor}"
    if shape.head_dim > 128:
        return f"the kernel has no head_dim={shape.head_dim}"
    if shape.group > 8:
        return f"{shape.group} query heads share a KV head, at most 8 can"
    if _most_tiles(shape) > _MAX_TILES or _stages(shape, MAX_ROWS) < _MIN_STAGES:
        return "a multiprocessor's share of a layer is too large"
    return None


def _most_tiles(shape: DecodeShape) -> int:
    """The most tiles of 16 outputs of a matrix that a thread block has; see `Share`."""
    piece = 16 if _is_in_records(shape) else 8
    pieces, gates = (
        -(-outputs // piece // num_multiprocessors())
        for outputs in (max(shape.qkv_size, shape.hidden_size), shape.intermediate_size)
    )
    return max(-(-pieces * piece // 16), gates * piece // 8)


def _scratch_bytes(shape: DecodeShape, max_rows: int) -> int:
    """Shared memory of a phase: normalised rows, then sums; or heads and results of attention."""
    x = max_rows * (2 * shape.hidden_size + _PADDING)
    sums = _WARPS * _most_tiles(shape) * 16 * max_rows * 4
    heads = 2 * (shape.group + 2 + (shape.kv_dtype == FP8)) * shape.head_dim
    partial = _WARPS * shape.group * (shape.head_dim + 2) * 4
    return _rounded_up(max(x, sums, heads + partial))


def _stages(shape: DecodeShape, max_rows: int) -> int:
    """The number of slots for weights that fit into shared memory beside the scratch memory."""
    left = HOPPER_SHARED_MEMORY - _scratch_bytes(shape, max_rows) - _SMALL
    return left // (_slot_bytes(shape) + 16)


def _segment(shape: DecodeShape) -> int:
    """The number of inputs of a slot."""
    layout = shape.layouts[0]
    if layout is not None:
        return _SEGMENT_BYTES if layout.code in PACKED_BITS else _SMALL_SEGMENT_BYTES
    is_small = shape.hidden_size < _SMALL_HIDDEN
    return (_SMALL_SEGMENT_BYTES if is_small else _SEGMENT_BYTES) // 2


def _in_flight(shape: DecodeShape) -> int:
    is_large = shape.layouts[0] is None and shape.hidden_size >= _LARGE_HIDDEN
    return _IN_FLIGHT_OF_LARGE if is_large else _IN_FLIGHT


def _slot_bytes(shape: DecodeShape) -> int:
    layout, segment = shape.layouts[0], _segment(shape)
    if layout is None:
        return TILE * (2 * segment + _PADDING)
    if layout.code not in PACKED_BITS:
        return TILE * (segment + _PADDING) + 8 * _has_blocks(shape) * segment // UNIT
    return segment // UNIT * record_bytes(layout)


def _is_in_records(shape: DecodeShape) -> bool:
    layout = shape.layouts[0]
    return layout is not None and layout.code in PACKED_BITS


def _rounded_up(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def faster_rows(shape: DecodeShape) -> range:
    """See `decode_step.Kernel`."""
    layout = shape.layouts[0]
    form = "16 bits" if layout is None else f"{layout.code}, {layout.groups} groups"
    for max_weights, rows in _FASTER.get(form, ()):
        if shape.num_weights <= max_weights:
            if shape.kv_dtype == FP8 and shape.num_weights > _LARGE:
                return range(rows.start, min(rows.stop, 3))
            return rows
    return range(0)


def workspace_bytes(shape: DecodeShape) -> int:
    """See `decode_step.Kernel`. Each variant counts its launches and has a part of its own."""
    return sum(_part_bytes(shape, max_rows) for max_rows in _ROW_COUNTS)


def _part_bytes(shape: DecodeShape, max_rows: int) -> int:
    """Bytes of counters, activations, and the results of attention's splits."""
    counters = _ALIGNMENT + _rounded_up(4 * MAX_ROWS * shape.num_kv_heads)
    columns = (
        shape.qkv_size + shape.q_size + shape.intermediate_size + 2 * shape.hidden_size
    ) * max_rows
    num_blocks = num_multiprocessors()
    most_units = num_blocks * -(-max_rows * shape.num_kv_heads // num_blocks)
    partial = 4 * most_units * shape.group * (shape.head_dim + 2)
    return counters + _rounded_up(4 * columns) + _rounded_up(partial)


def _workspace_of(step: DecodeStep, max_rows: int) -> Tensor:
    """The part of the workspace of the variant for `max_rows` rows."""
    before = sum(_part_bytes(step.shape, rows) for rows in _ROW_COUNTS if rows < max_rows)
    return step.workspace[before:]


def _is_tagged(shape: DecodeShape, max_rows: int) -> bool:
    """Whether activations carry tags, in place of barriers between phases.

    Tags double the bytes of activations, which all multiprocessors read, and need a thread's
    registers for all inputs of a product.
    """
    inputs, segment = max(shape.q_size, shape.intermediate_size), _segment(shape)
    step = 32 if shape.layouts[0] is None else UNIT
    held = -(-inputs // segment) * -(-segment // step // _WARPS) * step // 32
    return (
        max_rows * inputs <= _MAX_TAGGED
        and held <= _MAX_HELD
        and _MIN_TAGGED_LAYERS <= shape.num_layers <= _MAX_TAGGED_LAYERS
    )


def _options(
    shape: DecodeShape, max_rows: int, num_blocks: int, has_stamps: bool = False
) -> dict[str, int]:
    """The macros of the kernel."""
    sizes, stages = _Sizes.of(shape), _stages(shape, max_rows)
    layout = shape.layouts[0] or Layout("fp8", 0, "float32", False)
    return dict(zip(_Sizes.__dataclass_fields__, astuple(sizes), strict=True)) | {
        "BF16": shape.dtype == torch.bfloat16,
        "FP8_CACHE": shape.kv_dtype == FP8,
        "ROWS": max_rows,
        "NUM_BLOCKS": num_blocks,
        "WARPS": _WARPS,
        "STAGES": stages,
        "MOST_COPIES": min(_in_flight(shape) // _slot_bytes(shape), stages),
        "SEGMENT": _segment(shape),
        "PACKED": shape.layouts[0] is not None,
        "SCRATCH": _scratch_bytes(shape, max_rows),
        "PLUS_ONE": shape.plus_one,
        "ACTIVATION": _ACTIVATIONS[shape.activation],
        "HAS_QK_NORM": shape.has_qk_norm,
        "HAS_SOFT_CAP": shape.soft_cap != 0,
        "HAS_WINDOWS": shape.has_windows,
        "HAS_SINKS": shape.has_sinks,
        "HAS_BIASES": shape.has_qkv_bias or shape.has_other_biases,
        "STAMPS": has_stamps,
        "TAGGED": _is_tagged(shape, max_rows),
        "SCALE_SHIFT": layout.block_rows.bit_length() - 1,
        **options_of(layout),
    }


@functools.cache
def _kernel(
    shape: DecodeShape, max_rows: int, num_blocks: int, has_stamps: bool = False
) -> CudaKernel:
    options = _options(shape, max_rows, num_blocks, has_stamps)
    shared_bytes = options["STAGES"] * (_slot_bytes(shape) + 16) + options["SCRATCH"] + _SMALL
    return CudaKernel(_SOURCE, "decode_step", options, shared_bytes)


def _kernel_for(shape: DecodeShape, num_rows: int) -> CudaKernel:
    return _kernel(shape, _max_rows(num_rows), num_multiprocessors())


def _max_rows(num_rows: int) -> int:
    """Of the variant that computes so many rows."""
    return next(n for n in _ROW_COUNTS if num_rows <= n)


def compile(shape: DecodeShape, rows: range) -> None:
    """See `decode_step.Kernel`."""
    variants = [_options(shape, max_rows, num_multiprocessors()) for max_rows in _variants(rows)]
    compile_together(_SOURCE, variants)


def load(shape: DecodeShape, rows: range) -> None:
    """See `decode_step.Kernel`."""
    for max_rows in _variants(rows):
        _kernel_for(shape, max_rows)


def _variants(rows: range) -> list[int]:
    """The row counts of the variants that steps of so many rows run."""
    return sorted(set(map(_max_rows, rows)))


def run(
    step: DecodeStep, x: Tensor, cos: Tensor, sin: Tensor, attn: AttentionMetadata
) -> tuple[Tensor, Tensor]:
    """See `DecodeStep.__call__`."""
    out, update = torch.empty_like(x), torch.empty_like(x)
    launch(_kernel_for(step.shape, len(x)), step, x, cos, sin, attn, out, update, None)
    return out, update


def launch(
    kernel: CudaKernel,
    step: DecodeStep,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    attn: AttentionMetadata,
    out: Tensor,
    update: Tensor,
    stamps: Tensor | None,
) -> None:
    """Fill `out` and `update`, [rows, hidden_size]. stamps: of a kernel that writes them, int64
    [layers, 5 phases, 4 events, multiprocessors], in cycles."""
    shape = step.shape
    arguments = (
        step.table, x, cos, sin, out, update, attn.slot_mapping, attn.block_tables, attn.seq_lens,
        _workspace_of(step, _max_rows(len(x))), stamps, c_int(attn.block_tables.stride(0)),
        c_int(shape.num_layers), c_int(len(x)), c_float(shape.eps), c_float(shape.qk_eps),
        c_float(shape.scale), c_float(shape.soft_cap),
    )  # fmt: skip
    kernel.launch((num_multiprocessors(),), _THREADS, arguments, is_cooperative=True)
