"""Copies weights from files in memory to a GPU, through pinned buffers and with several threads.

torch copies from pageable memory in one thread, which faults in every page of the file while the
GPU waits. Here, several threads fill pinned buffers: each fills one buffer while the GPU fetches
the thread's other buffer. On a CPU, weights are copied at once.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor

_CHUNK = 8 * 2**20  # bytes; a thread has two pinned buffers of this size
_MAX_THREADS = 8
_MAX_WAITING = 8  # chunks per thread whose sources are kept alive


class Copier(Protocol):
    """Copies tensors to their places in a model. Copies may be under way until `close`."""

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Copy `source`, a CPU tensor, to `target` of the same shape, and convert its dtype."""

    def close(self) -> None:
        """Wait for all copies. Raises the error of a copy that failed."""


class DirectCopier:
    """Copies at once."""

    def copy(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source)

    def close(self) -> None:
        pass


class _Lane:
    """One thread's stream and buffers."""

    def __init__(self, device: torch.device, after: torch.cuda.Stream) -> None:
        self._device = device
        cuda: Any = torch.cuda  # Any, because torch does not annotate these classes
        self._stream = cuda.Stream(device)
        self._stream.wait_stream(after)
        buffers = (torch.empty(_CHUNK, dtype=torch.uint8, pin_memory=True) for _ in range(2))
        self._buffers = itertools.cycle([(buffer, cuda.Event()) for buffer in buffers])

    @torch.inference_mode()
    def upload(self, target: Tensor, source: Tensor) -> None:
        """Copy a chunk, contiguous on both sides."""
        buffer, is_free = next(self._buffers)
        is_free.synchronize()
        staged = buffer[: source.nbytes].view(source.dtype)
        # memmove releases the global interpreter lock and, unlike torch's copy, starts no threads.
        ctypes.memmove(staged.data_ptr(), source.data_ptr(), source.nbytes)
        with torch.cuda.stream(self._stream):
            if source.dtype != target.dtype:
                staged = staged.to(self._device, non_blocking=True)
            target.copy_(staged, non_blocking=True)
            is_free.record(self._stream)

    def wait(self) -> None:
        self._stream.synchronize()


class StagingCopier:
    """Copies to a CUDA device in the background. Must be closed before the weights are read."""

    def __init__(self, device: torch.device) -> None:
        num_threads = min(_MAX_THREADS, os.cpu_count() or 1)
        self._device = device
        self._after = torch.cuda.current_stream(device)
        self._threads = ThreadPoolExecutor(num_threads, "weights")
        self._local = threading.local()
        self._lanes: list[_Lane] = []
        self._copies: deque[Future[None]] = deque()
        self._max_copies = num_threads * _MAX_WAITING

    def copy(self, target: Tensor, source: Tensor) -> None:
        if not target.is_contiguous():
            target.copy_(source)
            return
        to, stored = target.view(-1), source.contiguous().view(-1)
        step = _CHUNK // source.itemsize
        for start in range(0, len(stored), step):
            if len(self._copies) >= self._max_copies:
                self._copies.popleft().result()
            chunk = to[start : start + step], stored[start : start + step]
            self._copies.append(self._threads.submit(self._upload, *chunk))

    def _upload(self, target: Tensor, source: Tensor) -> None:
        lane: _Lane | None = getattr(self._local, "lane", None)
        if lane is None:
            lane = self._local.lane = _Lane(self._device, self._after)
            self._lanes.append(lane)
        lane.upload(target, source)

    def close(self) -> None:
        try:
            while self._copies:
                self._copies.popleft().result()
        finally:
            self._threads.shutdown(cancel_futures=True)
            for lane in self._lanes:
                lane.wait()


def make_copier(device: torch.device) -> Copier:
    return StagingCopier(device) if device.type == "cuda" else DirectCopier()
