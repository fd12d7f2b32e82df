"""The GPU's memory plan, with a GPU that is only pretended."""

from __future__ import annotations

import pytest
import torch

from compiledllm.config import ConfigError
from compiledllm.platform import Platform
from compiledllm.runner.memory import check_gpu_is_free, plan_memory

GIB = 2**30
GPU = Platform(torch.device("cuda"), "Some GPU", 80 * GIB)


def pretend(patch: pytest.MonkeyPatch, free: int, reserved: int = 0, allocated: int = 0) -> None:
    patch.setattr(torch.cuda, "mem_get_info", lambda _: (free * GIB, 80 * GIB))
    patch.setattr(torch.cuda, "memory_reserved", lambda _: reserved * GIB)
    patch.setattr(torch.cuda, "memory_allocated", lambda _: allocated * GIB)


def test_memory_that_others_hold_is_said_with_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, free=50, reserved=10)
    message = r"asks for 72\.0 of 80\.0 GiB, but other processes hold 20\.0 GiB .* use .*=0\.75"
    with pytest.raises(ConfigError, match=message):
        check_gpu_is_free(GPU, 0.9)
    check_gpu_is_free(GPU, 0.75)


def test_a_free_gpu_is_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, free=79)
    check_gpu_is_free(GPU, 0.9)


def test_the_cache_gets_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, free=60, allocated=16)
    budget = plan_memory(GPU, 0.5, activations=2 * GIB, num_captures=0, sampling=0)
    assert (budget.limit, budget.in_use) == (40 * GIB, 18 * GIB)
    assert str(budget) == (
        "40.00 GiB: weights 16.00, activations 2.00, captured steps 0.00, sampling 0.00, "
        "KV cache 22.00"
    )
    captured = plan_memory(GPU, 0.5, activations=2 * GIB, num_captures=64, sampling=GIB)
    assert captured.captures == 2 * GIB + 64 * 4 * 2**20
    assert captured.in_use == 21 * GIB + 64 * 4 * 2**20
