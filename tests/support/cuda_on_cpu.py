"""Runs kernels of `kernels/cuda/` on a CPU: a replacement for `CudaKernel`, to test their results.

`cuda_on_cpu.h` replaces `ptx.cuh`, and `emulated_hopper.h` replaces `hopper.cuh`; all other code is
the kernels' own. Needs g++.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from compiledllm.caches import writable_folder
from compiledllm.kernels.cuda_kernel import SOURCES, _value_of

_HERE = Path(__file__).parent
_HEADERS = {
    "ptx.cuh": _HERE / "cuda_on_cpu.h",
    "cluster.cuh": _HERE / "cluster_on_cpu.h",
    "tensor_copies.cuh": _HERE / "tensor_copies_on_cpu.h",
    "wgmma.cuh": _HERE / "wgmma_on_cpu.h",
    "hopper.cuh": _HERE.parent / "kernels" / "emulated_hopper.h",
    "e4m3.cuh": _HERE / "e4m3_on_cpu.h",
    "fibers.h": _HERE / "fibers.h",
}
_COMPILING = threading.Lock()
# Without unique symbols, so that libraries do not share their static variables.
_FLAGS = "-O1", "-std=c++17", "-fPIC", "-w", "-fno-strict-aliasing", "-fno-gnu-unique"
_LAUNCH = """
extern "C" bool launch(
    unsigned x, unsigned y, unsigned count, unsigned shared, unsigned at_once, unsigned seed,
    void** arguments) {
    return run_grid(call(%s, arguments), x, y, count, shared, at_once, seed);
}
"""


class CpuKernel:
    """Has the interface of `cuda_kernel.CudaKernel`.

    seed: if not 0, threads take turns in random orders, and copies arrive late.
    """

    seed = 0

    def __init__(self, source: str, name: str, options: Mapping[str, int], shared_bytes: int = 0):
        with _COMPILING:
            library = _compiled(source, name, tuple(sorted(options.items())))
        self._launch = self._loaded(library)
        self._shared_bytes = shared_bytes

    def _loaded(self, library: Path) -> Any:
        launch = ctypes.CDLL(str(library)).launch
        launch.restype = ctypes.c_bool
        return launch

    def launch(
        self,
        grid: Sequence[int],
        num_threads: int,
        arguments: Sequence[Any],
        cluster: int = 1,
        is_cooperative: bool = False,
    ) -> None:
        values = [_value_of(argument) for argument in arguments]
        addresses = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        x, y = (*grid, 1)[:2]
        at_once = x if is_cooperative else cluster
        how = x, y, num_threads, self._shared_bytes, at_once, self.seed
        assert self._launch(*how, addresses), "the threads wait for ever"


class LoneCpuKernel(CpuKernel):
    """A kernel that may run while the same kernel runs in another thread."""

    def _loaded(self, library: Path) -> Any:
        # The dynamic loader loads each file only once, and its global variables exist only once.
        with tempfile.NamedTemporaryFile(suffix=".so") as copy:
            shutil.copyfile(library, copy.name)
            return super()._loaded(Path(copy.name))


@functools.cache
def _compiled(source: str, name: str, options: tuple[tuple[str, int], ...]) -> Path:
    text = text_of(source) + _LAUNCH % name
    text = re.sub(r"extern __shared__ .* u8 (\w+)\[\];", r"u8* const \1 = dynamic_memory;", text)
    return library_of(text, options)


def text_of(source: str) -> str:
    """The text of a file of `kernels/cuda/`, with its headers or their replacements inserted."""
    path = _HEADERS.get(source, SOURCES / source)
    text = path.read_text(encoding="utf-8").replace("#pragma once", "")
    return re.sub(r'(?m)^#include "([^"]+)"$', lambda found: text_of(found[1]), text)


def library_of(text: str, options: Iterable[tuple[str, int]]) -> Path:
    """The library compiled from the text, with options as macros. Libraries are cached on disk."""
    macros = [f"-D{key}={int(value)}" for key, value in options]
    key = hashlib.sha256("\0".join([text, *_FLAGS, *macros]).encode()).hexdigest()[:32]
    library = writable_folder("cuda-on-cpu") / f"{key}.so"
    if not library.exists():
        flags = "-shared", "-include", str(_standard_headers()), *macros
        _compile("c++", "-", library, *flags, text=text)
    return library


@functools.cache
def _standard_headers() -> Path:
    """A copy of `standard.h` beside its compiled form, which spares g++ a quarter of its time."""
    text = (_HERE / "standard.h").read_text(encoding="utf-8")
    key = hashlib.sha256("\0".join([text, *_FLAGS]).encode()).hexdigest()[:32]
    header = writable_folder("cuda-on-cpu") / f"{key}.h"
    compiled = header.with_suffix(".h.gch")
    if not compiled.exists():
        unfinished = header.with_suffix(f".{os.getpid()}.h")
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(header)
        _compile("c++-header", str(header), compiled)
    return header


def _compile(language: str, source: str, result: Path, *flags: str, text: str = "") -> None:
    """Compile `text` (source "-") or a file. Processes that compile the same at once do no harm."""
    unfinished = result.with_suffix(f".{os.getpid()}")
    command = ["g++", "-x", language, source, *_FLAGS, *flags, "-o", str(unfinished)]
    subprocess.run(command, input=text, text=True, check=True, stderr=sys.stderr)
    unfinished.replace(result)


def use_cuda_kernels_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pack quantised matrices as on a GPU, and multiply by the CUDA kernels."""
    if shutil.which("g++") is None or torch.cuda.is_available():
        pytest.skip("runs CUDA kernels on a CPU, with g++, where there is no GPU")
    from compiledllm.kernels import quantized_cuda
    from compiledllm.models.formats import packed

    monkeypatch.setattr(quantized_cuda, "CudaKernel", CpuKernel)
    monkeypatch.setattr(packed, "can_pack", lambda device: True)
    for cached in (quantized_cuda._linear_kernel, quantized_cuda._dequantize_kernel):
        cached.cache_clear()
