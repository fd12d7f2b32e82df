"""`compiledllm serve --api-server-count N`: the process that owns the engines and N HTTP processes.

The owner starts engines and HTTP processes, restarts those that end, passes messages between them,
and ends all of them when told to. `http_process` is the module of an HTTP process.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import socket
import sys
from typing import Any

from compiledllm.arguments import engine_options
from compiledllm.caches import cache_dir
from compiledllm.config import ConfigError
from compiledllm.log import log
from compiledllm.remote.hub import Hub
from compiledllm.remote.shared_life import SharedEngineLife
from compiledllm.remote.shared_table import SharedTable
from compiledllm.remote.wire import Failed
from compiledllm.server.app_options import api_keys_of, app_options_of, limits_of
from compiledllm.server.http_processes import HttpProcesses
from compiledllm.server.launch import on_signal, spawns_of
from compiledllm.server.listening import is_local, reserve, way_to_try
from compiledllm.server.log_line import log_lines
from compiledllm.server.options import served_names
from compiledllm.server.owner_metrics import OwnerMetrics
from compiledllm.server.process import loop_factory, spare_collector
from compiledllm.server.process_settings import ProcessSettings, ProcessState, num_columns

TICK_S = 1.0  # interval of the owner's reports


def serve_in_processes(arguments: argparse.Namespace, is_tls: bool) -> int:
    """Serve until told to stop; return the exit status. Raises ConfigError for wrong options."""
    check_options(arguments)
    api_keys = api_keys_of(arguments)
    options, limits = engine_options(arguments), limits_of(arguments)
    engines = [
        SharedEngineLife(number, options, limits, cache_dir() / "crashes", spawn=spawn)
        for number, spawn in enumerate(spawns_of(options, arguments))
    ]
    with reserve(arguments.host, arguments.port) as place:
        app_options_of(arguments, api_keys, is_local(place))  # reports wrong options here
        owner = _Owner(arguments, api_keys, engines, place, is_tls)
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            return runner.run(owner.run())


def check_options(arguments: argparse.Namespace) -> None:
    """Raise ConfigError for options that do not work with several HTTP processes."""
    count = f"--api-server-count {arguments.api_server_count}"
    if sys.platform != "linux":
        raise ConfigError(
            f"{count} needs Linux, whose kernel spreads connections over processes; leave it at 1"
        )
    if arguments.uds:
        raise ConfigError(
            f"{count} needs a port, as the kernel spreads no connections of --uds {arguments.uds}; "
            "leave out one of the two"
        )
    if arguments.responses_store:
        raise ConfigError(
            f"{count} cannot be used with --responses-store {arguments.responses_store}, as each "
            "process would keep its own responses; leave out one of the two"
        )


class _Owner:
    """Owns engines and HTTP processes. place: the bound socket that keeps the address."""

    def __init__(
        self,
        arguments: argparse.Namespace,
        api_keys: list[str],
        engines: list[SharedEngineLife],
        place: socket.socket,
        is_tls: bool,
    ) -> None:
        self._arguments, self._api_keys = arguments, api_keys
        self._engines, self._place = engines, place
        self._way = way_to_try(place, is_tls, arguments.root_path)
        self._count: int = arguments.api_server_count
        self._hub = Hub(engines)
        model = served_names(arguments, engine_options(arguments))[0]
        self._metrics = OwnerMetrics(arguments.metrics_prefix, model, engines)
        table = SharedTable.create(self._count, num_columns(len(engines)))
        limits = limits_of(arguments)
        self._processes = HttpProcesses(
            self._count, self._settings, self._hub, table, self._metrics, limits
        )

    def _settings(self, row: int, name: str, is_late: bool) -> ProcessSettings:
        host, port = self._place.getsockname()[:2]
        given = {name: value for name, value in vars(self._arguments).items() if name != "run"}
        return ProcessSettings(
            arguments=given,
            api_keys=self._api_keys,
            serves_only_local=is_local(self._place),
            host=host,
            port=port,
            name=name,
            row=row,
            num_rows=self._count,
            num_engines=len(self._engines),
            is_late=is_late,
        )

    async def run(self) -> int:
        spare_collector()  # a long collection would hold up all streams
        ending = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, on_signal, ending)
        for engine in self._engines:
            engine.start()
        tasks: set[asyncio.Task[Any]] = {
            asyncio.create_task(self._processes.run()),
            asyncio.create_task(log_lines(self._metrics)),
            asyncio.create_task(self._tick()),
        }
        announcing = asyncio.create_task(self._announce())
        status = await self._until_end(ending, tasks)
        if status == 0:
            log.info("draining: %d requests live", self._hub.num_live)
        for engine in self._engines:
            engine.begin_draining()
        await self._processes.drain(0.0 if status else self._arguments.shutdown_timeout)
        for task in (*tasks, announcing):
            task.cancel()
        await asyncio.gather(*(engine.stop() for engine in self._engines))
        if status and (failure := self._failure()) is not None:
            print(f"error: {failure.error}", file=sys.stderr, flush=True)
        return status

    async def _until_end(self, ending: asyncio.Event, tasks: set[asyncio.Task[Any]]) -> int:
        """Wait for the end. Returns 0 when told to stop, 2 for wrong options, 1 for a failure."""
        told = asyncio.create_task(ending.wait())
        dead = asyncio.create_task(self._wait_until_dead())
        done, _ = await asyncio.wait({told, dead, *tasks}, return_when=asyncio.FIRST_COMPLETED)
        for task in done & tasks:
            if error := task.exception():
                log.error("the server's own %s has ended", task.get_coro(), exc_info=error)
        for task in {told, dead} - done:
            task.cancel()
        if told in done:
            return 0
        failure = self._failure()
        return 2 if failure is not None and failure.is_config else 1

    async def _wait_until_dead(self) -> None:
        await asyncio.gather(*(engine.wait_until_dead() for engine in self._engines))

    def _failure(self) -> Failed | None:
        """Why the server cannot run any more; None if only one of several engines is lost."""
        if self._processes.failure is not None:
            return self._processes.failure
        failures = [engine.failure for engine in self._engines if engine.state == "dead"]
        return failures[0] if len(failures) == len(self._engines) else None

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self._hub.report()
            self._processes.sweep()

    async def _announce(self) -> None:
        while set(self._processes.states()) != {ProcessState.READY}:
            await asyncio.sleep(0.05)
        log.info("ready at %s, in %d HTTP processes", self._way, self._count)
