"""A Ray cluster on this machine that looks like two machines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


@contextmanager
def two_machines() -> Iterator[Any]:
    """Two machines with a CPU each, as far as Ray knows. Yields Ray's `Cluster`, connected."""
    import ray
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")
        patch.setenv("RAY_health_check_period_ms", "500")
        cluster = Cluster(True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        cluster.add_node(num_cpus=1)
        cluster.connect()
        yield cluster
        ray.shutdown()
        cluster.shutdown()
