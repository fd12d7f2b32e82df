"""Tables of measured tilings, for products and GPUs for which the rules in code choose slower ones.

A table is a JSON file named after its GPU. Tables in `tilings/` come with the package. A machine's
own table, made by `compiledllm bench tilings`, takes precedence. The rules apply to GPUs without a
table, and to products without an entry. An entry of `products` also serves a product with nearly as
many outputs; an entry of `quantized` serves its exact shape only. An entry of `experts` also serves
steps with up to twice or at least half as many items.
"""

from __future__ import annotations

import functools
import json
import logging
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch

log = logging.getLogger("compiledllm")

_SHIPPED = Path(__file__).with_name("tilings")
# (padded rows, outputs, inputs) -> the fields of a `skinny_triton.Tiling`
Products = dict[tuple[int, int, int], tuple[int, ...]]
# (layout, padded rows, outputs, inputs) -> the fields of a `quantized_cuda.Tiling`
QuantizedProducts = dict[tuple[str, int, int, int], tuple[int, ...]]
_MAX_WARPS = 32  # maximum number of warps of a thread block
SIXTEEN_BITS = "16 bits"  # weights of experts that are not quantised


class ExpertProduct(NamedTuple):
    """A product of a step's items, which are pairs of a token and an expert, with their experts.

    weights: SIXTEEN_BITS, or `str` of a `packed.Layout`. rows: the most items of a block.
    """

    weights: str
    num_experts: int
    rows: int
    num_outputs: int
    num_inputs: int
    num_items: int


# The fields of a `moe_triton.Tiling` but its rows, or of a `quantized_cuda.Tiling`
ExpertProducts = dict[ExpertProduct, tuple[int, ...]]


class Table(NamedTuple):
    """The tilings measured on one GPU. quantized: for products with a quantised matrix."""

    products: Products
    quantized: QuantizedProducts
    experts: ExpertProducts


_own_folder: Path | None = None


def file_name(gpu: str) -> str:
    """The name of a GPU's table: "NVIDIA H200" -> "nvidia-h200.json"."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json"


def padded_rows(num_rows: int) -> int:
    """The number of rows whose tiling serves `num_rows` (1 to 32): 1, 16 or 32."""
    return 1 if num_rows == 1 else 16 if num_rows <= 16 else 32


def padded_rows_of_quantized(num_rows: int) -> int:
    """As `padded_rows` for quantised matrices and 1 to 64 rows: 1, 8, 16, 32 or 64."""
    return next(n for n in (1, 8, 16, 32, 64) if num_rows <= n)


def use_folder(folder: Path) -> None:
    """From now on, also read the machine's own tables, from this folder."""
    global _own_folder
    _own_folder = folder
    _nearest.cache_clear()
    _nearest_of_experts.cache_clear()
    _read.cache_clear()


def product_tiling(num_rows: int, num_outputs: int, num_inputs: int) -> tuple[int, ...] | None:
    """The fields of the tiling measured for a product on the current GPU; None: not measured.

    A product whose number of outputs differs by at most 1 % from a measured one has its tiling.
    """
    gpu = _gpu()
    return None if gpu is None else _nearest(gpu, padded_rows(num_rows), num_outputs, num_inputs)


@functools.cache
def _nearest(gpu: str, rows: int, num_outputs: int, num_inputs: int) -> tuple[int, ...] | None:
    products = _read(gpu).products
    measured = [n for r, n, k in products if (r, k) == (rows, num_inputs)]
    nearest = min(measured, key=lambda n: abs(n - num_outputs), default=0)
    is_near = abs(nearest - num_outputs) * 100 <= nearest
    return products[rows, nearest, num_inputs] if is_near else None


def quantized_tiling(
    layout: str, num_rows: int, num_outputs: int, num_inputs: int
) -> tuple[int, ...] | None:
    """The tiling measured for a quantised matrix of exactly this shape; None: not measured.

    layout: `str` of a `packed.Layout`.
    """
    gpu, rows = _gpu(), padded_rows_of_quantized(num_rows)
    if gpu is None:
        return None
    return _read(gpu).quantized.get((layout, rows, num_outputs, num_inputs))


def expert_tiling(product: ExpertProduct) -> tuple[int, ...] | None:
    """The tiling measured for a product of experts on the current GPU; None: not measured.

    A product whose number of items is at most twice, and at least half, a measured one has its
    tiling.
    """
    gpu = _gpu()
    return None if gpu is None else _nearest_of_experts(gpu, product)


@functools.cache
def _nearest_of_experts(gpu: str, product: ExpertProduct) -> tuple[int, ...] | None:
    count, measured = product.num_items, _read(gpu).experts

    def distance(other: ExpertProduct) -> float:
        return max(other.num_items / count, count / other.num_items)

    alike = [other for other in measured if other[:-1] == product[:-1]]
    nearest = min(alike, key=distance, default=None)
    return measured[nearest] if nearest and distance(nearest) <= 2 else None


def _gpu() -> str | None:
    """The name of the current GPU; None: there is none."""
    is_there = torch.cuda.is_available()
    return torch.cuda.get_device_name(torch.cuda.current_device()) if is_there else None


@functools.cache
def _read(gpu: str) -> Table:
    found = Table({}, {}, {})
    for folder in (_SHIPPED, _own_folder):
        path = folder / file_name(gpu) if folder else None
        if path is None or not path.is_file():
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            table = Table(parse_products(content), parse_quantized(content), parse_experts(content))
        except (ValueError, TypeError, LookupError) as error:
            log.warning(
                "%s is no table of tilings (%s); delete it, or make it again with "
                "'compiledllm bench tilings'",
                path,
                error,
            )
        else:
            found.products.update(table.products)
            found.quantized.update(table.quantized)
            found.experts.update(table.experts)
    return found


def parse_products(table: dict[str, Any]) -> Products:
    """The products of a table. Raises ValueError, TypeError or LookupError if it is malformed."""
    found: Products = {}
    for entry in table["products"]:
        shape = padded_rows(entry["rows"]), int(entry["outputs"]), int(entry["inputs"])
        outputs, columns, num_warps, num_stages = map(int, entry["tiling"])
        if min(outputs, columns, num_warps, num_stages) < 1 or columns & (columns - 1):
            raise ValueError(f"tiling {entry['tiling']} of {shape}")
        found[shape] = outputs, columns, num_warps, num_stages
    return found


def parse_quantized(table: dict[str, Any]) -> QuantizedProducts:
    """A table's products with quantised matrices, if it has any. Raises as `parse_products`."""
    found: QuantizedProducts = {}
    for entry in table.get("quantized", ()):
        rows = padded_rows_of_quantized(entry["rows"])
        key = str(entry["layout"]), rows, int(entry["outputs"]), int(entry["inputs"])
        found[key] = _quantized_fields(entry)
    return found


def parse_experts(table: dict[str, Any]) -> ExpertProducts:
    """A table's products of experts, if it has any. Raises as `parse_products`."""
    found: ExpertProducts = {}
    for entry in table.get("experts", ()):
        key = expert_key(entry)
        if min(key[1:]) < 1:
            raise ValueError(f"sizes of {key}")
        is_quantized = key.weights != SIXTEEN_BITS
        found[key] = _quantized_fields(entry) if is_quantized else _fields_of_experts(entry)
    return found


def expert_key(entry: dict[str, Any]) -> ExpertProduct:
    names = "experts", "rows", "outputs", "inputs", "items"
    return ExpertProduct(str(entry["weights"]), *(int(entry[name]) for name in names))


def _quantized_fields(entry: dict[str, Any]) -> tuple[int, ...]:
    row_tiles, n_warps, k_warps, depth, chunk = map(int, entry["tiling"])
    fields = row_tiles, n_warps, k_warps, depth, chunk
    if min(fields) < 1 or n_warps * k_warps > _MAX_WARPS:
        raise ValueError(f"tiling of {entry}")
    return fields


def _fields_of_experts(entry: dict[str, Any]) -> tuple[int, ...]:
    outputs, columns, num_warps, num_stages = map(int, entry["tiling"])
    fields = outputs, columns, num_warps, num_stages
    if outputs < 16 or columns < 16 or any(n & (n - 1) for n in fields[:3]) or num_stages < 1:
        raise ValueError(f"tiling of {entry}")
    return fields
