"""The artifacts of starts, which threads write after each start."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from compiledllm.kernels import late_compiles


def keep_artifacts_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let starts leave artifacts in a folder of their own; a late compilation is an error."""
    monkeypatch.setenv("COMPILEDLLM_CACHE_DIR", str(folder))
    monkeypatch.setenv("COMPILEDLLM_DISABLE_CACHE", "0")
    monkeypatch.setenv("COMPILEDLLM_LATE_COMPILE", "error")
    monkeypatch.setattr(late_compiles, "num_kernels", 0)  # counts for the whole process


def wait_until_kept() -> None:
    """Wait until every start of this process has written its artifact."""
    for thread in threading.enumerate():
        if thread.name == "keep":
            thread.join()
