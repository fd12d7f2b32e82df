"""Which tests of a run on several workers stay together, and which of them start first.

For pytest-xdist with `--dist loadgroup --no-loadscope-reorder`: a group stays on one worker, and
groups are handed out in the order of the list. Without workers nothing of this applies.
"""

from __future__ import annotations

import os

import pytest

IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ

# Long groups first, so that no worker ends with one; single tests last, as they fill any gap.
_FIRST_TO_LAST = (
    "tests/kernels/test_triton_compiles.py",
    "real_model",
    "tests/engine/test_windows.py",
    "tests/graphs/",
    "server",
    "tests/engine/",
    "tests/server/",
    "tests/models/",
    "tests/benchmarks/",
    "tests/unit/",
    "tests/repo/",
    "",
)


def arrange(items: list[pytest.Item]) -> None:
    groups = {item: _group_of(item) for item in items}
    for item, group in groups.items():
        if group is not None and item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: _rank(groups[item] or item.nodeid))


def _group_of(item: pytest.Item) -> str | None:
    """A file's tests share its fixtures. Kernels have none, and are the longest part of all."""
    path = item.nodeid.partition("::")[0]
    if "server" in getattr(item, "fixturenames", ()):
        return "server"  # one process for all who only ask
    if path.startswith("tests/kernels/"):
        return None
    if item.get_closest_marker("real_model") and not path.startswith("tests/server/"):
        return "real_model"  # its weights are in memory once
    return path


def _rank(name: str) -> int:
    return next(rank for rank, start in enumerate(_FIRST_TO_LAST) if name.startswith(start))
