"""A plugin of pytest that keeps one case of each test, for tools under which a case takes seconds.

Tests of captured calls are left out: their graphs need the allocator's cache, which hides accesses
behind the end of a tensor.
"""

from __future__ import annotations

import pytest

_GRAPHS = ("captured", "graph", "replay")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    first: dict[str, pytest.Item] = {}
    for item in items:
        test = item.nodeid.partition("[")[0]
        if not any(word in test.partition("::")[2] for word in _GRAPHS):
            first.setdefault(test, item)
    kept = set(map(id, first.values()))
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in kept])
    items[:] = [item for item in items if id(item) in kept]
