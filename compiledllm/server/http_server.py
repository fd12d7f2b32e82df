"""uvicorn with this server's settings, and log lines about a blocked event loop."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import uvicorn

from compiledllm.log import log
from compiledllm.server.connections import Connections
from compiledllm.server.http_protocol import LimitedHttp

MAX_HANDSHAKE_S = 60.0  # limit on a TLS handshake, even if --client-timeout is longer
MAX_STANDSTILL_S = 0.5  # the event loop may block this long without a log line


class HttpServer(uvicorn.Server):
    """A server that leaves signals to its owner: the first drains, the second ends at once."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def make_http_server(
    app: Any, connections: Connections, arguments: argparse.Namespace, tls: dict[str, Any]
) -> HttpServer:
    """A server for `app`. Call in the event loop that runs it."""
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
    if tls:
        _limit_handshakes(asyncio.get_running_loop(), arguments.client_timeout)
    return HttpServer(config)


def _limit_handshakes(loop: asyncio.AbstractEventLoop, seconds: float) -> None:
    """Limit TLS handshakes, because `Connections` sees a connection only after its handshake."""
    limited = functools.partial(
        loop.create_server, ssl_handshake_timeout=min(seconds, MAX_HANDSHAKE_S)
    )
    loop.create_server = limited  # type: ignore[method-assign]  # uvicorn passes no such limit


async def watch_for_standstills() -> None:
    """Log when the event loop was blocked for long, because all streams share that loop."""
    interval, loop = MAX_STANDSTILL_S / 2, asyncio.get_running_loop()
    while True:
        expected_at = loop.time() + interval
        await asyncio.sleep(interval)
        late_s = loop.time() - expected_at
        if late_s > MAX_STANDSTILL_S:
            log.warning("the HTTP process stood still for %.1f s", late_s)
