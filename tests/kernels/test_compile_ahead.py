"""Threads compile what a step asks for; only the thread that asks launches nothing."""

from __future__ import annotations

import functools
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

from compiledllm.kernels import cuda_kernel
from compiledllm.kernels.compile_ahead import (
    _Compilers,
    _hash_compiler,
    _switching_often,
    asking,
    in_threads,
)
from compiledllm.kernels.machine_code import CudaError


def test_other_threads_still_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    jit = pytest.importorskip("triton.runtime.jit")
    launched: list[tuple[str, bool]] = []

    def run(kernel: object, name: str, grid: object, warmup: bool) -> None:
        launched.append((name, warmup))

    monkeypatch.setattr(jit.JITFunction, "run", run)
    kernel = object.__new__(jit.JITFunction)
    with asking():
        kernel.run("own", grid=(1,), warmup=False)
        other = threading.Thread(
            target=kernel.run, args=("other",), kwargs={"grid": (1,), "warmup": False}
        )
        other.start()
        other.join()
    kernel.run("after", grid=(1,), warmup=False)
    assert launched == [("own", True), ("other", False), ("after", False)]


def test_launchers_are_built_by_the_threads_that_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia = pytest.importorskip("triton.backends.nvidia.driver")
    built: list[tuple[object, str]] = []

    def launcher(src: object, metadata: object) -> None:
        built.append((src, threading.current_thread().name))
        raise RuntimeError("there is no C compiler")  # the first launch says so

    monkeypatch.setattr(nvidia, "CudaLauncher", launcher)
    kernel = SimpleNamespace(src="source", metadata=None)
    with ThreadPoolExecutor(1, thread_name_prefix="compile") as threads:
        assert _Compilers(threads).submit(lambda: kernel).result() is kernel
    assert built == [("source", "compile_0")]


def test_triton_is_hashed_once_by_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = pytest.importorskip("triton.runtime.cache")
    names: list[str] = []

    @functools.lru_cache
    def triton_key() -> str:
        names.append(threading.current_thread().name)
        return "key"

    monkeypatch.setattr(cache, "triton_key", triton_key)
    for _ in range(2):
        with ThreadPoolExecutor(1, thread_name_prefix="compile") as threads:
            _hash_compiler(threads)
        assert cache.triton_key() == "key"
    assert names == ["compile_0"]


def test_cuda_kernels_of_one_source_are_compiled_at_the_same_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = threading.Barrier(2, timeout=60)

    def compile_one(text: str, name: str, flags: list[str]) -> bytes:
        together.wait()
        if "-DSTAGES=3" in flags:
            raise CudaError("too much shared memory")  # which making the kernel reports
        return b"code"

    monkeypatch.setattr(cuda_kernel, "_architecture", lambda: "sm_90a")
    monkeypatch.setattr(cuda_kernel, "_compile", compile_one)
    monkeypatch.setattr(cuda_kernel, "writable_folder", lambda _: tmp_path)
    monkeypatch.setattr(cuda_kernel, "known_code", known := {})
    cuda_kernel.compile_together("linear.cu", [{"STAGES": 2}, {"STAGES": 3}])
    assert list(known.values()) == [b"code"]


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
def test_a_cuda_kernel_that_is_asked_for_is_compiled_once_by_a_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiling, made = threading.Event(), []

    def compile_one(text: str, name: str, flags: list[str]) -> bytes:
        compiling.set()
        go_on.wait(60)
        made.append(threading.current_thread().name)
        return b"code"

    def load(code: bytes, name: str, shared_bytes: int) -> bytes:
        made.append(name)
        return code

    go_on = threading.Event()
    monkeypatch.setattr(cuda_kernel, "_architecture", lambda: "sm_90a")
    monkeypatch.setattr(cuda_kernel, "_compile", compile_one)
    monkeypatch.setattr(cuda_kernel, "load", load)
    monkeypatch.setattr(cuda_kernel, "writable_folder", lambda _: tmp_path)
    monkeypatch.setattr(cuda_kernel, "known_code", {})
    with in_threads():
        with asking():
            kernel = cuda_kernel.CudaKernel("linear.cu", "linear", {"STAGES": 2})
            kernel.launch((1,), 32, [])
        assert compiling.wait(60) and not made
        threading.Timer(0.05, go_on.set).start()
        assert kernel._function == b"code"  # waits for the thread
    assert len(made) == 2 and made[0].startswith("compile_") and made[1] == "linear"


def test_threads_get_pythons_lock_soon_while_an_engine_starts() -> None:
    before = sys.getswitchinterval()
    with _switching_often():
        assert sys.getswitchinterval() < before
        with _switching_often():  # another engine, which may be ready later
            pass
        assert sys.getswitchinterval() < before
    assert sys.getswitchinterval() == before
