"""The server's listening socket, at an address or a Unix socket's path, and its options for TLS."""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import os
import socket
import ssl
import stat
from typing import Any

from compiledllm.config import ConfigError

SEND_BUFFER_BYTES = 2**18  # per socket; limits kernel memory for a client that does not read
BACKLOG = 2048


def listen(arguments: argparse.Namespace) -> socket.socket:
    """Listen at once, so that a port in use is reported before a model is loaded.

    Raises ConfigError if that is not possible, as when another server listens there.
    """
    uds, host, port = arguments.uds, arguments.host, arguments.port
    try:
        listener = _unix_socket(uds) if uds else _bound(host, port)
        listener.listen(BACKLOG)
    except OSError as error:
        way_out = "choose another --uds" if uds else "choose another --port or --host"
        raise _no_place(uds or f"{host}:{port}", error, way_out) from None
    listener.set_inheritable(False)
    return listener


def reserve(host: str, port: int) -> socket.socket:
    """Reserve an address for processes that share it by `listen_beside`.

    The returned socket is bound but does not listen. Raises ConfigError if another program uses the
    address.
    """
    try:
        with _bound(host, port) as alone:  # fails if another server uses the address in any way
            port = alone.getsockname()[1]
        return _bound(host, port, has_peers=True)
    except OSError as error:
        raise _no_place(f"{host}:{port}", error, "choose another --port or --host") from None


def listen_beside(host: str, port: int) -> socket.socket:
    """Listen at an address together with other processes (SO_REUSEPORT).

    The kernel assigns each connection to a process by a hash of both ends' addresses. Raises
    ConfigError if that is not possible.
    """
    try:
        listener = _bound(host, port, has_peers=True)
        listener.listen(BACKLOG)
    except OSError as error:
        raise _no_place(f"{host}:{port}", error, "choose another --port or --host") from None
    return listener


def _no_place(where: str, error: OSError, way_out: str) -> ConfigError:
    return ConfigError(f"cannot listen on {where} ({error.strerror or error}); {way_out}")


def close(listener: socket.socket, uds: str | None) -> None:
    """Close a socket (uvicorn may have closed it already), and remove a Unix socket's file."""
    listener.close()
    if uds:
        with contextlib.suppress(OSError):
            os.unlink(uds)


def is_local(listener: socket.socket) -> bool:
    """Whether only this machine can connect."""
    if listener.family == socket.AF_UNIX:
        return True
    return ipaddress.ip_address(listener.getsockname()[0]).is_loopback


def way_to_try(listener: socket.socket, is_tls: bool, root_path: str) -> str:
    """Text for the log: the address, and a command that asks the server for its models."""
    if listener.family == socket.AF_UNIX:
        path = listener.getsockname()
        return f"{path}  (try: curl --unix-socket {path} http://localhost{root_path}/v1/models)"
    host, port = listener.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    url = f"http{'s' * is_tls}://{host}:{port}{root_path}"
    return f"{url}  (try: curl {url}/v1/models)"


def tls_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """uvicorn's options for TLS; {} without a certificate. Raises ConfigError for a wrong file."""
    names = ("ssl_certfile", "ssl_keyfile", "ssl_ca_certs", "ssl_cert_reqs", "ssl_ciphers")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name)}
    if not given:
        return {}
    if "ssl_certfile" not in given:
        wrong = next(iter(given)).replace("_", "-")
        raise ConfigError(f"--{wrong} needs --ssl-certfile, the server's certificate")
    if given.get("ssl_cert_reqs") and "ssl_ca_certs" not in given:
        raise ConfigError("--ssl-cert-reqs needs --ssl-ca-certs, who signs clients' certificates")
    try:
        _check_tls(given)
    except OSError as error:
        files = ", ".join(f"{name}={value}" for name, value in given.items())
        raise ConfigError(
            f"TLS cannot be set up ({error.strerror or error}) with {files}; give PEM files, of a "
            "certificate with its chain and of its key without a passphrase"
        ) from None
    return given


def _check_tls(given: dict[str, Any]) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(given["ssl_certfile"], given.get("ssl_keyfile"), password="")
    if "ssl_ca_certs" in given:
        context.load_verify_locations(given["ssl_ca_certs"])
    if "ssl_ciphers" in given:
        context.set_ciphers(given["ssl_ciphers"])


def _bound(host: str, port: int, has_peers: bool = False) -> socket.socket:
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    if has_peers:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
    listener.bind((host, port))
    return listener


def _unix_socket(path: str) -> socket.socket:
    """A socket bound to a path. Replaces the socket of a server that has ended."""
    if os.path.exists(path) and stat.S_ISSOCK(os.stat(path).st_mode):
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(path)
            except ConnectionRefusedError:
                os.unlink(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path)
    return listener
