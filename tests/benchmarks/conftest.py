"""Ceilings are measured with buffers that fit into a cache: no test looks at their values.

Those that exceed the last-level cache several times take gigabytes on some machines, and seconds.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from compiledllm.benchmarks import ceilings


@pytest.fixture(scope="session", autouse=True)
def ceilings_are_cheap() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ceilings, "_buffer_bytes", lambda _platform: 2**24)
        patch.setattr(ceilings, "_CPU_MATRIX_SIZE", 256)
        yield
