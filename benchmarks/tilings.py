"""Measures tilings of matmuls with few rows, and writes a table of those that beat the default.

The default is the tiling that the kernel's rule (`rule_for`) gives. Caches are cold: each replay of
a graph multiplies by more copies of a matrix than the last-level cache holds. Compilation takes
most of the time, so several processes compile all tilings first.
"""

from __future__ import annotations

import concurrent.futures
import functools
import itertools
import json
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from compiledllm.benchmarks.state_layers import seconds_per_call
from compiledllm.caches import cache_dir
from compiledllm.config import ConfigError
from compiledllm.kernels import dense_linear_cuda
from compiledllm.kernels.launch import out_of_resources
from compiledllm.kernels.linear import MAX_SKINNY_ROWS
from compiledllm.kernels.tables import (
    ExpertProduct,
    expert_key,
    file_name,
    padded_rows,
    padded_rows_of_quantized,
)
from compiledllm.models.registry import load_spec
from compiledllm.models.source import resolve_checkpoint
from compiledllm.platform import Platform

Shape = tuple[int, int]  # outputs, inputs
Product = tuple[int, Shape]  # rows, shape of the matrix
Fields = tuple[int, int, int, int]  # of a tiling: outputs, columns, num_warps, num_stages
QuantizedKey = tuple[str, int, int, int]  # layout, padded rows, inputs, outputs
_Job = TypeVar("_Job")
_Fields = TypeVar("_Fields", bound=tuple[int, ...])

MIN_GAIN = 0.03  # share of the rule's time that an entry of the table saves at least
_COLD_BYTES = 4e8  # total size of the copies of a matrix; several times any last-level cache
_MAX_COPIES = 40
_BATCH = 64  # tilings that a process compiles in a row
_SHORT_S, _LONG_S = 2e-3, 1e-2  # duration of a repeat: for every candidate; for the fastest ones
_NUM_FINALISTS = 3


def own_table() -> Path:
    """The table of this machine's GPU in the cache folder, which engines read at start."""
    return cache_dir() / "tilings" / file_name(torch.cuda.get_device_name())


def products_of(models: Iterable[str], row_counts: Sequence[int]) -> list[Product]:
    """The distinct matmuls of `skinny_triton` in these models' steps. No weights are needed."""
    shapes = dict[Shape, None]()
    for model in models:
        spec = load_spec(resolve_checkpoint(model, weights=False))
        for matrix in spec.weights_read.matrices:
            if matrix.format is None and matrix.num_experts == 1:
                shapes[matrix.num_outputs, matrix.num_inputs] = None
    products = itertools.product((m for m in row_counts if m <= MAX_SKINNY_ROWS), shapes)
    return [(m, shape) for m, shape in products if not dense_linear_cuda.serves(m, *shape)]


def candidates(num_rows: int, num_inputs: int) -> Iterator[Fields]:
    """Tilings worth measuring: enough loads in flight for each thread, and few enough registers."""
    if num_rows == 1:
        sizes = itertools.product((1, 2, 4, 8), (256, 512, 1024, 2048, 4096), (1, 2, 4, 8))
        for outputs, columns, num_warps in sizes:
            threads = num_warps * 32
            row_loads = columns // threads  # elements of a row per thread
            fits = 8 <= outputs * columns // threads <= 64 and columns < 2 * num_inputs
            if fits and row_loads >= (8 if outputs == 1 else 4):
                yield outputs, columns, num_warps, 4
        return
    tiles = ((16, 256), (32, 128), (32, 256), (64, 64), (64, 128))
    for (outputs, columns), num_warps, num_stages in itertools.product(tiles, (2, 4), (4, 5, 6)):
        if outputs * columns <= 128 * num_warps * 32:
            yield outputs, columns, num_warps, num_stages


def measure_products(
    products: Sequence[Product], advance: Callable[[str], None]
) -> list[dict[str, Any]]:
    """A table entry for each matmul that some tiling computes at least 3 % faster than the rule's.

    advance: called with a description of each matmul that has been measured.
    """
    from compiledllm.kernels.skinny_triton import rule_for

    sizes = dict.fromkeys((m, num_inputs) for m, (_, num_inputs) in products)
    jobs = [(m, k, t) for m, k in sizes for t in candidates(m, k)]
    compile_in_processes(_compile, jobs)
    entries = []
    for num_rows, (num_outputs, num_inputs) in products:
        rule = rule_for(num_rows, num_outputs, num_inputs)
        rule_fields = rule.outputs, rule.columns, rule.num_warps, rule.num_stages
        tilings = dict.fromkeys([rule_fields, *candidates(num_rows, num_inputs)])
        seconds = _measure(num_rows, (num_outputs, num_inputs), tilings)
        if entry := entry_of(num_rows, (num_outputs, num_inputs), seconds, rule_fields):
            entries.append(entry)
        advance(f"{num_rows} x {num_outputs} x {num_inputs}")
    return entries


def entry_of(
    num_rows: int, shape: Shape, seconds: dict[Fields, float], rule: Fields
) -> dict[str, Any] | None:
    """The table's entry for a matmul, or None where the rule's tiling is good enough."""
    entry = {"rows": num_rows, "outputs": shape[0], "inputs": shape[1]} | figures(seconds, rule)
    return entry if is_worth(entry) else None


def figures(seconds: Mapping[_Fields, float], rule: _Fields) -> dict[str, Any]:
    """What an entry says of its tiling: the fastest one, its time, and the time of the rule's.

    seconds: with each tiling for which the GPU has the resources, which the rule's may lack.
    """
    best, rule_s = min(seconds, key=seconds.__getitem__), seconds.get(rule)
    return {
        "tiling": list(best),
        "us": round(seconds[best] * 1e6, 2),
        "rule_us": None if rule_s is None else round(rule_s * 1e6, 2),
    }


def is_worth(entry: Mapping[str, Any]) -> bool:
    """Whether an entry's tiling is clearly faster than the rule's."""
    return entry["rule_us"] is None or entry["us"] < (1 - MIN_GAIN) * entry["rule_us"]


def _measure(num_rows: int, shape: Shape, tilings: Iterable[Fields]) -> dict[Fields, float]:
    """Seconds of a matmul with each tiling for which the GPU has the resources."""
    from compiledllm.kernels.skinny_triton import Tiling, skinny_linear

    device = torch.device("cuda")
    copies = num_copies(2 * shape[0] * shape[1])
    x = torch.randn(num_rows, shape[1], device=device, dtype=torch.bfloat16)
    weights: list[Tensor] = [
        torch.randn(shape, device=device, dtype=torch.bfloat16) * 0.02 for _ in range(copies)
    ]
    found = {}
    for fields in tilings:
        run = functools.partial(skinny_linear, tiling=Tiling(*fields))
        try:
            found[fields] = seconds_per_call(
                [functools.partial(run, x, w, None) for w in weights], device
            )
        except out_of_resources():
            continue
    return found


def of_the_fastest(
    tilings: Sequence[_Fields], measure: Callable[..., dict[_Fields, float]]
) -> dict[_Fields, float]:
    """Seconds with the fastest tilings and with the first one, the rule's.

    `measure(tilings, num_repeats=..., min_s=...)` returns the seconds with each tiling for which
    the GPU has the resources. All tilings are measured for a short time, and these again for
    longer.
    """
    short = measure(tilings, num_repeats=2, min_s=_SHORT_S)
    best = sorted(short, key=short.__getitem__)[:_NUM_FINALISTS]
    return measure(list(dict.fromkeys([tilings[0], *best])), num_repeats=3, min_s=_LONG_S)


def cold_copies(parts: Sequence[Any]) -> list[list[Any]]:
    """A matrix's tensors (or None), and so many copies that caches are cold if read in turn.

    parts: the codes, then scales and others.
    """
    return [list(parts)] + [
        [None if part is None else part.clone() for part in parts]
        for _ in range(num_copies(parts[0].nbytes) - 1)
    ]


def num_copies(num_bytes: int) -> int:
    """How many copies of a matrix of this size are read in turn, so that caches are cold."""
    return max(4, min(_MAX_COPIES, int(_COLD_BYTES / num_bytes) + 1))


def compile_in_processes(function: Callable[[Sequence[_Job]], None], jobs: Sequence[_Job]) -> None:
    """Call `function` with batches of the jobs, in as many processes as there are processors.

    `function` compiles kernels, which other processes then find in the compilers' caches.
    """
    count = os.cpu_count() or 1
    size = max(min(_BATCH, -(-len(jobs) // count)), 1)
    batches = [jobs[i : i + size] for i in range(0, len(jobs), size)]
    spawn = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    with concurrent.futures.ProcessPoolExecutor(count, mp_context=spawn) as pool:
        list(pool.map(function, batches))


def _compile(jobs: Sequence[tuple[int, int, Fields]]) -> None:
    from compiledllm.kernels.skinny_triton import Tiling, skinny_linear

    for num_rows, num_inputs, fields in jobs:
        x, weight = (
            torch.zeros(n, num_inputs, device="cuda", dtype=torch.bfloat16) for n in (num_rows, 256)
        )
        try:
            skinny_linear(x, weight, None, Tiling(*fields))
        except out_of_resources():
            continue


def write_table(
    path: Path,
    entries: Iterable[dict[str, Any]],
    measured: Iterable[tuple[int, Shape]],
    platform: Platform,
    quantized: Mapping[QuantizedKey, dict[str, Any] | None] | None = None,
    experts: Mapping[ExpertProduct, dict[str, Any] | None] | None = None,
) -> None:
    """Write a table. Entries of the file stay, except for the products that were measured again.

    measured: (rows, shape) of each 16-bit product that was measured. quantized, experts: an entry
    for each product with a quantised matrix, or of experts, that was measured; None: the rule is
    good enough.
    """
    old = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    kept = {_key(e): e for e in old.get("products", ())}
    for num_rows, (num_outputs, num_inputs) in measured:
        kept.pop((padded_rows(num_rows), num_inputs, num_outputs), None)
    kept |= {_key(e): e for e in entries}
    others = {quantized_key(e): e for e in old.get("quantized", ())} | dict(quantized or {})
    of_experts = {expert_key(e): e for e in old.get("experts", ())} | dict(experts or {})
    facts = {"gpu": platform.name, "versions": platform.versions()}
    parts = [f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in facts.items()]
    parts += [_list("products", kept), _list("quantized", others), _list("experts", of_experts)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(filter(None, parts)) + "\n}\n", encoding="utf-8")


def _list(name: str, entries: Mapping[Any, dict[str, Any] | None]) -> str:
    """A list of the table, one entry per line. Only the list "products" may be empty."""
    found = (entries[key] for key in sorted(entries))
    lines = ",\n".join(f"    {json.dumps(entry)}" for entry in found if entry is not None)
    return f'  "{name}": [\n{lines}\n  ]' if lines or name == "products" else ""


def _key(entry: dict[str, Any]) -> tuple[int, int, int]:
    return padded_rows(entry["rows"]), entry["inputs"], entry["outputs"]


def quantized_key(entry: Mapping[str, Any]) -> QuantizedKey:
    rows = padded_rows_of_quantized(entry["rows"])
    return entry["layout"], rows, entry["inputs"], entry["outputs"]


def check_gpu(platform: Platform, command: str = "bench tilings") -> None:
    if not platform.is_cuda:
        raise ConfigError(
            f"{command} measures kernels of a GPU, and there is none here: run it on a machine "
            "with an NVIDIA GPU"
        )
