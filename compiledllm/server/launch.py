"""`compiledllm serve`: options, the listening socket, signals, the order of start and shutdown."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from compiledllm.arguments import engine_options
from compiledllm.caches import cache_dir
from compiledllm.config import EngineConfig
from compiledllm.log import log, show_logs
from compiledllm.remote.engine_child import EngineChild, Spawn
from compiledllm.remote.engine_client import EngineClient
from compiledllm.remote.replicas import Replicas, ServedEngine, gpus_of_replicas
from compiledllm.server.app import AppOptions, create_app
from compiledllm.server.app_options import api_keys_of, app_options_of, limits_of
from compiledllm.server.connections import Connections, Deadlines
from compiledllm.server.descriptors import connection_limit
from compiledllm.server.http_server import make_http_server, watch_for_standstills
from compiledllm.server.listening import close, is_local, listen, tls_options, way_to_try
from compiledllm.server.log_line import log_lines
from compiledllm.server.process import (
    end_threads,
    loop_factory,
    return_large_blocks,
    spare_collector,
)


def serve(arguments: argparse.Namespace) -> int:
    """Serve until told to stop; return the exit status. A failure's cause is printed last."""
    show_logs(logging.getLevelNamesMapping()[arguments.log_level.upper()])
    return_large_blocks()
    options = engine_options(arguments)
    EngineConfig.from_options(**options)  # reports wrong options before anything is started
    deadlines = Deadlines(arguments.client_timeout, arguments.keep_alive_timeout)
    connections = Connections(connection_limit(arguments.max_connections), deadlines)
    tls = tls_options(arguments)
    if arguments.api_server_count > 1:
        from compiledllm.server.launch_processes import serve_in_processes

        return serve_in_processes(arguments, bool(tls))
    listener = listen(arguments)
    try:
        app_options = app_options_of(arguments, api_keys_of(arguments), is_local(listener))
        engine = make_engine(options, arguments)
        engine.on_loaded = spare_collector
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            return runner.run(_run(engine, app_options, listener, connections, arguments, tls))
    finally:
        close(listener, arguments.uds)


async def _run(
    engine: ServedEngine,
    options: AppOptions,
    listener: socket.socket,
    connections: Connections,
    arguments: argparse.Namespace,
    tls: dict[str, Any],
) -> int:
    app = create_app(engine, options)
    server = make_http_server(app, connections, arguments, tls)
    loop = asyncio.get_running_loop()
    ending = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, ending)
    engine.start()
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    lines = asyncio.create_task(log_lines(app.state.metrics))
    watch = asyncio.create_task(
        _announce(engine, way_to_try(listener, bool(tls), options.root_path))
    )
    sweeps = asyncio.create_task(connections.watch())
    standstills = asyncio.create_task(watch_for_standstills())
    status = await _until_end(engine, ending, {serving, lines, sweeps, standstills})
    if status == 0:
        log.info("draining: %d requests live", len(engine.live))
        await engine.drain(arguments.shutdown_timeout)
    server.should_exit = True
    for task in (lines, watch, sweeps, standstills):
        task.cancel()
    await asyncio.wait({serving}, timeout=5)
    await engine.stop()
    if status and engine.failure is not None:
        print(f"error: {engine.failure.error}", file=sys.stderr, flush=True)
    await end_threads(status)
    return status


def on_signal(ending: asyncio.Event) -> None:
    """Take a signal: the first one drains, the second one ends the process at once."""
    if ending.is_set():
        log.warning("stopping at once")
        os._exit(130)
    ending.set()


async def _until_end(engine: ServedEngine, ending: asyncio.Event, tasks: set[Any]) -> int:
    """Wait for the end. Returns 0 when told to stop, 2 for wrong options, 1 for a failure.

    tasks: parts of the server that never end by themselves; the status is 1 if one of them ends.
    """
    told = asyncio.create_task(ending.wait())
    dead = asyncio.create_task(engine.wait_until_dead())
    done, _ = await asyncio.wait({told, dead, *tasks}, return_when=asyncio.FIRST_COMPLETED)
    for task in done & tasks:
        log.error("the server's own %s has ended", task.get_coro(), exc_info=task.exception())
    for task in {told, dead} - done:
        task.cancel()
    if told in done:
        return 0
    is_config = engine.failure is not None and engine.failure.is_config
    return 2 if is_config else 1


async def _announce(engine: ServedEngine, way: str) -> None:
    await engine.wait_until_settled()
    if engine.state == "ready":
        log.info("ready at %s", way)


def spawns_of(options: dict[str, Any], arguments: argparse.Namespace) -> list[Spawn]:
    """For each engine, a function that starts its process. Raises ConfigError for too few GPUs."""
    count: int = arguments.data_parallel_size
    if count == 1:
        return [EngineChild.spawn]
    num_ranks = int(options.get("tensor_parallel_size") or 1)
    if options.get("distributed_executor_backend") == "ray":
        from compiledllm.remote.ray_engines import RayEngines

        return [RayEngines(count, num_ranks, options.get("device", "auto")).spawn] * count
    gpus = gpus_of_replicas(count, num_ranks, os.environ.get("CUDA_VISIBLE_DEVICES"))
    return [_spawn_with(variables) for variables in gpus]


def _spawn_with(variables: dict[str, str]) -> Spawn:
    async def spawn(
        command: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> EngineChild:
        return await EngineChild.spawn(command, variables | dict(environment or {}))

    return spawn


def make_engine(options: dict[str, Any], arguments: argparse.Namespace) -> ServedEngine:
    """The client of the engine, or of `data_parallel_size` engines."""
    limits, crashes = limits_of(arguments), cache_dir() / "crashes"
    clients = [
        EngineClient(options, limits, crashes, spawn=spawn)
        for spawn in spawns_of(options, arguments)
    ]
    return clients[0] if len(clients) == 1 else Replicas([*clients])
