"""A pytest plugin that keeps one case of each test, for tools that make each case take seconds.

Tests with CUDA graphs are left out: graphs need the allocator's cache, which hides accesses past
the end of a tensor. References are computed by torch's plain attention, because racecheck reports
hazards in torch's fused kernels.
"""

from __future__ import annotations

import pytest
import torch

_GRAPHS = ("captured", "graph", "replay")


def pytest_sessionstart() -> None:
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    first: dict[str, pytest.Item] = {}
    for item in items:
        test = item.nodeid.partition("[")[0]
        if not any(word in test.partition("::")[2] for word in _GRAPHS):
            first.setdefault(test, item)
    kept = set(map(id, first.values()))
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in kept])
    items[:] = [item for item in items if id(item) in kept]
