"""Ranks as Ray actors, on whatever machines of a cluster have GPUs left.

Ray only places the ranks, starts them and says when they have ended: an actor connects to the first
rank, and the same messages follow as between processes of one machine. The first rank stays in the
engine's own process, on a GPU of this machine that a further actor reserves.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
from importlib import import_module
from typing import Any

from compiledllm.config import ConfigError

START_TIMEOUT_S = 600.0  # for Ray to find room, and for a worker to import what a rank needs
_TOKEN_BYTES = 32
_END_S = 5.0


def load_ray() -> Any:
    """Ray, connected to its cluster. Raises ConfigError if the package or a cluster is missing."""
    try:
        ray: Any = import_module("ray")
    except ImportError:
        raise ConfigError(
            "distributed_executor_backend='ray' needs Ray: pip install 'compiledllm[ray]', or use "
            "'mp' for the GPUs of this machine"
        ) from None
    if not ray.is_initialized():
        try:
            ray.init(log_to_driver=True, logging_level="warning")
        except Exception as error:
            raise ConfigError(f"Ray's cluster cannot be reached: {error}") from error
    return ray


class RayPlaces:
    """Room for the ranks of a model in a Ray cluster, one GPU (or CPU) each.

    Raises ConfigError if the cluster does not have so many.
    """

    def __init__(self, num_ranks: int, is_cuda: bool) -> None:
        self.ray = load_ray()
        self._resource = "GPU" if is_cuda else "CPU"
        total = int(self.ray.cluster_resources().get(self._resource, 0))
        if total < num_ranks:
            raise ConfigError(
                f"tensor_parallel_size={num_ranks} needs as many {self._resource}s, and Ray's "
                f"cluster has {total}; use at most {total}"
            )
        self.host: str = self.ray.util.get_node_ip_address()
        bundles: list[dict[str, float]] = [{self._resource: 1.0} for _ in range(num_ranks)]
        bundles[0][f"node:{self.host}"] = 0.001  # the first rank is here
        self._group = self.ray.util.placement_group(bundles, strategy="PACK")
        if not self._group.wait(START_TIMEOUT_S):
            self.give_back()
            raise ConfigError(
                f"Ray has not found {num_ranks} free {self._resource}s, one of them on this "
                f"machine, within {START_TIMEOUT_S:.0f} s"
            )
        self._reserved = self.actor(_Reserved, 0)
        self.gpu: str = self.ray.get(self._reserved.gpu.remote())

    def actor(self, kind: type, rank: int) -> Any:
        """An actor in the place of a rank."""
        strategies: Any = import_module("ray.util.scheduling_strategies")
        strategy = strategies.PlacementGroupSchedulingStrategy(
            self._group, placement_group_bundle_index=rank
        )
        resources = {"num_gpus" if self._resource == "GPU" else "num_cpus": 1}
        remote = self.ray.remote(**resources, max_restarts=0, scheduling_strategy=strategy)(kind)
        return remote.remote()

    def start_rank(self, rank: int) -> RayRank:
        return RayRank(self, rank)

    def give_back(self) -> None:
        with contextlib.suppress(Exception):  # the cluster may be gone
            self.ray.util.remove_placement_group(self._group)


class _Reserved:
    """Holds the first rank's GPU, so that Ray gives it to nobody else."""

    def gpu(self) -> str:
        found = import_module("ray").get_gpu_ids()
        return str(found[0]) if found else ""


class _Actor:
    """A rank in a worker of Ray's. It ends with its connection."""

    def run(self, host: str, port: int, token: bytes) -> None:
        from compiledllm.engine.rank_process import main

        connection = socket.create_connection((host, port), timeout=START_TIMEOUT_S)
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(token)
        main(connection)


class RayRank:
    """One rank as an actor. A network may hold strangers: the actor proves itself by a token."""

    def __init__(self, places: RayPlaces, rank: int) -> None:
        self.rank, self._places = rank, places
        token = secrets.token_bytes(_TOKEN_BYTES)
        with socket.create_server((places.host, 0)) as listener:
            listener.settimeout(START_TIMEOUT_S)
            self._actor = places.actor(_Actor, rank)
            self._actor.run.remote(*listener.getsockname()[:2], token)
            self.connection = _accepted(listener, token)
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def end(self) -> str:
        """Close the connection and end the actor. Returns how it ended."""
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(Exception):  # the cluster may be gone
            self._places.ray.kill(self._actor)
        self.connection.close()
        self._places.give_back()
        return "its actor has ended"


def _accepted(listener: socket.socket, token: bytes) -> socket.socket:
    """The first connection that brings the token."""
    while True:
        connection, _ = listener.accept()
        connection.settimeout(_END_S)
        found = b""
        with contextlib.suppress(OSError):
            found = connection.recv(len(token), socket.MSG_WAITALL)
        if secrets.compare_digest(found, token):
            connection.settimeout(None)
            return connection
        connection.close()
