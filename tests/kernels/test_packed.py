"""Quantised matrices for the GPU kernels: what can be tested without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compiledllm.kernels import cuda_kernel
from compiledllm.kernels.packed import pack
from compiledllm.models.formats import packed
from compiledllm.models.formats.packed import for_device
from compiledllm.models.matrices import QuantSpec


@pytest.mark.parametrize("num_inputs", [120, 124])
def test_rows_that_cannot_be_loaded_16_bytes_at_once_are_not_packed(num_inputs: int) -> None:
    """4-bit codes are padded to 128 inputs, but x is not."""
    codes, scales = torch.zeros(16, 128, dtype=torch.uint8), torch.ones(16, 1)
    found = pack("int4", codes, scales, None, num_inputs)
    assert (found is not None) == (num_inputs % 8 == 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_matrices_of_a_float32_model_are_not_packed(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels read inputs of 16 bits."""
    monkeypatch.setattr(packed, "can_pack", lambda device: True)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        params = [torch.zeros(16, 128, dtype=torch.int8), torch.ones(16, 1), None, None, None, None]
        found = for_device(QuantSpec("int8"), params, 128)
    finally:
        torch.set_default_dtype(default)
    assert (found is None) == (dtype == torch.float32)


def test_inputs_at_odd_addresses_are_copied() -> None:
    pytest.importorskip("triton")
    from compiledllm.kernels.quantized_cuda import _aligned

    buffer = torch.randn(3 * 64 + 1).bfloat16()
    x = buffer[1:].view(3, 64)  # contiguous, but not at a multiple of 16 bytes
    found = _aligned(x)
    assert found.data_ptr() % 16 == 0 and torch.equal(found, x)
    assert _aligned(found) is found


def test_kernel_is_used_where_the_cache_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_kernel, "_compile", lambda text, name, flags: b"code")
    monkeypatch.setattr(cuda_kernel, "known_code", {})
    monkeypatch.setattr(cuda_kernel, "writable_folder", lambda _: tmp_path / "not there")
    with pytest.warns(UserWarning, match="is not kept for the next start"):
        assert cuda_kernel._compiled("dequantize.cu", (("CODE", 1),), "sm_90") == b"code"
    cuda_kernel.known_code.clear()
    monkeypatch.setattr(cuda_kernel, "writable_folder", lambda _: tmp_path)
    assert cuda_kernel._compiled("dequantize.cu", (("CODE", 1),), "sm_90") == b"code"
    (kept,) = tmp_path.iterdir()
    assert kept.suffix == ".cubin" and kept.read_bytes() == b"code"
