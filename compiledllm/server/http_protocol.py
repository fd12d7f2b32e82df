"""HTTP/1.1 of a compiled parser, with what it leaves out: limits, and patience with other clients.

httptools takes headers and trailers without end and requests without a host, and stops where a
client offers to speak HTTP/2 (`Upgrade: h2c`, as Java's does by default): h11 goes on from there.
"""

from __future__ import annotations

import httptools
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 64 * 1024  # of a request; and of its trailers
_INVALID = "Invalid HTTP request received."
_OF_UPGRADES = (b"upgrade", b"connection", b"http2-settings")


class LimitedHttp(HttpToolsProtocol):
    """One connection."""

    _unread = 0  # bytes since the parser completed anything
    _has_moved = False

    def on_headers_complete(self) -> None:
        self._has_moved = True
        if self.parser.get_http_version() == "1.1" and b"host" not in dict(self.headers):
            raise ValueError("a request needs a host")
        if not self.parser.should_upgrade():
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._has_moved = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._has_moved = True
        super().on_message_complete()

    def _should_upgrade(self) -> bool:
        return True  # to h11: nothing is done here with such a request

    def data_received(self, data: bytes) -> None:
        self._has_moved = False
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._hand_over(data[upgrade.args[0] :])
            return
        except httptools.HttpParserError:
            self.send_400_response(_INVALID)
            return
        self._unread = 0 if self._has_moved else self._unread + len(data)
        if self._unread > MAX_HEAD_BYTES:
            self.send_400_response("The headers are too long.")

    def _hand_over(self, rest: bytes) -> None:
        """The connection to h11, beginning with this request, without its offer."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.send_400_response(_INVALID)  # behind one that is not answered yet
            return
        lines = [self.parser.get_method() + b" " + self.url + b" HTTP/1.1"]
        lines += [name + b": " + value for name, value in self.headers if name not in _OF_UPGRADES]
        other = H11Protocol(self.config, self.server_state, self.app_state)
        self.connections.discard(self)
        other.connection_made(self.transport)
        self.transport.set_protocol(other)
        other.data_received(b"\r\n".join([*lines, b"", rest]))
