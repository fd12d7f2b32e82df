"""Compiles CUDA C++ kernels with NVRTC, which is part of torch, and launches them with the driver.

Some kernels must control which lane of a warp holds which element, in order to decode 4- and 8-bit
weights into the registers of a tensor-core instruction; Triton has no such control. The sources lie
in `kernels/cuda/`. Machine code is cached in the folder `nvrtc` of `compiledllm.caches`, under a
hash of the source, the CUDA version and the compiler's flags.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import re
import threading
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compiledllm.caches import replaced, writable_folder
from compiledllm.kernels import compile_ahead, late_compiles
from compiledllm.kernels.machine_code import (
    COOPERATIVE,
    OVERLAP,
    CudaError,
    LaunchAttribute,
    LaunchConfig,
    check,
    cluster_of,
    driver,
    load,
)
from compiledllm.platform import can_overlap_kernels

log = logging.getLogger("compiledllm")

SOURCES = Path(__file__).parent / "cuda"
_INCLUDE = re.compile(r'^#include "([^"]+)"$', re.MULTILINE)
# File name in the cache -> machine code that this process has used, or has read from an artifact.
known_code: dict[str, bytes] = {}
_locks: dict[str, threading.Lock] = {}  # file name -> lock of the thread that compiles the code


class CudaKernel:
    """The kernel `name` of `kernels/cuda/<source>`, compiled for the current device.

    options: values of the source's macros, by name. shared_bytes: dynamic shared memory of a thread
    block. Raises CudaError if the kernel cannot be compiled or loaded. Within
    `compile_ahead.asking`, another thread compiles the kernel, and the first use raises the error.
    """

    def __init__(self, source: str, name: str, options: Mapping[str, int], shared_bytes: int = 0):
        sorted_options = tuple(sorted(options.items()))
        self._code = functools.partial(_compiled, source, sorted_options, _architecture())
        self._name, self._shared_bytes = name, shared_bytes
        self._max_clusters: dict[tuple[int, int], int] = {}
        if not compile_ahead.ask(self._code):
            self._function  # noqa: B018 - raises the error now

    @functools.cached_property
    def _function(self) -> Any:
        """The driver's function."""
        return load(self._code(), self._name, self._shared_bytes)

    def launch(
        self,
        grid: Sequence[int],
        num_threads: int,
        arguments: Sequence[Tensor | ctypes.Structure | _Scalar | None],
        cluster: int = 1,
        is_cooperative: bool = False,
    ) -> None:
        """Launch on torch's current stream.

        grid: numbers of thread blocks in up to three dimensions. num_threads: threads per block.
        arguments: a tensor is passed as its address, None as a null pointer. cluster: number of
        thread blocks of a cluster, see `machine_code.cluster_of`. is_cooperative: whether the
        thread blocks wait for each other and therefore must all run at once. On a GPU with
        programmatic dependent launch a kernel that is not cooperative may start before its
        predecessor has ended, so its code must wait (`griddepcontrol.wait`). Raises CudaError.
        Within `compile_ahead.asking`, nothing is launched.
        """
        if compile_ahead.is_asking():
            return
        values = [_value_of(argument) for argument in arguments]
        addresses = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        attributes = _attributes(cluster, is_cooperative)
        config = LaunchConfig(
            (ctypes.c_uint * 3)(*grid, *(1,) * (3 - len(grid))),
            (ctypes.c_uint * 3)(num_threads, 1, 1),
            self._shared_bytes,
            torch.cuda.current_stream().cuda_stream,
            ctypes.addressof(attributes),
            len(attributes),
        )
        check(driver().cuLaunchKernelEx(ctypes.byref(config), self._function, addresses, None))

    def max_clusters(self, num_threads: int, cluster: int) -> int:
        """The number of clusters that run at once on the device. Raises CudaError.

        A cluster lies within a group of neighbouring multiprocessors, whose number differs between
        chips of one kind, so that some multiprocessors may be left over. num_threads: threads of a
        block. cluster: thread blocks of a cluster.
        """
        key = num_threads, cluster
        if key not in self._max_clusters:
            self._max_clusters[key] = self._count_clusters(*key)
        return self._max_clusters[key]

    def _count_clusters(self, num_threads: int, cluster: int) -> int:
        attributes = (LaunchAttribute * 1)(cluster_of(cluster))
        config = LaunchConfig(
            (ctypes.c_uint * 3)(cluster, 1, 1),
            (ctypes.c_uint * 3)(num_threads, 1, 1),
            self._shared_bytes,
            None,
            ctypes.addressof(attributes),
            len(attributes),
        )
        count = ctypes.c_int()
        find = driver().cuOccupancyMaxActiveClusters
        check(find(ctypes.byref(count), self._function, ctypes.byref(config)))
        return count.value


def kernel_unless_broken(
    instead: str, source: str, name: str, options: Mapping[str, int], shared_bytes: int = 0
) -> CudaKernel | None:
    """As `CudaKernel`; None, after a warning, if the kernel cannot be compiled or loaded.

    instead: the sentence that says what computes instead. Within `compile_ahead.asking`, errors are
    not known yet, so a cache of the result needs `compile_ahead.is_asking()` in its key.
    """
    try:
        return CudaKernel(source, name, options, shared_bytes)
    except CudaError as error:
        log.warning("%s: %s", instead, error)
        return None


def begins_at_16_bytes(*tensors: Tensor) -> bool:
    """Whether each row (of the first dimension) of these tensors does.

    Kernels that load or copy 16 bytes at a time need it.
    """
    return all(x.stride(0) * x.itemsize % 16 == 0 and x.data_ptr() % 16 == 0 for x in tensors)


def compile_together(source: str, options: Sequence[Mapping[str, int]]) -> None:
    """Compile kernels of one source at the same time, for the current device.

    options: values of the source's macros for each kernel. `CudaKernel` raises the errors. Within
    `compile_ahead.asking`, this function does nothing, as each `CudaKernel` asks for its code.
    """
    if compile_ahead.is_asking():
        return
    architecture = _architecture()

    def compile_one(macros: Mapping[str, int]) -> None:
        with suppress(CudaError):
            _compiled(source, tuple(sorted(macros.items())), architecture)

    with ThreadPoolExecutor(len(options)) as threads:
        list(threads.map(compile_one, options))


_Scalar = ctypes.c_int | ctypes.c_longlong | ctypes.c_float


@functools.cache
def _attributes(cluster: int, is_cooperative: bool) -> ctypes.Array[LaunchAttribute]:
    overlaps = can_overlap_kernels() and not is_cooperative
    found = [OVERLAP] * overlaps + [cluster_of(cluster)] * (cluster > 1)
    found += [COOPERATIVE] * is_cooperative
    return (LaunchAttribute * len(found))(*found)


def _value_of(argument: Tensor | ctypes.Structure | _Scalar | None) -> Any:
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    return ctypes.c_void_p(None) if argument is None else argument


# -- compiling -------------------------------------------------------------------------------------


def _compiled(source: str, options: tuple[tuple[str, int], ...], architecture: str) -> bytes:
    """The machine code: from the cache, or compiled now and added to the cache."""
    text = _with_includes((SOURCES / source).read_text(encoding="utf-8"))
    macros = [f"-D{name}={int(value)}" for name, value in options]
    flags = [f"--gpu-architecture={architecture}", "--std=c++17", *macros]
    key = hashlib.sha256("\0".join([text, str(torch.version.cuda), *flags]).encode()).hexdigest()
    name = f"{Path(source).stem}-{key[:32]}.cubin"
    with _locks.setdefault(name, threading.Lock()):
        if name not in known_code:
            path = writable_folder("nvrtc") / name
            if path.is_file():
                known_code[name] = path.read_bytes()
            else:
                late_compiles.note(source)
                known_code[name] = _compile(text, source, flags)
                _keep(known_code[name], path)
    return known_code[name]


def _keep(code: bytes, path: Path) -> None:
    """Write a file of the cache atomically. Only warn if the folder cannot be written."""
    try:
        with replaced(path) as file:
            file.write(code)
    except OSError as error:
        warnings.warn(f"a compiled kernel is not kept for the next start: {error}", stacklevel=2)


def _with_includes(text: str) -> str:
    """The source with each `#include "x"` replaced by the text of x, which may include files, too.

    A file that several others include is inserted once.
    """
    included: set[str] = set()

    def insert(match: re.Match[str]) -> str:
        if match[1] in included:
            return ""
        included.add(match[1])
        header = (SOURCES / match[1]).read_text(encoding="utf-8").replace("#pragma once\n", "")
        return _INCLUDE.sub(insert, header)

    return _INCLUDE.sub(insert, text)


def _compile(text: str, name: str, flags: Sequence[str]) -> bytes:
    nvrtc, program, size = _nvrtc(), ctypes.c_void_p(), ctypes.c_size_t()
    source = text.encode(), name.encode()
    _check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), *source, 0, None, None))
    encoded = (ctypes.c_char_p * len(flags))(*(flag.encode() for flag in flags))
    if nvrtc.nvrtcCompileProgram(program, len(flags), encoded):
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, log)
        raise CudaError(f"{name} with {' '.join(flags)} cannot be compiled: {log.value.decode()}")
    _check(nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)))
    code = ctypes.create_string_buffer(size.value)
    _check(nvrtc.nvrtcGetCUBIN(program, code))
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return code.raw


def _check(status: int) -> None:
    """Raise CudaError for a status of NVRTC other than success."""
    if status:
        describe = _nvrtc().nvrtcGetErrorString
        describe.restype = ctypes.c_char_p
        raise CudaError(f"NVRTC reports {status}: {(describe(status) or b'unknown').decode()}")


@functools.cache
def _architecture() -> str:
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}a" if major == 9 else f"sm_{major}{minor}"


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    major = str(torch.version.cuda).split(".")[0]
    for name in (f"libnvrtc.so.{major}", "libnvrtc.so"):
        try:
            return ctypes.CDLL(name)  # loaded with torch
        except OSError:
            continue
    raise CudaError(f"libnvrtc.so.{major}, a part of torch's CUDA packages, cannot be loaded")
