"""Weights reach their places whole and converted, in chunks that several threads copy."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from compiledllm.models import staging
from compiledllm.models.staging import StagingCopier, make_copier


class Lane:
    """A lane to a device that is in truth the CPU."""

    names: set[str]
    error: Exception | None

    def __init__(self, device: torch.device, after: object) -> None:
        self.is_waited_for = False

    def upload(self, target: Tensor, source: Tensor) -> None:
        assert source.nbytes <= staging._CHUNK and source.is_contiguous()
        Lane.names.add(threading.current_thread().name)
        if Lane.error is not None:
            raise Lane.error
        target.copy_(source)

    def wait(self) -> None:
        self.is_waited_for = True


@pytest.fixture
def copier(monkeypatch: pytest.MonkeyPatch) -> StagingCopier:
    monkeypatch.setattr(staging, "_Lane", Lane)
    monkeypatch.setattr(staging, "_CHUNK", 256)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: None)
    Lane.names, Lane.error = set(), None
    return StagingCopier(torch.device("cpu"))


def test_tensors_of_all_sizes_dtypes_and_strides_arrive(copier: StagingCopier) -> None:
    sources = [
        torch.randn(1000, 7),
        torch.randn(33).bfloat16(),
        torch.randn(12, 40).t(),
        torch.randn(0, 3),
        torch.tensor(2.5),
    ]
    targets = [torch.full(source.shape, torch.nan) for source in sources]
    strided = torch.full((8, 4), torch.nan)[:, :2]
    for target, source in zip(targets, sources, strict=True):
        copier.copy(target, source)
    copier.copy(strided, torch.ones(8, 2))
    copier.close()
    for target, source in zip(targets, sources, strict=True):
        assert torch.equal(target, source.float())
    assert torch.equal(strided, torch.ones(8, 2))
    assert copier._lanes and all(lane.is_waited_for for lane in copier._lanes)
    assert all(name.startswith("weights") for name in Lane.names)


def test_error_of_a_copy_reaches_the_loader(copier: StagingCopier) -> None:
    Lane.error = RuntimeError("out of pinned memory")
    copier.copy(torch.zeros(4), torch.ones(4))
    with pytest.raises(RuntimeError, match="out of pinned memory"):
        copier.close()


def test_weights_for_a_cpu_are_copied_at_once() -> None:
    target = torch.zeros(3)
    make_copier(torch.device("cpu")).copy(target, torch.ones(3))
    assert target.tolist() == [1, 1, 1]


@pytest.mark.gpu
def test_weights_reach_a_gpu() -> None:
    copier = make_copier(torch.device("cuda"))
    sources = [torch.randn(3000, 1500), torch.randn(7, 5).bfloat16(), torch.randn(5000, 1000)]
    targets = [torch.empty(s.shape, dtype=torch.bfloat16, device="cuda") for s in sources]
    for target, source in zip(targets, sources, strict=True):
        copier.copy(target, source)
    copier.close()
    for target, source in zip(targets, sources, strict=True):
        assert torch.equal(target.cpu(), source.bfloat16())
