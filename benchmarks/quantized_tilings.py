"""Measures tilings of matmuls of few rows with quantised matrices, for the table of tilings.

The formats are those of a model's own matrices, or are given by name. As in `tilings`,
caches are cold, calls are replayed from a CUDA graph, and several processes compile first.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compiledllm.benchmarks.state_layers import seconds_per_call
from compiledllm.benchmarks.tilings import (
    QuantizedKey,
    cold_copies,
    compile_in_processes,
    figures,
    is_worth,
    of_the_fastest,
    quantized_key,
)
from compiledllm.kernels.packed import MAX_FEW_ROWS, Layout, takes_fp8_inputs
from compiledllm.models.formats.assign import ONLINE
from compiledllm.models.formats.compressed_config import MXFP4, NVFP4
from compiledllm.models.formats.gguf_blocks import KINDS
from compiledllm.models.formats.packed import PackedFormat, for_device
from compiledllm.models.formats.quantized import Quantized
from compiledllm.models.matrices import MatrixSpec, MixedSpec, QuantSpec
from compiledllm.models.registry import load_spec
from compiledllm.models.source import resolve_checkpoint

# Name of a format on the command line -> how its matrices are stored.
FORMATS = (
    ONLINE | {"mxfp4": MXFP4, "nvfp4": NVFP4} | {kind: kinds.spec for kind, kinds in KINDS.items()}
)
Fields = tuple[int, ...]  # of a `quantized_cuda.Tiling`
_DEVICE = "cuda"


class Product(NamedTuple):
    """A matmul of an input of `rows` rows with a quantised matrix."""

    spec: QuantSpec
    num_outputs: int
    num_inputs: int
    rows: int

    def __str__(self) -> str:
        return f"{self.rows} x {self.num_outputs} x {self.num_inputs} in {self.spec.code}"


class Compiling(NamedTuple):
    """A kernel to compile. num_inputs: a number for which the same kernel is compiled (`_like`)."""

    spec: QuantSpec
    num_inputs: int
    rows: int
    fields: Fields


def products_of(
    models: Iterable[str], formats: Sequence[str], row_counts: Sequence[int]
) -> list[Product]:
    """The distinct matmuls of these models' steps that our kernel for few rows computes.

    formats: keys of FORMATS; every matrix is measured in each of them. Empty: each matrix is
    measured in its own format, and not at all if it is not quantised.
    """
    found = dict[Product, None]()
    for model in models:
        spec = load_spec(resolve_checkpoint(model, weights=False))
        for matrix in spec.weights_read.matrices:
            for format, num_outputs in _formats_of(matrix, formats):
                sizes = num_outputs, matrix.num_inputs
                products = (Product(format, *sizes, rows) for rows in row_counts)
                found |= dict.fromkeys(filter(_is_ours, products))
    return list(found)


def _formats_of(matrix: MatrixSpec, formats: Sequence[str]) -> Iterator[tuple[QuantSpec, int]]:
    """The formats in which a matrix is measured, each with its number of outputs."""
    own, num_outputs = matrix.format, matrix.num_outputs
    if matrix.num_experts > 1:
        return
    if formats:
        yield from ((FORMATS[name], num_outputs) for name in formats)
    elif isinstance(own, MixedSpec):
        yield from ((format, size) for _, size, format in own.runs if format is not None)
    elif own is not None:
        yield own, num_outputs


def candidates(layout: Layout, num_rows: int) -> Iterator[Fields]:
    """Tilings worth measuring: row_tiles, n_warps, k_warps, depth, chunk.

    More rows of x leave fewer tilings, as their inputs and sums take registers.
    """
    if layout.code in ("fp8", "int8"):
        shapes = [(1, 1, 4), (1, 1, 8), (1, 1, 16), (1, 2, 4), (1, 2, 8), (2, 1, 4), (2, 1, 8)]
        depths = [(1, 1), (2, 1)] if num_rows > 8 else [(1, 1), (2, 1), (3, 1)]
    else:
        shapes = [(1, 1, 2), (1, 1, 4), (1, 1, 8), (1, 2, 4), (2, 1, 4), (2, 1, 8)]
        depths = [(2, 1), (2, 2), (3, 1)]
        depths += [] if num_rows > 8 else [(2, 4), (3, 2), (4, 1)]
    if num_rows > 32:
        shapes = [shape for shape in shapes if shape[1] * shape[2] <= 8]
    for (row_tiles, n_warps, k_warps), (depth, chunk) in itertools.product(shapes, depths):
        if row_tiles * depth <= 4 and n_warps * k_warps * depth <= 32:
            yield row_tiles, n_warps, k_warps, depth, chunk


def measure_products(
    products: Sequence[Product], advance: Callable[[str], None]
) -> dict[QuantizedKey, dict[str, Any] | None]:
    """A table entry for each matmul that some tiling computes at least 3 % faster than the rule's.

    None for other matmuls. advance: called with a description of each measured matmul.
    """
    jobs = dict.fromkeys(
        Compiling(p.spec, _like(p.num_inputs), _tokens(p.rows), fields)
        for p in products
        for fields in _tilings(_layout_of(p), p)
    )
    compile_in_processes(_compile, list(jobs))
    found: dict[QuantizedKey, dict[str, Any] | None] = {}
    for product in products:
        entry = _entry(product)
        found[quantized_key(entry)] = entry if is_worth(entry) else None
        advance(str(product))
    return found


def _is_ours(product: Product) -> bool:
    """Whether `cuda/linear.cu` may compute the matmul, and no library with FP8 inputs.

    On GPUs with products of warpgroups, these take over some matmuls of more than 16 rows.
    """
    if product.num_inputs % (product.spec.span or 1) or product.rows > MAX_FEW_ROWS:
        return False
    layout = _layout(product.spec, _like(product.num_inputs))
    x = torch.empty(product.rows, product.num_inputs, dtype=torch.bfloat16, device="meta")
    return layout is not None and not takes_fp8_inputs(x, layout, product.num_outputs)


def _like(num_inputs: int) -> int:
    """A small number of inputs for which the same kernel is compiled."""
    return 1024 if num_inputs % 128 == 0 else 1024 + num_inputs % 128


def _tokens(rows: int) -> int:
    return next(n for n in (8, 16, 32, 64) if rows <= n)


def _tilings(layout: Layout, product: Product) -> list[Fields]:
    """The rule's tiling first, then the candidates."""
    from compiledllm.kernels.quantized_cuda import rule_for

    rule = rule_for(layout, product.rows, product.num_outputs, product.num_inputs)
    of_rule = rule.row_tiles, rule.n_warps, rule.k_warps, rule.depth, rule.chunk
    return list(dict.fromkeys([of_rule, *candidates(layout, product.rows)]))


def _layout_of(product: Product) -> Layout:
    layout = _layout(product.spec, _like(product.num_inputs))
    assert layout is not None, product
    return layout


@functools.cache
def _layout(spec: QuantSpec, num_inputs: int) -> Layout | None:
    """The layout of matrices with this number of inputs; None: the kernels have none."""
    packed = packed_matrix(spec, _few_outputs(spec), num_inputs)
    return None if packed is None else packed[0]


def _few_outputs(spec: QuantSpec) -> int:
    return 16 * spec.rows


def packed_matrix(
    spec: QuantSpec, num_outputs: int, num_inputs: int
) -> tuple[Layout, list[Any]] | None:
    """A random matrix in the kernels' layout: the layout; codes, scales, zeros and row scales."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(_DEVICE):
            format = Quantized(spec)
            params = [*format.parameters({"": num_outputs}, num_inputs).values()]
            format.randomize(params, 0.02, torch.Generator(_DEVICE).manual_seed(0))
            finished = for_device(spec, params, num_inputs)
    finally:
        torch.set_default_dtype(before)
    if finished is None:
        return None
    packed, tensors = finished
    assert isinstance(packed, PackedFormat)
    names = "weight", "weight_scale", "weight_zero", "row_scale"
    return packed.layout, [tensors[name] for name in names]


def _entry(product: Product) -> dict[str, Any]:
    """An entry of the table: the fastest tiling for a matmul."""
    packed = packed_matrix(product.spec, product.num_outputs, product.num_inputs)
    assert packed is not None, product
    layout, parts = packed
    copies = cold_copies(parts)
    x = torch.randn(product.rows, product.num_inputs, device=_DEVICE, dtype=torch.bfloat16)
    tilings = _tilings(layout, product)
    seconds = of_the_fastest(tilings, functools.partial(_measure, x, layout, product, copies))
    sizes = {"rows": product.rows, "outputs": product.num_outputs, "inputs": product.num_inputs}
    return {"layout": str(layout)} | sizes | figures(seconds, tilings[0])


def calls_of(
    x: Tensor,
    layout: Layout,
    num_outputs: int,
    copies: Sequence[Sequence[Any]],
    fields: Fields | None = None,
) -> list[Callable[[], Tensor]]:
    """The matmul of x [rows, inputs] with each copy of a matrix.

    copies: the tensors of `packed_matrix`. fields: the tiling; None: the one that engines choose.
    """
    from compiledllm.kernels.quantized_cuda import Tiling, quantized_product

    tiling = None if fields is None else Tiling(*fields)
    run = functools.partial(
        quantized_product, bias=None, layout=layout, num_outputs=num_outputs, tiling=tiling
    )
    return [functools.partial(run, x, *parts) for parts in copies]


def _measure(
    x: Tensor,
    layout: Layout,
    product: Product,
    copies: Sequence[Sequence[Any]],
    tilings: Iterable[Fields],
    **how: Any,
) -> dict[Fields, float]:
    """Seconds of a matmul with each tiling for which the GPU has the resources."""
    from compiledllm.kernels.machine_code import CudaError

    found = {}
    for fields in tilings:
        calls = calls_of(x, layout, product.num_outputs, copies, fields)
        try:
            found[fields] = seconds_per_call(calls, x.device, **how)
        except CudaError:  # more shared memory or registers than there are
            continue
    return found


def _compile(jobs: Sequence[Compiling]) -> None:
    from compiledllm.kernels.machine_code import CudaError
    from compiledllm.kernels.quantized_cuda import Tiling, quantized_product

    for spec, num_inputs, rows, fields in jobs:
        num_outputs = _few_outputs(spec)
        packed = packed_matrix(spec, num_outputs, num_inputs)
        assert packed is not None, spec
        x = torch.zeros(rows, num_inputs, device=_DEVICE, dtype=torch.bfloat16)
        layout, (codes, scales, zeros, row_scales) = packed
        matrix = codes, scales, zeros, row_scales, None
        try:
            quantized_product(x, *matrix, layout, num_outputs, Tiling(*fields))
        except CudaError:
            continue
