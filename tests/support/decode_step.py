"""Lets engines on a CPU run their decode steps of few rows as a single `DecodeStep`."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import Tensor

from compiledllm import Engine
from compiledllm.kernels import decode_step_cuda, decode_step_torch
from compiledllm.kernels.backend import AttentionMetadata
from compiledllm.kernels.decode_step import ALL_ROWS, DecodeShape, DecodeStep, Kernel
from compiledllm.models.decode_blocks import describe, why_not
from tests.support.cuda_on_cpu import CpuKernel


class Reference:
    """The reference as a `Kernel` that notes the number of rows of each step in `rows`."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def why_not(self, shape: DecodeShape, device: torch.device) -> str | None:
        return decode_step_torch.why_not(shape, device)

    def faster_rows(self, shape: DecodeShape) -> range:
        return decode_step_torch.faster_rows(shape)

    def workspace_bytes(self, shape: DecodeShape) -> int:
        return decode_step_torch.workspace_bytes(shape)

    def compile(self, shape: DecodeShape, rows: range) -> None:
        decode_step_torch.compile(shape, rows)

    def load(self, shape: DecodeShape, rows: range) -> None:
        decode_step_torch.load(shape, rows)

    def run(
        self, step: DecodeStep, x: Tensor, cos: Tensor, sin: Tensor, attn: AttentionMetadata
    ) -> tuple[Tensor, Tensor]:
        self.rows.append(len(x))
        return decode_step_torch.run(step, x, cos, sin, attn)


def use_reference(engine: Engine, rows: range = ALL_ROWS) -> Reference:
    """From now on, the engine's decode steps of few rows run by the reference."""
    reference = Reference()
    engine.core.runner.use_decode_step(decode_step_of(engine, reference, rows))
    return reference


def emulate_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile the CUDA kernel with g++, as on a GPU with three multiprocessors.

    Variants are compiled when a step first needs them.
    """
    if shutil.which("g++") is None or torch.cuda.is_available():
        pytest.skip("runs CUDA kernels on a CPU, with g++, where there is no GPU")
    monkeypatch.setattr(decode_step_cuda, "CudaKernel", CpuKernel)
    monkeypatch.setattr(decode_step_cuda, "num_multiprocessors", lambda: 3)
    for name in ("compile", "load"):
        monkeypatch.setattr(decode_step_cuda, name, lambda shape, rows: None)
    decode_step_cuda._kernel.cache_clear()


def use_kernel(engine: Engine) -> None:
    """From now on, the engine's decode steps of few rows run by the emulated kernel."""
    step = decode_step_of(engine, decode_step_cuda)
    assert decode_step_cuda.why_not(step.shape, torch.device("cpu")) is None
    engine.core.runner.use_decode_step(step)


def decode_step_of(engine: Engine, kernel: Kernel, rows: range = ALL_ROWS) -> DecodeStep:
    core = engine.core
    assert why_not(core.spec) is None
    found = describe(core.runner.model, core.plan.config.limits.block_size)
    assert not isinstance(found, str), found
    return DecodeStep(*found, kernel, rows)
