"""Measures matmuls of few rows with a model's large quantised matrices beside the copy rate.

    python -m compiledllm.benchmarks.quantized_products MODEL --formats fp8 int4 --output-json FILE

The matrices are those of at least 8 MB in a format, without experts. Each is filled with random
codes, so that no weights are read. A matmul takes the kernel and the tiling that an engine on this
machine chooses. As in `tilings`, caches are cold, and calls are replayed from a CUDA graph.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from compiledllm.arguments import CommandParser
from compiledllm.benchmarks.ceilings import measure_ceilings
from compiledllm.benchmarks.cli import QUANTIZED_FORMATS, few_rows
from compiledllm.benchmarks.floor import Ceilings
from compiledllm.benchmarks.quantized_tilings import Product, calls_of, packed_matrix, products_of
from compiledllm.benchmarks.report import Row, collected, run_script, script_facts, write_facts
from compiledllm.benchmarks.state_layers import seconds_per_call
from compiledllm.benchmarks.tilings import check_gpu, cold_copies, own_table
from compiledllm.config import ConfigError
from compiledllm.kernels.tables import use_folder
from compiledllm.platform import Platform

MIN_BYTES = 8_000_000


def large_products(
    model: str, formats: Sequence[str], row_counts: Sequence[int]
) -> list[tuple[str, Product]]:
    """The matmuls to measure, each with its format's name, and those of a matrix in a row.

    formats: keys of `quantized_tilings.FORMATS`. Empty: each matrix is measured in its own format.
    Raises ConfigError if there are none.
    """
    found = [
        (name or product.spec.title, product)
        for name in formats or [""]
        for product in products_of([model], [name] if name else [], row_counts)
        if _num_bytes(product) >= MIN_BYTES
    ]
    if not found:
        raise ConfigError(
            f"{model} has no matrix of at least {MIN_BYTES // 10**6} MB in "
            f"{', '.join(formats) or 'a quantised format'} that this GPU's kernel for few rows can "
            "read: choose other --formats"
        )
    return found


def measure(products: Iterable[tuple[str, Product]], ceilings: Ceilings) -> Iterator[Row]:
    """A row for each matmul; matmuls with one matrix must follow one another."""
    for (_, matrix), group in itertools.groupby(products, lambda each: (each[0], each[1][:3])):
        packed = packed_matrix(*matrix)
        assert packed is not None, matrix
        layout, parts = packed
        copies = cold_copies(parts)
        for format, product in group:
            shape, device = (product.rows, product.num_inputs), parts[0].device
            x = torch.randn(shape, device=device, dtype=torch.bfloat16)
            calls = calls_of(x, layout, product.num_outputs, copies)
            yield make_row(format, product, seconds_per_call(calls, device), ceilings)


def make_row(format: str, product: Product, seconds: float, ceilings: Ceilings) -> Row:
    """bytes: of codes and scales. share_of_copy_rate: a copy's bytes are read and written ones."""
    num_bytes = _num_bytes(product)
    return {
        "format": format,
        "rows": product.rows,
        "outputs": product.num_outputs,
        "inputs": product.num_inputs,
        "us": round(seconds * 1e6, 2),
        "bytes": num_bytes,
        "bytes_per_s": float(f"{num_bytes / seconds:.4g}"),
        "share_of_copy_rate": ceilings.share_of_copy_rate(num_bytes, seconds),
    }


def _num_bytes(product: Product) -> int:
    return product.spec.num_bytes(product.num_outputs, product.num_inputs)


def main(arguments: list[str]) -> None:
    name = "compiledllm.benchmarks.quantized_products"
    parser = CommandParser(prog=f"python -m {name}", allow_abbrev=False)
    add = parser.add_argument
    add("model", metavar="MODEL", help="whose matrices to measure; no weights are read")
    add(
        "--formats", nargs="+", choices=QUANTIZED_FORMATS, default=[], metavar="FORMAT",
        help=f"{', '.join(QUANTIZED_FORMATS)} (default: the matrices' own formats)",
    )  # fmt: skip
    rows_help = "tokens per matmul (1 8 16); matrices in FP8 that a library multiplies are left out"
    add("--rows", type=few_rows, nargs="+", default=[1, 8, 16], metavar="N", help=rows_help)
    add("--output-json", type=Path, metavar="FILE", help="default: standard output")
    options = parser.parse_args(arguments)
    platform = Platform.detect()
    check_gpu(platform, "quantized_products")
    products = large_products(options.model, options.formats, options.rows)
    use_folder(own_table().parent)
    ceilings = measure_ceilings(platform, torch.bfloat16)
    facts = {"ceilings": asdict(ceilings), "rows": collected(measure(products, ceilings))}
    write_facts(script_facts("quantized_products", platform) | facts, options.output_json)


if __name__ == "__main__":
    run_script(main)
