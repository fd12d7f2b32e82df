"""A connection of the server's, over a transport that only notes what is done to it."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("uvicorn")

import uvicorn
from uvicorn.server import ServerState

from compiledllm.server import http_protocol
from compiledllm.server.connections import Connections, Deadlines
from compiledllm.server.http_progress import MIN_BODY_RATE
from compiledllm.server.http_protocol import LINGER_S, LimitedHttp

LIMIT_S = 10.0
DEADLINES = Deadlines(client_s=LIMIT_S, keep_alive_s=3 * LIMIT_S)
HEAD = b"POST /path HTTP/1.1\r\nhost: x\r\n"
GET = b"GET /path HTTP/1.1\r\nhost: x\r\n\r\n"


class Transport(asyncio.Transport):
    """pending: bytes that the client has not taken."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.pending = 0
        self.is_closed = self.has_sent_eof = self.is_paused = False

    def write(self, data: Any) -> None:
        self.written += data

    def close(self) -> None:
        self.is_closed = True

    abort = close

    def is_closing(self) -> bool:
        return self.is_closed

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.has_sent_eof = True

    def pause_reading(self) -> None:
        self.is_paused = True

    def resume_reading(self) -> None:
        self.is_paused = False

    def get_write_buffer_size(self) -> int:
        return self.pending


class Client:
    """A connection, what its requests were, and what came back.

    The application waits for `may_answer`, then for the body, and answers with the body's length.
    """

    def __init__(self, connections: Connections | None = None) -> None:
        self.connections = Connections(100, DEADLINES) if connections is None else connections
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.scopes: list[dict[str, Any]] = []
        self.num_left = 0
        options: Any = {"interface": "asgi3", "ws": "none", "lifespan": "off", "log_level": "error"}
        config = uvicorn.Config(self.application, **options)
        config.load()
        self.connection = LimitedHttp(config, ServerState(), {}, connections=self.connections)
        self.transport = Transport()
        self.connection.connection_made(self.transport)

    async def application(self, scope: Any, receive: Any, send: Any) -> None:
        self.scopes.append(scope)
        await self.may_answer.wait()
        length, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.num_left += 1
                return
            length, more = length + len(message["body"]), message["more_body"]
        await self.answer(send, str(length).encode())

    async def answer(self, send: Any, body: bytes) -> None:
        headers = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def say(self, *pieces: bytes) -> list[int]:
        """The statuses of all answers so far."""
        for piece in pieces:
            self.connection.data_received(piece)
            await self.pause()
        return self.statuses

    async def pause(self) -> None:
        for _ in range(8):
            await asyncio.sleep(0)

    @property
    def statuses(self) -> list[int]:
        return [int(s) for s in re.findall(rb"HTTP/1.1 (\d+) ", self.transport.written)]

    def after(self, seconds: float) -> str | None:
        """What a sweep says so long from now."""
        now = asyncio.get_running_loop().time() + seconds
        return self.connection.end_if_overdue(now, DEADLINES)


def in_loop(test: Callable[[], Any]) -> None:
    asyncio.run(test())


# -- what is refused ------------------------------------------------------------------------------

BODY = b"4\r\nabcd\r\n0\r\n\r\n"
CODING = b"transfer-encoding: chunked\r\n"


@pytest.mark.parametrize(
    "request_",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost:\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: x\r\nhost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: x\r\nHost: y\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: x/y\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: a b\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: a@b\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: x:port\r\n\r\n",
        b"GET / HTTP/1.0\r\nhost: x\r\nhost: y\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: x\r\nauthorization: a\r\nauthorization: b\r\n\r\n",
        HEAD + b"content-length: 4\r\n" + CODING + b"\r\n" + BODY,
        HEAD + CODING + b"content-length: 4\r\n\r\n" + BODY,
        HEAD + b"content-length: 4\r\ncontent-length: 5\r\n\r\nabcde",
        HEAD + b"content-length: 4, 4\r\n\r\nabcd",
        HEAD + b"content-length: +4\r\n\r\nabcd",
        HEAD + b"content-length: " + b"9" * 5000 + b"\r\n\r\n",
        HEAD + CODING + CODING + b"\r\n" + BODY,
        HEAD + b"transfer-encoding: gzip, chunked\r\n\r\n" + BODY,
        HEAD + b"transfer-encoding: identity\r\n\r\n",
        HEAD + b"transfer-encoding:\r\n chunked\r\n\r\n" + BODY,
        b"POST / HTTP/1.0\r\n" + CODING + b"\r\n" + BODY,
        HEAD + CODING + b"\r\n4 \r\nabcd\r\n0\r\n\r\n",
        HEAD + CODING + b"\r\n-1\r\nabcd\r\n0\r\n\r\n",
        HEAD + CODING + b"\r\n" + b"f" * 40 + b"\r\n",
        HEAD + CODING + b"\r\n2\r\nabcd\r\n0\r\n\r\n",
        HEAD + CODING + b"\r\n4;a\nb\r\nabcd\r\n0\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: x\r\na: b\r\n c\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: x\r\na: b\0c\r\n\r\n",
        b"GET /a\0b HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET http:// HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET /\r\n\r\n",
        b"GET / HTTP/2.0\r\nhost: x\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"CONNECT x:22 HTTP/1.1\r\nhost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"GET / HTTP/1.1\r\nhost: x\r\na: " + b"b" * 80_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: x\r\n" + b"a: b\r\n" * 20_000 + b"\r\n",
        HEAD + CODING + b"\r\n4;" + b"a" * 90_000 + b"\r\nabcd\r\n0\r\n\r\n",
    ],
    ids=lambda given: repr(given[:80]),
)
def test_what_can_be_read_in_two_ways_is_refused_once(request_: bytes) -> None:
    async def run() -> None:
        client = Client()
        assert await client.say(request_ + GET) == [400]
        error = json.loads(client.transport.written.partition(b"\r\n\r\n")[2])["error"]
        assert error["type"] == "invalid_request_error" and len(error["message"]) > 10
        assert b"connection: close" in client.transport.written and client.transport.has_sent_eof
        assert await client.say(GET) == [400]  # nothing is read any more
        assert client.num_left == len(client.scopes)

    in_loop(run)


@pytest.mark.parametrize(
    ("head", "body"),
    [
        (b"content-length: 4 \r\n", b"abcd"),
        (b"content-length:\t4\t\r\n", b"abcd"),
        (b"Transfer-Encoding:  Chunked \r\n", BODY),
        (b"accept: a\r\naccept: b\r\ncontent-length: 4\r\n", b"abcd"),
        (CODING, b"4;a=b\r\nabcd\r\n0\r\n\r\n"),
        (b"upgrade: h2c\r\nconnection: upgrade\r\ncontent-length: 4\r\n", b"abcd"),
        (b"upgrade: websocket\r\nconnection: upgrade\r\n" + CODING, BODY),
    ],
)
@pytest.mark.parametrize("host", [b"x", b"127.0.0.1:8000", b"[::1]:80", b"a_b.c-d.example:"])
def test_what_is_legal_is_read(head: bytes, body: bytes, host: bytes) -> None:
    async def run() -> None:
        client = Client()
        request = b"POST / HTTP/1.1\r\nhost: " + host + b"\r\n" + head + b"\r\n" + body
        assert await client.say(request) == [200]
        assert client.transport.written.endswith(b"\r\n\r\n4")
        assert await client.say(*(bytes([byte]) for byte in request)) == [200, 200]

    in_loop(run)


def test_a_trailer_is_no_header() -> None:
    async def run() -> None:
        client = Client()
        trailers = b"authorization: Bearer key\r\nhost: y\r\n\r\n"
        assert await client.say(HEAD + CODING + b"\r\n" + BODY[:-2] + trailers) == [200]
        assert client.scopes[0]["headers"] == [(b"host", b"x"), (b"transfer-encoding", b"chunked")]

    in_loop(run)


def test_http_1_0_and_connection_close_end_with_the_answer() -> None:
    async def run() -> None:
        for request in (b"GET / HTTP/1.0\r\n\r\n", GET[:-2] + b"connection: close\r\n\r\n"):
            client = Client()
            assert await client.say(request + GET) == [200]
            assert client.transport.is_closed

    in_loop(run)


def test_one_that_closes_reads_its_answer_first_though_its_body_still_comes() -> None:
    async def run() -> None:
        client = Client()

        async def refuse(scope: Any, receive: Any, send: Any) -> None:
            await client.answer(send, b"no")

        client.connection.app = refuse
        head = HEAD + b"connection: close\r\ncontent-length: 100\r\n\r\n"
        assert await client.say(head + b"a" * 50, b"a" * 50) == [200]
        assert client.transport.has_sent_eof and not client.transport.is_closed
        client.after(LINGER_S + 1)
        assert client.transport.is_closed

    in_loop(run)


# -- requests behind each other -------------------------------------------------------------------


def test_of_many_requests_in_one_write_few_are_read_before_they_are_answered() -> None:
    async def run() -> None:
        client = Client()
        client.may_answer.clear()
        await client.say(GET * 3000)
        assert len(client.connection.pipeline) <= http_protocol.MAX_PARSED_BYTES // len(GET)
        assert client.transport.is_paused and len(client.scopes) == 1
        client.may_answer.set()
        while len(client.scopes) < 3000:
            await client.pause()
        await client.pause()
        assert client.statuses == [200] * 3000
        assert not client.transport.is_paused and client.connection.is_idle()

    in_loop(run)


def test_who_floods_behind_an_unanswered_request_is_cut_off() -> None:
    async def run() -> None:
        client = Client()
        client.may_answer.clear()
        await client.say(GET * 1000, *[GET * 1000] * 40)
        assert client.transport.is_closed

    in_loop(run)


def test_an_invalid_request_is_refused_behind_the_answers_before_it() -> None:
    async def run() -> None:
        for last in (b"FOO / HTTP/1.1\r\n\r\n", HEAD + CODING + b"\r\nx"):
            client = Client()
            client.may_answer.clear()
            assert await client.say(GET + GET, last + GET) == []
            client.may_answer.set()
            await client.pause()
            await client.pause()
            assert client.statuses == [200, 200, 400] and client.transport.has_sent_eof

    in_loop(run)


def test_all_requests_of_a_client_that_left_are_told() -> None:
    async def run() -> None:
        client = Client()
        client.may_answer.clear()
        await client.say(GET * 3)
        client.connection.connection_lost(None)
        client.may_answer.set()
        await client.pause()
        assert (client.num_left, len(client.scopes)) == (1, 1)

    in_loop(run)


# -- deadlines ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pieces", "cause"),
    [
        ([], "sent nothing"),
        ([b"\r\n", b"\r\n"], "sent nothing"),
        ([b"POST /pa"], "did not complete its headers"),
        ([HEAD, b"a: b\r\n"], "did not complete its headers"),
        ([HEAD + b"content-length: 9\r\n\r\nabc"], "did not complete a body"),
        ([HEAD + b"expect: 100-continue\r\ncontent-length: 9\r\n\r\n"], "did not complete a body"),
        ([HEAD + CODING + b"\r\n4\r\nabcd\r\n0\r\n"], "did not complete a body"),
        ([GET, b"GE"], "did not complete its headers"),
    ],
)
def test_a_silent_client_is_closed(pieces: list[bytes], cause: str) -> None:
    async def run() -> None:
        client = Client()
        await client.say(*pieces)
        assert client.after(0) is None
        assert client.after(LIMIT_S - 1) is None and not client.transport.is_closed
        assert client.after(LIMIT_S + 1) == cause and client.transport.is_closed
        client.connection.connection_lost(None)
        await client.pause()
        answered = len(client.statuses) - client.statuses.count(100)
        assert client.num_left == len(client.scopes) - answered

    in_loop(run)


def test_an_idle_connection_lives_for_its_own_time() -> None:
    async def run() -> None:
        client = Client()
        await client.say(GET)
        assert client.after(3 * LIMIT_S - 1) is None
        assert client.after(3 * LIMIT_S + 1) == "sent nothing" and client.transport.is_closed

    in_loop(run)


def test_a_slow_body_may_take_as_long_as_it_is_long() -> None:
    async def run() -> None:
        client = Client()
        await client.say(HEAD + b"content-length: 9999999\r\n\r\n")
        begun = asyncio.get_running_loop().time()
        for second in range(1, 60):  # a little faster than it has to be
            await client.say(b"a" * (MIN_BODY_RATE + 200))
            assert client.connection.end_if_overdue(begun + second, DEADLINES) is None
        for second in range(60, 90):  # never silent, and too slow
            await client.say(b"a" * 100)
            cause = client.connection.end_if_overdue(begun + second, DEADLINES)
            if cause is not None:
                break
        assert cause == "sent a body too slowly" and second > 60 + LIMIT_S
        assert client.statuses == [408] and b"32 KiB/s" in client.transport.written
        await client.pause()
        assert client.num_left == 1

    in_loop(run)


def test_time_that_the_server_takes_is_not_the_clients() -> None:
    async def run() -> None:
        client = Client()
        client.may_answer.clear()
        await client.say(HEAD + b"content-length: 200000\r\n\r\n" + b"a" * 100_000)
        assert client.transport.is_paused  # nobody takes it
        assert client.after(1000) is None
        client.may_answer.set()
        await client.say(b"a" * 100_000)
        assert client.statuses == [200]
        client.may_answer.clear()
        await client.say(GET, b"GET / HT")
        assert client.after(1000) is None  # it waits for an answer, and half a head came meanwhile

    in_loop(run)


def test_an_answer_that_nobody_reads_is_given_up() -> None:
    async def run() -> None:
        client = Client()
        client.may_answer.clear()
        await client.say(GET)
        client.transport.pending = 90_000
        client.connection.pause_writing()
        assert client.after(0) is None and client.after(LIMIT_S - 1) is None
        client.transport.pending = 80_000  # a little was read
        assert client.after(LIMIT_S) is None and client.after(2 * LIMIT_S - 1) is None
        client.connection.resume_writing()  # much was read, and written again
        client.connection.pause_writing()
        client.transport.pending = 90_000
        assert client.after(2 * LIMIT_S) is None and client.after(3 * LIMIT_S - 1) is None
        assert client.after(3 * LIMIT_S + 1) == "did not read an answer"
        assert client.transport.is_closed
        client.connection.connection_lost(None)
        client.may_answer.set()
        await client.pause()
        assert client.num_left == 1

    in_loop(run)


def test_a_whole_answer_that_nobody_reads_is_given_up() -> None:
    async def run() -> None:
        client = Client()
        await client.say(GET)
        client.transport.pending = 10
        assert client.after(0) is None
        assert client.after(LIMIT_S + 1) == "did not read an answer"

    in_loop(run)


def test_a_body_of_a_refused_request_is_thrown_away_up_to_a_limit() -> None:
    async def run() -> None:
        client = Client()

        async def refuse(scope: Any, receive: Any, send: Any) -> None:
            await client.answer(send, b"no")

        client.connection.app = refuse
        await client.say(HEAD + b"content-length: 99999999999\r\n\r\n")
        piece = b"a" * 2**20
        for _ in range(http_protocol.MAX_DISCARDED_BYTES // 2**20):
            await client.say(piece)
        assert not client.transport.is_closed and not client.transport.is_paused
        await client.say(piece)
        assert client.transport.is_closed and client.statuses == [200]

    in_loop(run)


# -- too many connections -------------------------------------------------------------------------


def test_beyond_the_limit_only_the_state_is_told() -> None:
    async def run() -> None:
        connections = Connections(2, DEADLINES)
        held = [Client(connections) for _ in range(2)]
        for client in held:
            await client.say(HEAD)
        for path in (b"/health", b"/ready", b"/metrics?x"):
            client = Client(connections)
            request = b"GET " + path + b" HTTP/1.1\r\nhost: x\r\n\r\n"
            assert await client.say(request) == [200]
            assert client.transport.is_closed
            client.connection.connection_lost(None)
        refused = Client(connections)
        assert await refused.say(GET) == [503]
        assert b"retry-after: 1" in refused.transport.written
        held[0].connection.connection_lost(None)
        refused.connection.connection_lost(None)
        assert await Client(connections).say(GET, GET) == [200, 200]

    in_loop(run)


def test_spare_connections_take_the_place_of_older_ones() -> None:
    async def run() -> None:
        connections = Connections(8, DEADLINES)
        held = [Client(connections) for _ in range(8)]
        spare = [Client(connections) for _ in range(3)]
        assert [client.transport.is_closed for client in spare] == [True, False, False]
        assert not any(client.transport.is_closed for client in held)

    in_loop(run)


def test_idle_connections_make_room(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        connections = Connections(3, DEADLINES)
        idle, busy, newer = (Client(connections) for _ in range(3))
        for client in (idle, busy, newer):
            client.connection.progress.since -= 5
        await newer.say(GET)
        newer.connection.progress.since -= 2
        await busy.say(HEAD)
        connections.sweep(asyncio.get_running_loop().time())
        clients = [Client(connections) for _ in range(3)]
        closed = [client.transport.is_closed for client in (idle, newer, busy)]
        assert closed == [True, True, False]
        assert [await client.say(GET) for client in clients] == [[200], [200], [503]]

    in_loop(run)
    assert sum("connections are open and 3 may be" in line for line in caplog.messages) == 1


def test_told_to_end_only_answers_are_waited_for() -> None:
    async def run() -> None:
        idle, half, answered = Client(), Client(), Client()
        await half.say(HEAD + b"content-length: 9\r\n\r\nabc")
        answered.may_answer.clear()
        await answered.say(GET)
        for client in (idle, half, answered):
            client.connection.shutdown()
        assert idle.transport.is_closed and half.transport.is_closed
        assert not answered.transport.is_closed
        answered.may_answer.set()
        await answered.pause()
        assert answered.statuses == [200] and answered.transport.is_closed

    in_loop(run)
