"""Clients that hold connections and do nothing, beside a server that may open few files."""

from __future__ import annotations

import contextlib
import json
import select
import signal
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.support.server import metric_of, wait_for

pytestmark = pytest.mark.real_model  # its tokenizer

MAX_FILES = 300
POST = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
HALF_BODY = POST + b"content-length: 100\r\n\r\n{"
SHORT = {"prompt": [5, 6, 7], "max_tokens": 2, "ignore_eos": True}
LONG = {"prompt": [5], "stream": True, "max_tokens": 1900, "ignore_eos": True, "logprobs": 20}
LONG |= {"n": 8}  # so much that the server stops writing long before the end
ANSWER_S = 2.0  # for /health; on a slow machine, which is not what is tested


@pytest.fixture(scope="module")
def small(start_server: Callable[..., Any]) -> Any:
    options = ("--client-timeout", "2", "--keep-alive-timeout", "2", "--shutdown-timeout", "5")
    return start_server(*options, max_files=MAX_FILES).wait_until_ready()


@contextlib.contextmanager
def connections(port: int, *said: bytes) -> Iterator[list[socket.socket]]:
    """All at once, each having said something."""
    made = []
    try:
        for _ in said:
            made.append(socket.socket())
            made[-1].setblocking(False)
            with contextlib.suppress(BlockingIOError):
                made[-1].connect(("127.0.0.1", port))
        for connection, data in zip(made, said, strict=True):
            select.select([], [connection], [], 5)
            with contextlib.suppress(OSError):
                connection.send(data)
        yield made
    finally:
        for connection in made:
            connection.close()


def is_open(connection: socket.socket) -> bool:
    try:
        return connection.recv(2**16) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False


def health(server: Any) -> tuple[int | None, float]:
    begun = time.monotonic()
    return server.get("/health")[0], time.monotonic() - begun


def metric(server: Any, name: str) -> float:
    return metric_of(str(server.get("/metrics")[1]), name)


def test_used_up_descriptors_leave_room_for_health(small: Any) -> None:
    with connections(small.port, *[HALF_BODY] * 2 * MAX_FILES) as held:
        refused = 0
        for _ in range(5):
            status, seconds = health(small)
            assert status == 200 and seconds < ANSWER_S
            assert small.get("/metrics")[0] == small.get("/ready")[0] == 200
            refused += small.post("/v1/completions", SHORT)[0] == 503
        assert refused >= 3
        wait_for(lambda: not any(is_open(connection) for connection in held))
    assert small.post("/v1/completions", SHORT)[0] == 200
    wait_for(lambda: "did not complete a body" in small.log)
    assert "connections are open and" in small.log
    assert "Traceback" not in small.log


def test_idle_connections_make_room_for_requests(small: Any) -> None:
    with connections(small.port, *[b"GET /version HTTP/1.1\r\nhost: x\r\n\r\n"] * MAX_FILES):
        wait_for(lambda: small.post("/v1/completions", SHORT)[0] == 200, 10)


def test_silence_ends_a_connection(small: Any) -> None:
    said = [b"", b"\r\n", POST[:9], POST, HALF_BODY, POST + b"transfer-encoding: chunked\r\n\r\n5"]
    with connections(small.port, *said) as held:
        wait_for(lambda: not any(is_open(connection) for connection in held), 20)


def test_an_answer_that_nobody_reads_ends_its_request(small: Any) -> None:
    before = metric(small, "generation_tokens_total")
    raw = json.dumps(LONG).encode()
    with socket.socket() as reader:
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        reader.connect(("127.0.0.1", small.port))
        reader.sendall(POST + b"content-length: %d\r\n\r\n" % len(raw) + raw)
        wait_for(lambda: metric(small, "generation_tokens_total") > before)
        wait_for(lambda: gone(reader))
    wait_for(lambda: metric(small, "num_requests_running") == 0)
    assert metric(small, "generation_tokens_total") < before + 8 * 1900
    assert metric(small, "kv_cache_usage_perc") == 0


def gone(reader: socket.socket) -> bool:
    """Whether the connection was reset: the error is told before what was not read."""
    return reader.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) != 0


def test_told_to_end_it_does_not_wait_for_silent_clients(small: Any) -> None:
    with connections(small.port, *[b"", POST, HALF_BODY] * 30):
        time.sleep(0.3)
        small.process.send_signal(signal.SIGTERM)
        assert small.process.wait(30) == 0
    assert "Traceback" not in small.log
