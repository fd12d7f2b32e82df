"""Tables of tilings: what was measured on one kind of GPU, where the rules in code are slower.

A table is a JSON file named after its GPU. Tables in `tilings/` come with the package; one of the
machine's own, made by `compiledllm bench tilings`, goes before them. A shape without an entry, and
a GPU without a table, have the tilings of the rules.
"""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger("compiledllm")

_SHIPPED = Path(__file__).with_name("tilings")
# (padded rows, outputs, inputs) -> the fields of a `skinny_triton.Tiling`
Products = dict[tuple[int, int, int], tuple[int, ...]]
_own_folder: Path | None = None
_products: dict[str, Products] = {}  # by the GPU's name


def file_name(gpu: str) -> str:
    """The name of a GPU's table: "NVIDIA H200" -> "nvidia-h200.json"."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json"


def padded_rows(num_rows: int) -> int:
    """The number of rows that a product computes for `num_rows` (1 to 32): 1, 16 or 32."""
    return 1 if num_rows == 1 else 16 if num_rows <= 16 else 32


def use_folder(folder: Path) -> None:
    """From now on read the machine's own tables from here, too."""
    global _own_folder
    _own_folder = folder
    _products.clear()


def product_tiling(num_rows: int, num_outputs: int, num_inputs: int) -> tuple[int, ...] | None:
    """The fields of the tiling measured for a product on the current GPU; None: not measured."""
    if not torch.cuda.is_available():
        return None
    gpu = torch.cuda.get_device_name(torch.cuda.current_device())
    if gpu not in _products:
        _products[gpu] = _read_products(gpu)
    return _products[gpu].get((padded_rows(num_rows), num_outputs, num_inputs))


def _read_products(gpu: str) -> Products:
    found: Products = {}
    for folder in (_SHIPPED, _own_folder):
        path = folder / file_name(gpu) if folder else None
        if path is None or not path.is_file():
            continue
        try:
            found |= parse_products(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError, LookupError) as error:
            log.warning(
                "%s is no table of tilings (%s); delete it, or make it again with "
                "'compiledllm bench tilings'",
                path,
                error,
            )
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
