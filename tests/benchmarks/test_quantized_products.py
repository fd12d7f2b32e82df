"""The measurement of matmuls with large quantised matrices, without a GPU; times are made up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compiledllm import ConfigError
from compiledllm.benchmarks import quantized_products, quantized_tilings, report, tilings
from compiledllm.benchmarks.floor import Ceilings
from compiledllm.benchmarks.quantized_tilings import FORMATS, Product
from compiledllm.kernels.packed import Layout
from tests.support.cuda_on_cpu import use_cuda_kernels_on_cpu

CEILINGS = Ceilings(1e12, 4e12, 1e15)


@pytest.mark.parametrize(
    ("format", "num_bytes"),
    [
        ("int4", 4096 * 4096 // 2 + 4096 * 32 * 2),  # bfloat16 scales of 128 inputs
        ("fp8", 4096 * 4096 + 4096 * 4),
        ("fp8_block", 4096 * 4096 + 32 * 32 * 4),
        ("mxfp4", 4096 * 4096 // 2 + 4096 * 128),
    ],
)
def test_a_row_has_the_bytes_of_codes_and_scales(format: str, num_bytes: int) -> None:
    product = Product(FORMATS[format], 4096, 4096, 8)
    row = quantized_products.make_row(format, product, 1e-5, CEILINGS)
    assert (row["format"], row["rows"], row["outputs"], row["inputs"]) == (format, 8, 4096, 4096)
    assert (row["us"], row["bytes"]) == (10.0, num_bytes)
    assert row["bytes_per_s"] == pytest.approx(num_bytes * 1e5, rel=1e-3)
    assert row["share_of_copy_rate"] == pytest.approx(num_bytes * 1e5 / 4e12, rel=5e-3)


def test_only_large_matrices_are_measured_in_each_format(
    tiny_llama: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = Layout("fp8", 0, "float32", False)
    monkeypatch.setattr(quantized_tilings, "_layout", lambda spec, num_inputs: layout)
    model = str(tiny_llama(hidden_size=256))
    monkeypatch.setattr(quantized_products, "MIN_BYTES", 512 * 256)
    found = quantized_products.large_products(model, ["int8", "fp8", "int4"], [1, 8])
    assert [(name, *product[1:]) for name, product in found] == [
        (name, 512, 256, rows) for name in ("int8", "fp8") for rows in (1, 8)
    ]
    for formats, named in (["int4"], "MB in int4 that"), ([], "MB in a quantised format that"):
        with pytest.raises(ConfigError, match=f"{named} .* choose other --formats") as caught:
            quantized_products.large_products(model, formats, [1])
        assert "\n" not in str(caught.value)


def test_every_copy_of_a_matrix_is_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the kernels compiled for a CPU."""
    use_cuda_kernels_on_cpu(monkeypatch)
    monkeypatch.setattr(quantized_tilings, "_DEVICE", "cpu")
    monkeypatch.setattr(tilings, "num_copies", lambda num_bytes: 3)

    def seconds(calls: list[Any], device: torch.device) -> float:
        first, *others = [call() for call in calls]
        assert len(others) == 2 and all(torch.equal(first, other) for other in others)
        assert len({call.args[1].data_ptr() for call in calls}) == 3
        return 1e-6 * len(first)

    monkeypatch.setattr(quantized_products, "seconds_per_call", seconds)
    products = [
        (name, Product(FORMATS[name], 32, 256, n)) for name in ("int4", "int8") for n in (1, 3)
    ]
    rows = list(quantized_products.measure(products, CEILINGS))
    figures = [(row["format"], row["rows"], row["us"]) for row in rows]
    assert figures == [("int4", 1, 1.0), ("int4", 3, 3.0), ("int8", 1, 1.0), ("int8", 3, 3.0)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_script_ends_with_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["quantized_products", "m", "--formats", "fp8"])
    with pytest.raises(SystemExit, match="2"):
        report.run_script(quantized_products.main)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: quantized_products measures") and "there is none here" in line
