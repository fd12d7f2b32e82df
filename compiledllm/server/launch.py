"""`compiledllm serve`: options, the listening socket, signals, the order of start and shutdown."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator
from typing import Any

import uvicorn

from compiledllm.arguments import engine_options
from compiledllm.caches import cache_dir
from compiledllm.config import EngineConfig
from compiledllm.log import log, show_logs
from compiledllm.remote.engine_client import EngineClient
from compiledllm.remote.limits import Limits
from compiledllm.remote.replicas import Replicas, ServedEngine, gpus_of_replicas
from compiledllm.server.api_keys import read_keys
from compiledllm.server.app import AppOptions, create_app
from compiledllm.server.connections import Connections, Deadlines
from compiledllm.server.descriptors import connection_limit
from compiledllm.server.http_protocol import LimitedHttp
from compiledllm.server.listening import close, is_local, listen, tls_options, way_to_try
from compiledllm.server.openai.answer import AnswerSettings
from compiledllm.server.openai.response_store import ResponseStore
from compiledllm.server.options import served_names
from compiledllm.server.origins import parse_cors
from compiledllm.server.process import (
    end_threads,
    loop_factory,
    return_large_blocks,
    spare_collector,
)

LOG_LINE_INTERVAL_S = 10.0
MAX_HANDSHAKE_S = 60.0  # for a client to finish its TLS handshake, whatever --client-timeout says
MAX_STANDSTILL_S = 0.5  # the event loop may block this long without a log line


def serve(arguments: argparse.Namespace) -> int:
    """Serve until told to stop; return the exit status. A failure's cause is printed last."""
    show_logs(logging.getLevelNamesMapping()[arguments.log_level.upper()])
    return_large_blocks()
    options = engine_options(arguments)
    EngineConfig.from_options(**options)  # reports wrong options before anything is started
    deadlines = Deadlines(arguments.client_timeout, arguments.keep_alive_timeout)
    connections = Connections(connection_limit(arguments.max_connections), deadlines)
    tls = tls_options(arguments)
    listener = listen(arguments)
    try:
        app_options = _app_options(arguments, listener)
        engine = _make_engine(options, arguments)
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
    http: Any = functools.partial(LimitedHttp, connections=connections)
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        timeout_keep_alive=arguments.keep_alive_timeout,
        http=http,
        ws="none",
        lifespan="off",
        server_header=False,
        **tls,
    )
    server = _Server(config)
    loop = asyncio.get_running_loop()
    if tls:
        _limit_handshakes(loop, arguments.client_timeout)
    ending = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _on_signal, ending, server)
    engine.start()
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    lines = asyncio.create_task(_log_lines(app.state.metrics))
    watch = asyncio.create_task(
        _announce(engine, way_to_try(listener, bool(tls), options.root_path))
    )
    sweeps = asyncio.create_task(connections.watch())
    standstills = asyncio.create_task(_watch_for_standstills())
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


class _Server(uvicorn.Server):
    """A server that leaves signals to this module: the first drains, the second ends at once."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _on_signal(ending: asyncio.Event, server: uvicorn.Server) -> None:
    if ending.is_set():
        log.warning("stopping at once")
        os._exit(130)
    ending.set()


async def _until_end(engine: ServedEngine, ending: asyncio.Event, tasks: set[Any]) -> int:
    """Wait for the end: 0 when told to stop, 2 for a wrong config, 1 for a lost engine.

    tasks: run as long as the server; the status is also 1 when one of them ends.
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


def _limit_handshakes(loop: asyncio.AbstractEventLoop, seconds: float) -> None:
    """End connections whose TLS handshake takes longer: `Connections` sees them only afterwards."""
    limited = functools.partial(
        loop.create_server, ssl_handshake_timeout=min(seconds, MAX_HANDSHAKE_S)
    )
    loop.create_server = limited  # type: ignore[method-assign]  # uvicorn passes no such limit


async def _announce(engine: ServedEngine, way: str) -> None:
    await engine.wait_until_settled()
    if engine.state == "ready":
        log.info("ready at %s", way)


async def _log_lines(metrics: Any) -> None:
    while True:
        await asyncio.sleep(LOG_LINE_INTERVAL_S)
        metrics.log_line()


async def _watch_for_standstills() -> None:
    """Log when the event loop was blocked for long, because all streams share that loop."""
    interval, loop = MAX_STANDSTILL_S / 2, asyncio.get_running_loop()
    while True:
        expected_at = loop.time() + interval
        await asyncio.sleep(interval)
        late_s = loop.time() - expected_at
        if late_s > MAX_STANDSTILL_S:
            log.warning("the HTTP process stood still for %.1f s", late_s)


def _app_options(arguments: argparse.Namespace, listener: socket.socket) -> AppOptions:
    options = engine_options(arguments)
    return AppOptions(
        model_names=served_names(arguments, options),
        api_keys=read_keys(
            arguments.api_key or [],
            arguments.api_key_file,
            os.environ.get("COMPILEDLLM_API_KEY"),
        ),
        cors=parse_cors(
            arguments.allowed_origins,
            arguments.allowed_methods,
            arguments.allowed_headers,
            arguments.allow_credentials,
        ),
        root_path=arguments.root_path,
        has_docs=not arguments.disable_fastapi_docs,
        logs_access=arguments.access_log,
        serves_only_local=is_local(listener),
        strict_fields=arguments.strict_fields,
        logs_requests=arguments.enable_log_requests,
        metrics_prefix=arguments.metrics_prefix,
        answers=AnswerSettings(
            arguments.tool_call_parser,
            arguments.reasoning_parser,
            shows_cached_tokens=arguments.enable_prompt_tokens_details,
            response_store=ResponseStore(arguments.responses_store),
        ),
    )


def _make_engine(options: dict[str, Any], arguments: argparse.Namespace) -> ServedEngine:
    """The client of the engine, or of as many as `data_parallel_size` says."""
    limits, crashes = _limits(arguments), cache_dir() / "crashes"
    count: int = arguments.data_parallel_size
    if count == 1:
        return EngineClient(options, limits, crashes)
    gpus = gpus_of_replicas(
        count, int(options.get("tensor_parallel_size") or 1), os.environ.get("CUDA_VISIBLE_DEVICES")
    )
    return Replicas(
        [EngineClient(options, limits, crashes, environment=variables) for variables in gpus]
    )


def _limits(arguments: argparse.Namespace) -> Limits:
    return Limits(
        queued_requests=arguments.max_queued_requests,
        queued_tokens=arguments.max_queued_tokens,
        request_s=arguments.request_timeout,
        stuck_s=arguments.stuck_timeout,
        load_s=arguments.load_timeout,
    )
