"""Errors of NVRTC, which has status numbers and texts of its own."""

from __future__ import annotations

import pytest

from compiledllm.kernels import cuda_kernel
from compiledllm.kernels.machine_code import CudaError


class _Describe:
    def __call__(self, status: int) -> bytes:
        return f"NVRTC_ERROR_{status}".encode()


class _FullNvrtc:
    """Creates no program. `nvrtcGetErrorString` is an object, as ctypes sets its result type."""

    nvrtcGetErrorString = _Describe()  # noqa: N815

    def nvrtcCreateProgram(self, *_: object) -> int:  # noqa: N802
        return 1


def test_error_of_nvrtc_is_described_by_nvrtc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_kernel, "_nvrtc", _FullNvrtc)

    def no_driver() -> None:
        raise AssertionError("the driver numbers its errors otherwise")

    monkeypatch.setattr("compiledllm.kernels.machine_code.driver", no_driver)
    with pytest.raises(CudaError, match="NVRTC reports 1: NVRTC_ERROR_1"):
        cuda_kernel._compile("", "empty.cu", [])
