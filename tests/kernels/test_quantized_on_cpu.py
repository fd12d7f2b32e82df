"""The CUDA kernels of quantised matrices, compiled for a CPU: their values in every layout."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from compiledllm.kernels import quantized_cuda
from compiledllm.models.formats.codes import QuantizedMatrix, dequantize
from compiledllm.models.formats.compressed_config import MXFP4, NVFP4
from compiledllm.models.formats.gguf_blocks import KINDS as GGUF
from compiledllm.models.formats.gguf_blocks import from_gguf
from compiledllm.models.formats.packed import PackedFormat, for_device
from compiledllm.models.formats.quantized import Quantized
from compiledllm.models.matrices import QuantSpec
from tests.support.cuda_on_cpu import use_cuda_kernels_on_cpu
from tests.support.gguf_blocks import random_blocks

SPECS = {
    "fp8": QuantSpec("fp8"),
    "fp8 blocks": QuantSpec("fp8", 128, 128),
    "int8": QuantSpec("int8"),
    "int8, zeros": QuantSpec("int8", 32, has_zeros=True, scale_dtype="float16"),
    "int4": QuantSpec("int4", 64, scale_dtype="bfloat16"),
    "int4, zeros": QuantSpec("int4", 64, has_zeros=True, scale_dtype="float16"),
    "mxfp4": MXFP4,
    "nvfp4": NVFP4,
}
NUM_OUTPUTS = 21
DTYPES = (torch.bfloat16, torch.float16)


def make_matrix(kind: str, num_inputs: int) -> tuple[QuantSpec, QuantizedMatrix]:
    torch.manual_seed(0)
    if kind in GGUF:
        num_blocks = num_inputs // (256 if "K" in kind else 32)
        blocks = random_blocks(kind, NUM_OUTPUTS, num_blocks, seed=3, spread=1 / 64)
        return GGUF[kind].spec, from_gguf(blocks, kind)
    spec = SPECS[kind]
    groups = math.ceil(NUM_OUTPUTS / spec.rows), math.ceil(num_inputs / (spec.group or num_inputs))
    shape = NUM_OUTPUTS, num_inputs
    scales = torch.rand(groups) / 16 + 0.03
    if spec.scale_dtype == "float8_e8m0fnu":
        scales = scales.log2().floor().exp2()
    scales = scales.to(getattr(torch, spec.scale_dtype))
    block = spec.rows if spec.rows > 1 else None
    if spec.code == "fp8":
        codes = torch.randn(shape).to(torch.float8_e4m3fn)
        return spec, QuantizedMatrix("fp8", codes, scales, block=block)
    low, high, dtype = (-128, 128, torch.int8) if spec.code == "int8" else (0, 16, torch.uint8)
    codes = torch.randint(low, high, shape, dtype=dtype)
    zeros = torch.randint(low, high, groups, dtype=dtype) if spec.has_zeros else None
    factors = torch.rand(NUM_OUTPUTS, 1).double() + 0.5 if spec.has_row_factor else None
    return spec, QuantizedMatrix(spec.code, codes, scales, zeros, super_scales=factors)


def pack(
    spec: QuantSpec, matrix: QuantizedMatrix, num_inputs: int
) -> tuple[PackedFormat, list[Tensor | None]]:
    format = Quantized(spec)
    params = [*format.parameters({"": NUM_OUTPUTS}, num_inputs).values()]
    format.slots({"": NUM_OUTPUTS}, num_inputs, params)["weight"].put(matrix)
    finished = for_device(spec, params, num_inputs)
    assert finished is not None
    found, tensors = finished
    assert isinstance(found, PackedFormat)
    return found, [*tensors.values()]


# Each kind in one dtype, with 1 or 9 rows of inputs; neighbours share the kernels' code.
CASES = [
    (kind, DTYPES[index // 2 % 2], (1, 9)[index % 2]) for index, kind in enumerate([*SPECS, *GGUF])
]


@pytest.mark.parametrize(("kind", "dtype", "num_rows"), CASES, ids=str)
@torch.inference_mode()
def test_rows_and_products_equal_the_dequantised_matrix(
    kind: str, dtype: torch.dtype, num_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_cuda_kernels_on_cpu(monkeypatch)
    monkeypatch.setattr(torch, "get_default_dtype", lambda: dtype)
    # Two units of 128 inputs and a half, where that is whole groups.
    num_inputs = 512 if "K" in kind else 384 if "blocks" in kind else 320
    spec, matrix = make_matrix(kind, num_inputs)
    format, params = pack(spec, matrix, num_inputs)
    exact = dequantize(matrix)
    ids = torch.tensor([20, 0, 7, 8, 15, 16, 3, 3, 19, 12, 11, 10, 9, 1, 2, 4, 5, 20])
    rows = format.rows(ids, params, num_inputs, dtype)
    expected = exact[ids]
    if spec.has_row_factor:  # the kernel multiplies by a rounded factor
        torch.testing.assert_close(rows.float(), expected, rtol=2**-7.99, atol=1e-7)
        assert (rows == expected.to(rows.dtype)).float().mean() > 0.99
    else:
        assert torch.equal(rows, expected.to(rows.dtype))
    x = torch.randn(num_rows, num_inputs).to(dtype)
    wanted = x.double() @ exact.double().T
    found, atol = format.product(x, params, None), float(wanted.abs().max()) * 2**-7
    torch.testing.assert_close(found.double(), wanted, atol=atol, rtol=2**-7)


@torch.inference_mode()
def test_large_heads_are_dequantised_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    use_cuda_kernels_on_cpu(monkeypatch)
    monkeypatch.setattr(torch, "get_default_dtype", lambda: torch.bfloat16)
    monkeypatch.setattr(quantized_cuda, "_MAX_DEQUANTIZED", 128 * 128)
    x = torch.randn(70, 128).bfloat16()
    for spec in (SPECS["nvfp4"], SPECS["int8"]):
        num_outputs, format = 300, Quantized(spec)
        params = [*format.parameters({"": num_outputs}, 128).values()]
        format.randomize(params, 0.1, torch.Generator())
        expected = format.product(x.float(), params, None)
        packed, tensors = for_device(spec, params, 128)
        out = torch.empty(70, num_outputs, dtype=torch.bfloat16)
        for found in (
            packed.product(x, [*tensors.values()], None),
            packed.product(x, [*tensors.values()], None, out=out),
        ):
            torch.testing.assert_close(found.float(), expected, atol=0.05, rtol=0.02)
