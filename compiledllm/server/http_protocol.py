"""HTTP/1.1 over a compiled parser, with the limits, deadlines and checks that uvicorn lacks.

httptools accepts unlimited headers and trailers and any host, and stops where a client offers to
upgrade to HTTP/2 (`Upgrade: h2c`, as Java's client does by default). uvicorn parses unlimited
pipelined requests, reports a disconnect only to the newest one, and waits forever for a client.
"""

from __future__ import annotations

import contextlib
from asyncio import AbstractEventLoop, Transport
from typing import Any, cast

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from compiledllm.server.connections import Connections, Deadlines, reset_transport
from compiledllm.server.http_heads import Refusal, check_head, head_without_offer
from compiledllm.server.http_progress import BODY, HEAD, IDLE, MIN_BODY_RATE, OVER, Progress

MAX_HEAD_BYTES = 64 * 1024  # of a request's head, and of its trailers
MAX_PARSED_BYTES = 8 * 1024  # per parser call, so at most this much after an unanswered request
MAX_HELD_BYTES = 1024 * 1024  # of requests that wait for an unanswered one
MAX_DISCARDED_BYTES = 64 * 1024 * 1024  # of a body that was answered without being read
LINGER_S = 2.0  # for a client to read why its request was refused
ALWAYS_ANSWERED = frozenset(
    {b"/health", b"/ping", b"/ready", b"/metrics"}
)  # also on spare connections


class LimitedHttp(HttpToolsProtocol):
    """One connection. The parser's callbacks (`on_...`) move it from stage to stage."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: AbstractEventLoop | None = None,
        *,
        connections: Connections,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._connections = connections
        self._is_spare = False  # beyond the limit: only health and metrics are served
        self.progress = Progress(self.loop.time())
        self._answering: RequestResponseCycle | None = None  # the oldest; `cycle` is the newest
        self._is_reading = True  # if False, input is discarded
        self._refusal: Refusal | None = None  # sent once all earlier requests are answered
        self._host = b""  # the last request's host, which needs no second check
        self._is_head_over = False
        self._has_moved = False
        self._num_unread = 0  # bytes since the parser last completed a part
        self._held = b""  # unparsed input after requests that are not answered yet

    # -- called by the transport ---------------------------------------------------------------

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._is_spare = not self._connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.discard(self)
        super().connection_lost(exc)
        if self._answering is not None:
            _tell_of_end(self._answering)
        self.pipeline.clear()
        self._held = b""

    def abort(self) -> None:
        self.transport.abort()

    def close_answered(self) -> None:
        """Close after an answer, but let a client that still sends a body read the answer."""
        if self.progress.stage == BODY:
            self._linger()
        else:
            self.transport.close()

    def _linger(self) -> None:
        """End our output and discard input until the client closes, or for LINGER_S.

        Closing with unread input would reset the connection and lose the answer.
        """
        self._is_reading, self._held = False, b""
        self._enter(OVER)
        if not self.transport.is_closing() and self.transport.can_write_eof():
            self.transport.write_eof()
            self.flow.resume_reading()

    def shutdown(self) -> None:
        """The server ends: finish the answer in progress and nothing else."""
        if self._answering is None or self._answering.more_body:
            self.transport.close()
        else:
            self._answering.keep_alive = False

    def resume_writing(self) -> None:
        self.progress.note_read()
        super().resume_writing()

    def data_received(self, data: bytes) -> None:
        if not self._is_reading:
            return
        if self._held or self.pipeline:
            self._hold(data)
        elif len(data) <= MAX_PARSED_BYTES:
            self._parse(data)
        else:
            self._parse_in_pieces(data)

    def _parse_in_pieces(self, data: bytes) -> None:
        for start in range(0, len(data), MAX_PARSED_BYTES):
            if self.pipeline:
                self._hold(data[start:])
                return
            self._parse(data[start : start + MAX_PARSED_BYTES])
            if not self._is_reading:
                return

    def _hold(self, data: bytes) -> None:
        self._held += data
        self.flow.pause_reading()
        if len(self._held) > MAX_HELD_BYTES:
            self.abort()

    def _parse_held(self) -> None:
        held, self._held = self._held, b""
        if held and not self.transport.is_closing():
            self.flow.resume_reading()
            self.data_received(held)

    def _parse(self, data: bytes) -> None:
        self._has_moved = False
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._pass_over_offer(data[upgrade.args[0] :])
            return
        except httptools.HttpParserError as error:
            self._refuse(Refusal.from_error(error))
            return
        self._num_unread = 0 if self._has_moved else self._num_unread + len(data)
        if self._num_unread > MAX_HEAD_BYTES:
            self._refuse(Refusal(400, f"headers must be at most {MAX_HEAD_BYTES} bytes"))

    def _pass_over_offer(self, rest: bytes) -> None:
        """Parse a request again without its upgrade offer, at which the parser stops."""
        if self._answering is not None:
            self._refuse(Refusal(400, "an upgrade was offered after an unanswered request"))
            return
        parser = self.parser
        head = head_without_offer(
            parser.get_method(),
            self.url,
            parser.get_http_version(),
            self.headers,
            parser.should_keep_alive(),
        )
        self.parser = httptools.HttpRequestParser(self)
        with contextlib.suppress(AttributeError):  # httptools before 0.6.3 has no such method
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self._parse(head)
        self.data_received(rest)

    # -- called by the parser ------------------------------------------------------------------

    def _enter(self, stage: int) -> None:
        self.progress.enter(stage, self.loop.time())

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._is_head_over = False
        self._enter(HEAD)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._is_head_over:
            return  # a trailer must not pass for a header that was checked
        name, value = name.lower(), value.rstrip(b" \t")
        if name == b"expect" and value.lower() == b"100-continue":
            self.expect_100_continue = True
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        self._has_moved = self._is_head_over = True
        if self.parser.get_method() == b"CONNECT":
            raise Refusal(400, "this server is no proxy: CONNECT is not supported")
        if self.parser.should_upgrade():
            return
        self._check_head()
        super().on_headers_complete()
        if not self.pipeline:
            self._answering = self.cycle
        if self._is_spare or not self.parser.should_keep_alive():
            self.cycle.keep_alive = False
        if not self.cycle.keep_alive:
            self.cycle.transport = cast(Transport, _LateClosing(self))
        self._enter(BODY)

    def on_body(self, body: bytes) -> None:
        self._has_moved = True
        self.progress.num_body_bytes += len(body)
        super().on_body(body)
        if self.progress.num_body_bytes > MAX_DISCARDED_BYTES and self.cycle.response_complete:
            raise Refusal(413, "the body is too large")

    def on_message_complete(self) -> None:
        self._has_moved = True
        super().on_message_complete()
        self._enter(IDLE)

    def on_response_complete(self) -> None:
        """Replaces the base class's method, which sets a timer for each request."""
        self.server_state.total_requests += 1
        self._answering = None
        if self.progress.stage == IDLE:
            self._enter(IDLE)
        if self.transport.is_closing():
            return
        if self.pipeline:
            self._answer_next()
        elif self._refusal is not None:
            self._write_refusal()
        elif self._held:
            self.loop.call_soon(self._parse_held)
        else:
            self.flow.resume_reading()

    def _answer_next(self) -> None:
        self._answering, app = self.pipeline.pop()
        task = self.loop.create_task(self._answering.run_asgi(app))
        task.add_done_callback(self.tasks.discard)
        self.tasks.add(task)
        if not self.pipeline and self._held:
            self.flow.pause_reading()

    def _should_upgrade(self) -> bool:
        return True  # makes the base class leave the request alone

    def _check_head(self) -> None:
        version = self.parser.get_http_version()
        self._host = check_head(self.headers, version, self._host)
        if version != "1.1":
            self.expect_100_continue = False  # HTTP/1.0 has no "100 Continue"
        if self._is_spare and self.url.partition(b"?")[0] not in ALWAYS_ANSWERED:
            raise Refusal(503, "too many connections are open; try again in a moment")

    # -- refusing ------------------------------------------------------------------------------

    def _refuse(self, refusal: Refusal) -> None:
        """Stop reading, send an error once all earlier requests are answered, and close."""
        self._is_reading, self._held = False, b""
        if self.progress.stage == BODY and not self._drop_unfinished():
            return
        self._refusal, self.progress.stage = refusal, OVER
        if self._answering is None:
            self._write_refusal()

    def _drop_unfinished(self) -> bool:
        """Drop the request whose body is incomplete; return whether an error can still be sent."""
        if self.pipeline:  # the incomplete request is the last in the pipeline and has not started
            self.pipeline.popleft()
            return True
        self._answering, cycle = None, self.cycle
        if cycle.response_started:
            self.transport.close() if cycle.response_complete else self.abort()
            return False
        _tell_of_end(cycle)
        return True

    def _write_refusal(self) -> None:
        assert self._refusal is not None
        if not self.transport.is_closing():
            self.transport.write(self._refusal.answer(self.server_state.default_headers))
        self._refusal = None
        self._linger()

    # -- deadlines -----------------------------------------------------------------------------

    @property
    def since(self) -> float:
        return self.progress.since

    def is_idle(self) -> bool:
        return self.progress.stage == IDLE and self._answering is None and not self._held

    def end_if_overdue(self, now: float, deadlines: Deadlines) -> str | None:
        if self._is_stalled(now, deadlines.client_s):
            reset_transport(self.transport)
            return "did not read an answer"
        if self.transport.is_closing():
            return None
        progress = self.progress
        if self._is_waiting_for_us():
            progress.wait_for_us(now)
            return None
        if progress.stage == OVER:
            if now - progress.since > LINGER_S:
                self.transport.close()
            return None
        cause = progress.why_overdue(now, deadlines, is_first=not self.cycle)
        if cause is not None:
            self.transport.close()
        elif progress.is_body_slow(now, deadlines.client_s):
            rate = f"{MIN_BODY_RATE // 1024} KiB/s"
            self._refuse(Refusal(408, f"the body came too slowly; send at least {rate}"))
            cause = "sent a body too slowly"
        return cause

    def _is_waiting_for_us(self) -> bool:
        """Whether the server must act next, whatever the client does."""
        if self.flow.read_paused:
            return True
        return self._answering is not None and not self._answering.more_body

    def _is_stalled(self, now: float, client_s: float) -> bool:
        """Whether the client has read nothing of the pending answer for `client_s` seconds.

        Only answers to which nothing is being added count: the answer is paused or complete.
        """
        num_bytes = self.transport.get_write_buffer_size()
        if num_bytes and (self.flow.write_paused or self._answering is None):
            return self.progress.is_unread(num_bytes, now, client_s)
        self.progress.note_read()
        return False


class _LateClosing:
    """The transport for an answer after which the connection ends: `close` is `close_answered`."""

    def __init__(self, connection: LimitedHttp) -> None:
        transport = connection.transport
        self.write, self.is_closing = transport.write, transport.is_closing
        self.close = connection.close_answered


def _tell_of_end(cycle: RequestResponseCycle) -> None:
    """Tell the handler of a request that its client is gone."""
    if not cycle.response_complete:
        cycle.disconnected = True
    cycle.message_event.set()
