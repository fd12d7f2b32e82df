"""What a machine lacks is said in one line, before anything is loaded."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from compiledllm.config import ConfigError
from compiledllm.platform import Platform


def pretend_gpu(patch: pytest.MonkeyPatch, major: int, minor: int = 0) -> None:
    facts = SimpleNamespace(name="Some GPU", total_memory=2**34, major=major, minor=minor)
    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "get_device_properties", lambda _: facts)
    patch.setattr(torch.cuda, "get_device_capability", lambda _: (major, minor))


def test_an_old_gpu_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch, 7, 5)
    message = r"Some GPU has compute capability 7\.5; 8\.0 \(Ampere\) or newer .* device='cpu'"
    for device in ("auto", "cuda", "cuda:0"):
        with pytest.raises(ConfigError, match=message):
            Platform.detect(device)
    assert not Platform.detect("cpu").is_cuda


def test_a_new_gpu_is_taken_and_described(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch, 9)
    platform = Platform.detect()
    assert platform.is_cuda and platform.name == "Some GPU"
    assert "compute capability 9.0" in platform.versions()
    assert str(platform.choose_attention_backend("auto")) == "triton (the GPU path)"
    assert str(platform.choose_attention_backend("torch")) == "torch (as asked)"


def test_without_triton_a_gpu_falls_back_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch, 9)
    monkeypatch.setattr("compiledllm.platform.find_spec", lambda _: None)
    choice = Platform.detect().choose_attention_backend("auto")
    assert choice.value == "torch" and "triton is not installed" in choice.reason


def test_no_gpu_is_said_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ConfigError, match="sees no CUDA device .it was built without CUDA."):
        Platform.detect("cuda")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(ConfigError, match="is the driver there and new enough"):
        Platform.detect("cuda:1")


def test_triton_attention_needs_a_gpu() -> None:
    with pytest.raises(ConfigError, match="attention_backend='triton' needs a GPU"):
        Platform.detect("cpu").choose_attention_backend("triton")


@pytest.mark.parametrize("version", ["2.10.1", "1.13.0+cu117", "2.9.0a0+git123"])
def test_an_old_torch_is_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(ConfigError, match=r"is too old; install torch>=2\.11"):
        Platform.detect("cpu")


@pytest.mark.parametrize("version", ["2.11.0+cu130", "2.13.0+cpu", "3.0"])
def test_a_new_torch_is_fine(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    assert Platform.detect("cpu").versions() == f"torch {version}"
