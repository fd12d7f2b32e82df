"""What our HTTP takes, refuses and limits, over plain sockets."""

from __future__ import annotations

import functools
import socket
import threading
import time
from collections.abc import Iterator

import pytest

pytest.importorskip("uvicorn")

import uvicorn

from compiledllm.server.connections import Connections, Deadlines
from compiledllm.server.http_protocol import LimitedHttp

HEAD = b"POST / HTTP/1.1\r\nhost: x\r\n"


async def tell_length(scope: dict, receive, send) -> None:  # type: ignore[no-untyped-def, type-arg]
    """Answers with how long the body was."""
    length, more = 0, True
    while more:
        message = await receive()
        length, more = length + len(message.get("body", b"")), message.get("more_body", False)
    body = f"len={length};".encode()
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    http = functools.partial(LimitedHttp, connections=Connections(100, Deadlines(15.0, 15.0)))
    options = {"http": http, "ws": "none", "lifespan": "off", "log_level": "error"}
    config = uvicorn.Config(tell_length, **options)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield int(listener.getsockname()[1])
    server.should_exit = True
    thread.join(10)


def talk(port: int, *writes: bytes, pause_s: float = 0.05) -> bytes:
    """What the server says until it has been silent for a while, or closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
        try:
            for data in writes:
                connection.sendall(data)
                time.sleep(pause_s)
        except OSError:
            pass  # it has closed already
        said = b""
        try:
            while data := connection.recv(65536):
                said += data
        except OSError:
            pass
    return said


def lengths(said: bytes) -> list[bytes]:
    return [part.split(b";")[0] for part in said.split(b"len=")[1:]]


def test_requests_follow_each_other(port: int) -> None:
    one = HEAD + b"content-length: 3\r\n\r\nabc"
    assert lengths(talk(port, one, one)) == [b"3", b"3"]
    assert lengths(talk(port, one + one)) == [b"3", b"3"]


def test_a_long_body_and_the_beginning_of_the_next_request_in_one_write(port: int) -> None:
    body = b"x" * 70_000
    first = HEAD + b"content-length: 70000\r\n\r\n" + body
    second = HEAD + b"content-length: 1\r\n\r\ny"
    assert lengths(talk(port, first + second[:20], second[20:], pause_s=0.2)) == [b"70000", b"1"]


@pytest.mark.parametrize("in_one_write", [True, False])
def test_an_offer_to_speak_http_2_is_passed_over(in_one_write: bool, port: int) -> None:
    offer = b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABk\r\n"
    head, body = HEAD + offer + b"content-length: 10\r\n\r\n", b"0123456789"
    writes = [head + body] if in_one_write else [head, body]
    plain = HEAD + b"content-length: 2\r\n\r\nab"
    said = talk(port, *writes, plain)
    assert lengths(said) == [b"10", b"2"] and b" 400 " not in said


@pytest.mark.parametrize(
    "flood",
    [
        b"GET / HTTP/1.1\r\nhost: x\r\na: ",
        b"GET /",
        HEAD + b"transfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\na: ",
    ],
    ids=["header", "target", "trailer"],
)
def test_what_never_ends_is_refused(flood: bytes, port: int) -> None:
    said = talk(port, flood, *[b"a" * 30_000] * 20, pause_s=0.01)
    assert b" 400 " in said


def test_a_request_without_a_host_is_refused(port: int) -> None:
    assert b" 400 " in talk(port, b"GET / HTTP/1.1\r\n\r\n")
    assert b" 200 " in talk(port, b"GET / HTTP/1.0\r\n\r\n")
