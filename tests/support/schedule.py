"""Groups tests that must run on one pytest-xdist worker, and starts long groups first.

For pytest-xdist with `--dist loadscope --no-loadscope-reorder`. The mode `loadgroup`, which takes
groups from marks, does not work with pytest 9.2, where it cannot write groups into test names.
"""

from __future__ import annotations

import os

import pytest

IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ

# Prefixes of node ids, in the order in which tests start. The longest groups start first, so that
# no worker runs one at the end. Among the others, groups that mostly wait alternate with groups
# that compute. The longest prefix of a test's node id counts.
_FIRST_TO_LAST = (
    "tests/server/test_life.py",
    "tests/engine/test_parity.py",
    "tests/server/",
    "tests/server/test_faults.py",
    "tests/engine/test_windows.py",
    "tests/kernels/test_triton_compiles.py",
    "tests/server/test_connections.py",
    "tests/engine/test_families.py",
    "tests/graphs/",
    "tests/server/test_ray_serve.py",
    "tests/engine/test_transformers_model.py",
    "tests/repo/test_readme.py",
    "tests/server/test_run_batch.py",
    "tests/server/test_http_processes.py",
    "tests/engine/",
    "tests/server/test_replicas.py",
    "tests/server/test_http_protocol.py",
    "tests/remote/",
    "tests/models/",
    "tests/benchmarks/",
    "tests/repo/",
    "tests/unit/",
    "tests/kernels/",
    "",
)
_SHARE_NOTHING = ("tests/kernels/", "tests/server/test_run_batch.py")
# These files do not use the shared server: each has servers of its own, or none.
_WITHOUT_THE_SERVER = tuple(
    f"tests/server/test_{name}.py"
    for name in (
        "connections",
        "faults",
        "http_processes",
        "http_protocol",
        "life",
        "ray_serve",
        "replicas",
    )
)


def group_of(node_id: str) -> str:
    """The group of a test: its file, or "server" for tests that share one server.

    Tests that share no fixtures are groups of their own.
    """
    if node_id.startswith(_SHARE_NOTHING):
        return node_id
    has_server = node_id.startswith("tests/server/") and not node_id.startswith(_WITHOUT_THE_SERVER)
    return "server" if has_server else node_id.partition("::")[0]


def put_long_ones_first(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: _rank(item.nodeid))


def _rank(node_id: str) -> int:
    fitting = [start for start in _FIRST_TO_LAST if node_id.startswith(start)]
    return _FIRST_TO_LAST.index(max(fitting, key=len))


def make_scheduler(config: pytest.Config, log: object) -> object:
    """xdist's scheduler of whole scopes, with groups as scopes."""
    from xdist.scheduler import LoadScopeScheduling

    class GroupScheduling(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    return GroupScheduling(config, log)
