"""Ceilings of the machine are measured once for all benchmarks of a worker: each takes seconds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from compiledllm.benchmarks.floor import Ceilings
from compiledllm.platform import Platform


@pytest.fixture(scope="session", autouse=True)
def ceilings_are_measured_once() -> Iterator[None]:
    from compiledllm.benchmarks import run

    measure, found = run.measure_ceilings, dict[torch.dtype, Ceilings]()

    def measure_once(platform: Platform, dtype: torch.dtype) -> Ceilings:
        if dtype not in found:
            found[dtype] = measure(platform, dtype)
        return found[dtype]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "measure_ceilings", measure_once)
        yield
