"""Which tests of a run on several workers stay together, and which of them start first.

For pytest-xdist with `--dist loadscope --no-loadscope-reorder`. Its `loadgroup` takes groups from
marks, but loses them with pytest 9.2, which does not let it write them into the names of tests.
"""

from __future__ import annotations

import os

import pytest

IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ

# The longest groups start first, so that no worker ends with one.
_FIRST_TO_LAST = (
    "tests/engine/test_parity.py",
    "tests/engine/test_windows.py",
    "tests/kernels/test_triton_compiles.py",
    "tests/engine/",
    "tests/graphs/",
    "tests/repo/test_readme.py",
    "tests/server/test_faults.py",
    "tests/server/",
    "tests/remote/test_async_engine.py",
    "tests/models/",
    "tests/benchmarks/",
    "tests/repo/",
    "tests/remote/",
    "tests/unit/",
    "tests/kernels/",
    "",
)
_SHARE_NOTHING = ("tests/kernels/", "tests/server/test_faults.py", "tests/server/test_run_batch.py")


def group_of(node_id: str) -> str:
    """The tests of a file share its fixtures, and those of tests/server/ one server."""
    if node_id.startswith(_SHARE_NOTHING):
        return node_id
    return "server" if node_id.startswith("tests/server/") else node_id.partition("::")[0]


def put_long_ones_first(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: _rank(item.nodeid))


def _rank(node_id: str) -> int:
    return next(rank for rank, start in enumerate(_FIRST_TO_LAST) if node_id.startswith(start))


def make_scheduler(config: pytest.Config, log: object) -> object:
    """xdist's scheduler of whole scopes, with groups as scopes."""
    from xdist.scheduler import LoadScopeScheduling

    class GroupScheduling(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    return GroupScheduling(config, log)
