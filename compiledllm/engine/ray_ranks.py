"""Ranks as Ray actors, on the machines of a Ray cluster that have free GPUs.

Ray places the ranks, starts them and reports their end. Each actor connects to the first rank by
TCP, and then the same messages follow as between processes of one machine (`rank_frames`). The
first rank stays in the engine's own process, on a GPU of its machine that one more actor reserves.
If Ray has placed the engine, too (`remote/ray_engines.py`), the room for its ranks is reserved
already.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import time
from importlib import import_module
from typing import Any

from compiledllm.config import ConfigError
from compiledllm.engine.rank_frames import read_exactly

# Time limit for Ray to find room, and for an actor to import torch and to connect.
START_TIMEOUT_S = 600.0
TOKEN_BYTES = 32
# Environment variable with the placement group of this process's engine, if Ray has placed the
# engine: "namespace/name".
GROUP_VARIABLE = "COMPILEDLLM_RAY_GROUP"
_TOKEN_TIMEOUT_S = 5.0  # time limit for each part of the token that a connection sends
_LOOK_S = 2.0  # interval of checks of the cluster's size, while Ray looks for room
_MAX_SILENCE_S = 30  # a connection ends after this time without an acknowledgement
_PROBE_S = 10  # interval of TCP keep-alive probes of an idle connection


def load_ray(namespace: str | None = None) -> Any:
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
            ray.init(log_to_driver=True, logging_level="warning", namespace=namespace)
        except Exception as error:
            raise ConfigError(
                f"Ray's cluster cannot be reached ({error}); start one with `ray start --head`, or "
                "use distributed_executor_backend='mp' for the GPUs of this machine"
            ) from error
    return ray


def has_gpus(ray: Any, device: str) -> bool:
    """Whether engines with this option `device` run on the GPUs of the cluster."""
    return device != "cpu" and bool(ray.cluster_resources().get("GPU"))


class Room:
    """A placement group: room for the ranks of one engine, one GPU (or CPU) each."""

    def __init__(self, ray: Any, group: Any, resource: str) -> None:
        self.ray, self.group, self.resource = ray, group, resource

    @classmethod
    def reserve(cls, ray: Any, num_ranks: int, resource: str, host: str | None = None) -> Room:
        """Ask Ray for room, without waiting for it (`group.wait`).

        host: the address of the machine on which the first rank must be; None: any machine. The
        placement group has a name, so that an engine in another process can find it.
        """
        bundles: list[dict[str, float]] = [{resource: 1.0} for _ in range(num_ranks)]
        if host is not None:
            bundles[0][f"node:{host}"] = 0.001
        name = f"compiledllm-{secrets.token_hex(8)}"
        return cls(ray, ray.util.placement_group(bundles, strategy="PACK", name=name), resource)

    def actor(self, kind: type, rank: int) -> Any:
        """Start an actor in the place that is reserved for a rank."""
        strategies: Any = import_module("ray.util.scheduling_strategies")
        strategy = strategies.PlacementGroupSchedulingStrategy(
            self.group, placement_group_bundle_index=rank
        )
        counts = {"num_cpus": 0, "num_gpus": 0} | {f"num_{self.resource.lower()}s": 1}
        remote = self.ray.remote(**counts, max_restarts=0, scheduling_strategy=strategy)(kind)
        return remote.remote()

    def give_back(self) -> None:
        with contextlib.suppress(Exception):  # the cluster may be gone
            self.ray.util.remove_placement_group(self.group)


class RayPlaces:
    """Room for the ranks of this process's engine: reserved now, or found if Ray placed the engine.

    host: this machine's address in the cluster. gpu: the id of the GPU that Ray has reserved for
    the first rank, "" if Ray has not chosen one. Raises ConfigError if the cluster is too small.
    """

    def __init__(self, num_ranks: int, is_cuda: bool) -> None:
        resource, given = "GPU" if is_cuda else "CPU", os.environ.get(GROUP_VARIABLE)
        namespace, _, name = (given or "").partition("/")
        self.ray = load_ray(namespace or None)
        self.host: str = self.ray.util.get_node_ip_address()
        self.gpu = ""
        self._is_ours = given is None
        if not self._is_ours:
            self._room = Room(self.ray, self.ray.util.get_placement_group(name), resource)
            return
        self._check_size(num_ranks, resource)
        self._room = Room.reserve(self.ray, num_ranks, resource, self.host)
        try:
            self._wait_for_room(num_ranks, resource)
        except BaseException:
            self.give_back()
            raise
        self._reserved = self._room.actor(_Reserved, 0)
        self.gpu = self.ray.get(self._reserved.gpu.remote())

    def _check_size(self, num_ranks: int, resource: str) -> None:
        total = int(self.ray.cluster_resources().get(resource, 0))
        if total < num_ranks:
            raise ConfigError(
                f"tensor_parallel_size={num_ranks} needs as many {resource}s, and Ray's "
                f"cluster has {total}; use at most {total}"
            )

    def _wait_for_room(self, num_ranks: int, resource: str) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._room.group.wait(_LOOK_S):
            self._check_size(num_ranks, resource)  # a machine may have been lost meanwhile
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"Ray has not found {num_ranks} free {resource}s, one of them on this "
                    f"machine, within {START_TIMEOUT_S:.0f} s; free some (`ray status` shows who "
                    "has them), or lower tensor_parallel_size"
                )

    def start_rank(self, rank: int) -> RayRank:
        return RayRank(self, rank)

    def actor(self, kind: type, rank: int) -> Any:
        return self._room.actor(kind, rank)

    def give_back(self) -> None:
        if self._is_ours:
            self._room.give_back()


class _Reserved:
    """An actor that holds the first rank's GPU, so that Ray gives the GPU to nobody else."""

    def gpu(self) -> str:
        found = import_module("ray").get_gpu_ids()
        return str(found[0]) if found else ""


class _Actor:
    """An actor that runs a rank until the connection to the first rank ends."""

    def run(self, host: str, port: int, token: bytes) -> None:
        from compiledllm.engine.rank_process import main

        main(connect(host, port, token))


class RayRank:
    """One rank as an actor. The actor sends a secret token, as anybody may connect to the port."""

    def __init__(self, places: RayPlaces, rank: int) -> None:
        self.rank, self._places = rank, places
        token = secrets.token_bytes(TOKEN_BYTES)
        with socket.create_server((places.host, 0)) as listener:
            listener.settimeout(START_TIMEOUT_S)
            self._actor = places.actor(_Actor, rank)
            self._actor.run.remote(*listener.getsockname()[:2], token)
            self.connection = accepted(listener, token)

    def end(self) -> str:
        """Close the connection, end the actor and give the room back. Returns how it ended."""
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(Exception):  # the cluster may be gone
            self._places.ray.kill(self._actor)
        self.connection.close()
        self._places.give_back()
        return "its actor has ended"


# -- connections between machines ------------------------------------------------------------------


def connect(host: str, port: int, token: bytes) -> socket.socket:
    """Connect to the process that waits for the token in `accepted`."""
    connection = socket.create_connection((host, port), timeout=START_TIMEOUT_S)
    connection.sendall(token)
    return _between_machines(connection)


def accepted(listener: socket.socket, token: bytes) -> socket.socket:
    """The first connection that sends the token. Raises the listener's TimeoutError."""
    while True:
        connection, _ = listener.accept()
        connection.settimeout(_TOKEN_TIMEOUT_S)
        found = read_exactly(connection, len(token))
        if found is not None and secrets.compare_digest(found, token):
            return _between_machines(connection)
        connection.close()


def _between_machines(connection: socket.socket) -> socket.socket:
    """Make the connection send small frames at once, and end when the other machine is lost."""
    connection.settimeout(None)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    with contextlib.suppress(AttributeError, OSError):  # another system than Linux
        tcp = socket.IPPROTO_TCP
        connection.setsockopt(tcp, socket.TCP_KEEPIDLE, _PROBE_S)
        connection.setsockopt(tcp, socket.TCP_KEEPINTVL, _PROBE_S)
        connection.setsockopt(tcp, socket.TCP_KEEPCNT, _MAX_SILENCE_S // _PROBE_S)
        connection.setsockopt(tcp, socket.TCP_USER_TIMEOUT, _MAX_SILENCE_S * 1000)
    return connection
