"""The machine's measured ceilings: memory reads, memory copies, and matrix products.

Each figure is the best of several runs. Buffers are several times the last-level cache.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path

import torch

from compiledllm.benchmarks.floor import Ceilings
from compiledllm.platform import Platform

_MAX_RUNS, _MAX_RUNS_S = 6, 1.0  # runs end at whichever limit comes first; at least two are made
_CUDA_BUFFER_BYTES = 4 * 2**30
_CUDA_MATRIX_SIZE, _CPU_MATRIX_SIZE = 8192, 2048


@torch.inference_mode()
def measure_ceilings(platform: Platform, dtype: torch.dtype) -> Ceilings:
    """Measure read and copy bandwidth (bytes/s) and matrix throughput (FLOP/s); about a second.

    dtype: the dtype of the multiplied matrices, normally the model's.
    """
    device = platform.device
    source = torch.ones(_buffer_bytes(platform) // 4, dtype=torch.float32, device=device)
    read_s = _fastest_run_s(lambda: source.sum(), device)
    target = torch.empty_like(source)
    copied_s = _fastest_run_s(functools.partial(target.copy_, source), device)
    del target  # frees memory for the matrices
    size = _CUDA_MATRIX_SIZE if platform.is_cuda else _CPU_MATRIX_SIZE
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    multiplied_s = _fastest_run_s(lambda: left @ right, device)
    return Ceilings(
        source.nbytes / read_s, 2 * source.nbytes / copied_s, 2 * size**3 / multiplied_s
    )


@torch.inference_mode()
def measure_upload(platform: Platform) -> float:
    """Bytes per second of a copy from host memory (pinned, for a GPU) to device memory."""
    num_bytes = 2**30 if platform.is_cuda else _buffer_bytes(platform)
    source = torch.ones(num_bytes // 4, dtype=torch.float32, pin_memory=platform.is_cuda)
    target = torch.empty_like(source, device=platform.device, pin_memory=False)
    return num_bytes / _fastest_run_s(lambda: target.copy_(source), platform.device)


def _fastest_run_s(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest run. A GPU run is ten launches in a row, which hides launch cost."""
    in_a_row = 10 if device.type == "cuda" else 1
    run_s: list[float] = []  # the first run is the warm-up; it may count, as the minimum wins
    while len(run_s) < 2 or (len(run_s) < _MAX_RUNS and sum(run_s) < _MAX_RUNS_S):
        _synchronize(device)
        start = time.perf_counter()
        for _ in range(in_a_row):
            work()
        _synchronize(device)
        run_s.append(time.perf_counter() - start)
    return min(run_s) / in_a_row


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _buffer_bytes(platform: Platform) -> int:
    """Size of a test buffer: several times the last-level cache, max an eighth of the memory."""
    if platform.is_cuda:
        free, _ = torch.cuda.mem_get_info(platform.device)
        return min(_CUDA_BUFFER_BYTES, free // 8)
    return min(max(2**29, 8 * last_level_cache_bytes()), platform.memory_bytes // 8)


def last_level_cache_bytes() -> int:
    """Bytes of the CPU's last-level cache; 0 if the system does not report its size."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    found = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text(encoding="utf-8").strip()
        found.append(int(text.rstrip("KMG")) * units.get(text[-1], 1))
    return max(found)
