"""Checks of a request's head, and the response to a request that is refused.

A proxy and this server read the same connection and must agree on where each request ends and which
host it is for. Heads that the two could read differently are refused.
"""

from __future__ import annotations

import http
import json
import re
from collections.abc import Sequence

import httptools

from compiledllm.server.openai.errors import ApiError, error_body

_ONCE = (b"host", b"content-length", b"transfer-encoding", b"authorization")
_HOST = re.compile(rb"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~!$&'()*+,;=%-]+)(?::[0-9]{0,5})?")


class Refusal(Exception):
    """The reason why a request is refused and its connection is not read any further."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message

    @classmethod
    def from_error(cls, error: httptools.HttpParserError) -> Refusal:
        """The Refusal that a callback raised, or one with the parser's own reason."""
        if isinstance(error.__context__, Refusal):
            return error.__context__
        reason = "its target cannot be read"
        if not isinstance(error, httptools.HttpParserCallbackError):
            reason = str(error)
        return cls(400, f"this is not a valid HTTP/1.1 request: {reason}")

    def answer(self, default_headers: list[tuple[bytes, bytes]]) -> bytes:
        """The whole HTTP response, with a body in OpenAI's format."""
        body = json.dumps(error_body(ApiError(self.status, self.message))).encode()
        lines = [f"HTTP/1.1 {self.status} {http.HTTPStatus(self.status).phrase}".encode()]
        lines += [name + b": " + value for name, value in default_headers]
        lines += [b"content-type: application/json", b"content-length: %d" % len(body)]
        lines += [b"connection: close"]
        if self.status == 503:
            lines.append(b"retry-after: 1")
        return b"\r\n".join([*lines, b"", body])


def check_head(headers: Sequence[tuple[bytes, bytes]], version: str, known_host: bytes) -> bytes:
    """Check a head and return its host. known_host: a host that was checked. Raises Refusal."""
    fields = dict(headers)
    if len(fields) < len(headers):
        _check_repeated([name for name, _ in headers])
    if version != "1.1":
        _check_version(version)
    host = fields.get(b"host", b"")
    if not host or host != known_host:
        _check_host(host, version)
    if b"transfer-encoding" in fields:
        _check_coding(fields[b"transfer-encoding"], version)
    return host


def _check_repeated(names: Sequence[bytes]) -> None:
    for name in _ONCE:
        if names.count(name) > 1:
            raise Refusal(400, f"there is more than one {name.decode()} header")


def _check_version(version: str) -> None:
    if version not in ("1.1", "1.0"):
        raise Refusal(400, f"this server speaks HTTP/1.1, not HTTP/{version}")


def _check_host(host: bytes, version: str) -> None:
    """Check for a name or an address with an optional port; HTTP/1.0 may omit the host."""
    if not _HOST.fullmatch(host) and (host or version != "1.0"):
        raise Refusal(400, f"the host header must name a host, got '{_shown(host)}'")


def _check_coding(coding: bytes, version: str) -> None:
    if coding.lower() != b"chunked" or version != "1.1":
        raise Refusal(400, f"transfer-encoding must be chunked, got '{_shown(coding)}'")


def _shown(value: bytes) -> str:
    return value[:64].decode("ascii", "backslashreplace")


_OF_UPGRADES = frozenset({b"upgrade", b"connection", b"http2-settings"})


def head_without_offer(
    method: bytes,
    url: bytes,
    version: str,
    headers: Sequence[tuple[bytes, bytes]],
    is_kept_alive: bool,
) -> bytes:
    """The head of a request as it would be without its offer to upgrade."""
    lines = [method + b" " + url + b" HTTP/" + version.encode()]
    lines += [name + b": " + value for name, value in headers if name not in _OF_UPGRADES]
    if not is_kept_alive:
        lines.append(b"connection: close")
    return b"\r\n".join([*lines, b"", b""])
