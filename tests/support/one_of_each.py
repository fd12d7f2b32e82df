"""A plugin of pytest that keeps one case of each test, for tools under which a case takes seconds.

Tests of captured calls are left out: their graphs need the allocator's cache, which hides accesses
behind the end of a tensor. References are computed by torch's plain attention, since racecheck
reports its fused kernels, which are not ours.
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
