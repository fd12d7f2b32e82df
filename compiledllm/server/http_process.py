"""One of several HTTP processes: `python -m compiledllm.server.http_process CONNECTION TABLE`.

The process listens at the address at which the other HTTP processes listen, too, and sends its
requests to the engines that its parent process (the owner) holds. CONNECTION and TABLE are file
descriptors: of the connection to the owner, and of the shared table of all HTTP processes. The
owner says when to end; without the owner the process ends at once.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import logging
import os
import signal
import socket
import sys
from typing import Any, NoReturn

from compiledllm.config import ConfigError
from compiledllm.log import log, show_logs
from compiledllm.remote.client_link import OwnerLink
from compiledllm.remote.errors import Unavailable
from compiledllm.remote.replicas import Replicas, ServedEngine
from compiledllm.remote.shared_engine import SharedEngine
from compiledllm.remote.shared_table import SharedTable
from compiledllm.remote.shared_wire import (
    AllMetrics,
    AskMetrics,
    Begin,
    Drain,
    EngineNews,
    MetricsReport,
    Routed,
    ToClient,
)
from compiledllm.remote.wire import Failed
from compiledllm.server.app import create_app
from compiledllm.server.app_options import app_options_of, limits_of
from compiledllm.server.connections import Connection, Connections, Deadlines
from compiledllm.server.descriptors import connection_limit
from compiledllm.server.http_server import make_http_server, watch_for_standstills
from compiledllm.server.listening import listen_beside, tls_options
from compiledllm.server.metrics import Metrics
from compiledllm.server.process import (
    end_threads,
    end_with_parent,
    loop_factory,
    return_large_blocks,
    spare_collector,
)
from compiledllm.server.process_metrics import families_of
from compiledllm.server.process_settings import (
    ProcessSettings,
    ProcessState,
    connections_column,
    num_columns,
    state_column,
)

TICK_S = 1.0  # interval of reports
METRICS_TIMEOUT_S = 5.0  # time limit for the owner to answer with the metrics of all processes
CLOSE_S = 5.0  # time limit for connections to close at the end


def main() -> int:
    end_with_parent()
    connection, table_fd = socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])
    connection.set_inheritable(False)
    os.set_inheritable(table_fd, False)
    # A terminal or a supervisor sends signals to all processes; only the owner acts on them.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    return_large_blocks()
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        return runner.run(_run(connection, table_fd))


async def _run(connection: socket.socket, table_fd: int) -> int:
    link = await OwnerLink.open(connection)
    begin = await link.receive()
    if not isinstance(begin, Begin):
        return 1  # the owner has gone
    settings = ProcessSettings.from_json(begin.settings)
    arguments = settings.namespace
    show_logs(logging.getLevelNamesMapping()[arguments.log_level.upper()])
    table = SharedTable(table_fd, settings.num_rows, num_columns(settings.num_engines))
    process = HttpProcess(settings, link, table)
    try:
        await process.run()
    except* Exception as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        is_config = isinstance(error, ConfigError)
        if not is_config:  # the owner prints the error of a wrong configuration
            log.error("an HTTP process has failed", exc_info=error)
        text = str(error) if is_config else f"{type(error).__name__}: {error}"
        link.send(Failed(text, is_config))
        await asyncio.sleep(0.1)  # for the message to be sent
        process.status = 2 if is_config else 1
    await end_threads(process.status)
    return process.status


class HttpProcess:
    """Serves HTTP in this process. status: the exit status of the process."""

    def __init__(self, settings: ProcessSettings, link: OwnerLink, table: SharedTable) -> None:
        self.status = 0
        self._settings, self._link, self._table = settings, link, table
        limits = limits_of(settings.namespace)
        self._engines = [
            SharedEngine(number, limits, link, table, settings.row, settings.name)
            for number in range(settings.num_engines)
        ]
        self._engine = self._served_engine()
        self._engine.on_loaded = spare_collector
        self._siblings = Siblings(self._engine, self._engines, link, table)
        arguments = settings.namespace
        options = app_options_of(arguments, settings.api_keys, settings.serves_only_local)
        self._app = create_app(self._engine, options, self._siblings)
        self._metrics: Metrics = self._app.state.metrics
        self._told_to_end = asyncio.Event()
        self._drain_timeout_s = 0.0  # set when the owner says to end
        self._background: list[asyncio.Task[Any]] = []

    def _served_engine(self) -> ServedEngine:
        if len(self._engines) == 1:
            return self._engines[0]
        replicas = Replicas([*self._engines])
        replicas.on_route = lambda keys, replica: self._link.send(Routed(replica, keys))
        return replicas

    async def run(self) -> None:
        """Serve until told to end. Raises the error that makes serving impossible, in a group."""
        async with asyncio.TaskGroup() as tasks:
            for work in (self._read(tasks), self._tick(), watch_for_standstills()):
                self._background.append(tasks.create_task(work))
            await self._serve()
            for task in self._background:
                task.cancel()

    async def _serve(self) -> None:
        arguments = self._settings.namespace
        connections = make_connections(arguments, self._table, self._settings)
        server = make_http_server(self._app, connections, arguments, tls_options(arguments))
        if self._settings.is_late:
            await self._settled_or_ending()
        listener = listen_beside(self._settings.host, self._settings.port)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        sweeps = asyncio.create_task(connections.watch())
        self._show_state(ProcessState.LOADING)
        await self._settled_or_ending()
        self._show_state(ProcessState.READY)
        told = asyncio.create_task(self._told_to_end.wait())
        await asyncio.wait({serving, sweeps, told}, return_when=asyncio.FIRST_COMPLETED)
        if not told.done():
            raise RuntimeError(f"the HTTP server or its sweep has ended: {serving}, {sweeps}")
        await self._engine.drain(self._drain_timeout_s)
        server.should_exit = True
        sweeps.cancel()
        await asyncio.wait({serving}, timeout=CLOSE_S)

    async def _settled_or_ending(self) -> None:
        settled: asyncio.Task[Any] = asyncio.create_task(self._engine.wait_until_settled())
        told: asyncio.Task[Any] = asyncio.create_task(self._told_to_end.wait())
        await asyncio.wait({settled, told}, return_when=asyncio.FIRST_COMPLETED)
        settled.cancel()
        told.cancel()

    def _show_state(self, state: ProcessState) -> None:
        self._table.write(self._settings.row, state_column(self._settings.num_engines), state)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            for engine in self._engines:
                engine.tick()
            self._report_metrics(0)

    def _report_metrics(self, number: int) -> None:
        self._link.send(MetricsReport(number, families_of(self._metrics.registry)))

    # -- the owner's messages ------------------------------------------------------------------

    async def _read(self, tasks: asyncio.TaskGroup) -> NoReturn:
        while (message := await self._link.receive()) is not None:
            self._take(message, tasks)
        os._exit(1)  # the owner has gone, and with it the engines

    def _take(self, message: ToClient, tasks: asyncio.TaskGroup) -> None:
        if isinstance(message, EngineNews):
            self._engines[message.engine].take(message)
        elif isinstance(message, AskMetrics):
            self._report_metrics(message.number)
        elif isinstance(message, AllMetrics):
            self._siblings.take_metrics(message)
        elif isinstance(message, Drain):
            self._drain_timeout_s = message.timeout_s
            self._told_to_end.set()
        elif isinstance(message, Routed):
            if isinstance(self._engine, Replicas):
                self._engine.note_route(message.keys, message.engine)
        elif not isinstance(message, Begin):
            more = self._engines[message.engine].take(message)
            if more is not None:
                self._background.append(tasks.create_task(more))


class Siblings:
    """All HTTP processes of the server, as seen from this one (`whole_server.WholeServer`)."""

    def __init__(
        self,
        engine: ServedEngine,
        engines: list[SharedEngine],
        link: OwnerLink,
        table: SharedTable,
    ) -> None:
        self._engine, self._engines = engine, engines
        self._link, self._table = link, table
        self._numbers = itertools.count(1)
        self._asked: dict[int, asyncio.Future[bytes]] = {}

    async def metrics_text(self) -> bytes:
        number = next(self._numbers)
        asked = self._asked[number] = asyncio.get_running_loop().create_future()
        try:
            self._link.send(AskMetrics(number))
            async with asyncio.timeout(METRICS_TIMEOUT_S):
                return bytes(await asked)
        except TimeoutError:
            raise Unavailable("the process that adds up the metrics does not answer", 5) from None
        finally:
            del self._asked[number]

    def take_metrics(self, message: AllMetrics) -> None:
        asked = self._asked.get(message.number)
        if asked is not None and not asked.done():
            asked.set_result(message.shown)

    def num_live(self) -> int:
        return sum(engine.num_live for engine in self._engines)

    def is_ready(self) -> bool:
        is_ready = self._engine.state == "ready" and self._engine.why_unhealthy() is None
        return is_ready and ProcessState.LOADING not in self._states()

    def process_states(self) -> list[str]:
        return [state.name.lower() for state in self._states()]

    def _states(self) -> list[ProcessState]:
        return [ProcessState(n) for n in self._table.column(state_column(len(self._engines)))]


class SharedConnections(Connections):
    """Connections with one limit for all processes together."""

    def __init__(
        self, limit: int, deadlines: Deadlines, table: SharedTable, row: int, column: int
    ) -> None:
        super().__init__(limit, deadlines)
        self._table, self._row, self._column = table, row, column

    def add(self, connection: Connection) -> bool:
        self._table.write(self._row, self._column, len(self._all) + 1)
        return super().add(connection)

    def discard(self, connection: Connection) -> None:
        super().discard(connection)
        self._table.write(self._row, self._column, len(self._all))

    @property
    def num_open(self) -> int:
        return self._table.total(self._column)


def make_connections(
    arguments: argparse.Namespace, table: SharedTable, settings: ProcessSettings
) -> Connections:
    """The connections of this process.

    --max-connections limits all processes together. The default, which follows from the limit on
    open files, limits each process.
    """
    limit = connection_limit(arguments.max_connections)
    deadlines = Deadlines(arguments.client_timeout, arguments.keep_alive_timeout)
    if arguments.max_connections is None:
        return Connections(limit, deadlines)
    column = connections_column(settings.num_engines)
    return SharedConnections(limit, deadlines, table, settings.row, column)


if __name__ == "__main__":
    sys.exit(main())
