"""What NVRTC is given, and its errors, which have status numbers and texts of their own."""

from __future__ import annotations

import re
from pathlib import Path

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


@pytest.mark.parametrize("source", sorted(cuda_kernel.SOURCES.glob("*.cu")), ids=lambda p: p.name)
def test_sources_are_compiled_with_all_headers(source: Path) -> None:
    """NVRTC finds no files; headers of headers are inserted, too, and each once."""
    text = cuda_kernel._with_includes(source.read_text(encoding="utf-8"))
    assert "#include" not in text and "#pragma once" not in text
    functions = re.findall(r"(?m)^__device__ __forceinline__ \w+ (address)\(", text)
    assert len(functions) == 1
