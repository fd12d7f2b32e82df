"""Engines on the machines of a Ray cluster: `data_parallel_size` with Ray as the executor.

Ray finds room for an engine with all its ranks and starts an actor there. The actor starts the
engine's process as `EngineChild` does on one machine, except that the connection is by TCP; then it
waits for the process to end and returns the exit status. If the machine is lost, the engine is
started again on any machine that has room.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from compiledllm.config import ConfigError
from compiledllm.engine.ray_ranks import (
    GROUP_VARIABLE,
    START_TIMEOUT_S,
    TOKEN_BYTES,
    Room,
    accepted,
    connect,
    has_gpus,
    load_ray,
)
from compiledllm.remote.engine_child import EngineChild, how_it_ended
from compiledllm.remote.running_log import RunningLog

_WORKER_EXIT_S = 1.0  # time for a Ray worker to exit after it has killed its child processes


class RayEngines:
    """Starts the processes of engines in a cluster.

    num_ranks: number of GPUs (or CPUs) of each engine. device: the engines' option of this name.
    Raises ConfigError if the cluster has too few GPUs (or CPUs).
    """

    def __init__(self, num_engines: int, num_ranks: int, device: str) -> None:
        self._ray = load_ray()
        self._num_ranks = num_ranks
        self._resource = "GPU" if has_gpus(self._ray, device) else "CPU"
        total = int(self._ray.cluster_resources().get(self._resource, 0))
        if total < num_engines * num_ranks:
            raise ConfigError(
                f"data_parallel_size={num_engines} with tensor_parallel_size={num_ranks} needs "
                f"{num_engines * num_ranks} {self._resource}s, and Ray's cluster has {total}; at "
                f"most {total // num_ranks} replicas fit"
            )

    async def spawn(
        self, command: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> EngineChild:
        """Start an engine's process where there is room; see `EngineChild.spawn`.

        Raises OSError if Ray finds no room or cannot start the process.
        """
        room = Room.reserve(self._ray, self._num_ranks, self._resource)
        missing = f"Ray has not found {self._num_ranks} free {self._resource}s"
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await asyncio.wrap_future(room.group.ready().future())
                missing = "Ray has found room, but the engine's process there has not connected"
                return await self._spawn_in(room, command, environment or {})
        except TimeoutError:
            room.give_back()
            raise OSError(f"{missing} within {START_TIMEOUT_S:.0f} s") from None
        except BaseException as error:
            room.give_back()
            if isinstance(error, self._ray.exceptions.RayError):
                raise OSError(f"Ray: {error}") from error
            raise

    async def _spawn_in(
        self, room: Room, command: Sequence[str], environment: Mapping[str, str]
    ) -> EngineChild:
        context, token = self._ray.get_runtime_context(), secrets.token_bytes(TOKEN_BYTES)
        found = self._ray.util.placement_group_table(room.group)
        variables = dict(environment)
        variables[GROUP_VARIABLE] = f"{context.namespace}/{found['name']}"
        variables["RAY_ADDRESS"] = context.gcs_address
        actor = room.actor(_EngineHost, 0)
        with socket.create_server((self._ray.util.get_node_ip_address(), 0)) as listener:
            listener.settimeout(START_TIMEOUT_S)
            address = listener.getsockname()[:2]
            ran = actor.run.remote(*address, token, list(command), variables).future()
            end = asyncio.ensure_future(asyncio.wrap_future(ran))
            accepting = asyncio.ensure_future(asyncio.to_thread(accepted, listener, token))
            try:
                await asyncio.wait({end, accepting}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                with contextlib.suppress(OSError):  # end the thread that may still wait in accept
                    listener.shutdown(socket.SHUT_RDWR)
        try:
            connection = await accepting
        except OSError:
            end.result()  # Ray's error, which is the cause
            raise
        reader, writer = await asyncio.open_connection(sock=connection)
        return EngineChild(_RayProcess(room, actor, end), reader, writer)


class _RayProcess:
    """The engine's process on another machine."""

    def __init__(self, room: Room, actor: Any, end: asyncio.Future[tuple[int, list[str]]]) -> None:
        self._room, self._actor, self._end = room, actor, end
        self._started: list[str] = []

    async def wait(self) -> str:
        try:
            status, self._started = await self._end
        except self._room.ray.exceptions.RayError as error:
            return f"its machine or its Ray worker is lost ({type(error).__name__})"
        finally:
            self._room.give_back()
        return how_it_ended(status)

    def kill(self) -> None:
        with contextlib.suppress(Exception):  # the cluster may be gone
            self._room.ray.kill(self._actor)

    def take_started(self) -> set[str]:
        return set(self._started)


class _EngineHost:
    """An actor that starts an engine's process on its machine."""

    def run(
        self, host: str, port: int, token: bytes, command: list[str], variables: dict[str, str]
    ) -> tuple[int, list[str]]:
        """Run the process. Returns its exit status, and the ids of requests that began to run."""
        running = RunningLog.create()
        with connect(host, port, token) as connection:
            fds = [connection.fileno(), running.fd]
            process = subprocess.Popen(
                [sys.executable, *command[1:], *map(str, fds)],
                pass_fds=fds,
                stdin=subprocess.DEVNULL,
                env=os.environ | variables,
            )
        status = process.wait()
        if status == -signal.SIGKILL:
            # If the machine is lost, the Ray worker kills its child processes before it exits. This
            # actor must not report that as a crash of the engine: all running requests would become
            # suspects, and could not move to another engine.
            time.sleep(_WORKER_EXIT_S)
        return status, sorted(running.read())
