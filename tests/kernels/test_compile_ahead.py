"""Only the thread that asks for kernels launches none."""

from __future__ import annotations

import threading

import pytest

from compiledllm.kernels.compile_ahead import asking


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
