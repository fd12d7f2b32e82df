"""Decides which web pages may use the server: allowed origins (CORS) and requests across origins.

A browser runs any page's scripts with access to the user's local servers. A page of another origin
cannot read an answer without CORS headers but can send a POST; and a page whose host name resolves
to 127.0.0.1 (DNS rebinding) counts as same-origin.
"""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from compiledllm.config import ConfigError

_APP_SCHEMES = r"[a-z]+(?:-[a-z]+)*-extension|app|capacitor|ionic|tauri|vscode-webview"
_ORIGIN = re.compile(
    rf"(?P<scheme>https?|{_APP_SCHEMES})://"
    r"(?P<host>\[[0-9a-f:.]+\]|[a-z0-9_-]+(?:\.[a-z0-9_-]+)*)(?::(?P<port>[0-9]{1,5}))?"
)
_DEFAULT_PORTS = {"http": "80", "https": "443"}
_LOCAL_SUFFIXES = (".localhost", ".local", ".internal", ".lan", ".home.arpa")  # never in public DNS
EXPOSED_HEADERS = ["x-request-id", "retry-after", "x-ignored-fields", "request-id"]


@dataclass(frozen=True, slots=True)
class Cors:
    """The CORS permissions of pages of other origins; without `origins`, they have none."""

    origins: tuple[str, ...] = ()
    methods: tuple[str, ...] = ("*",)
    headers: tuple[str, ...] = ("*",)
    credentials: bool = False


def parse_cors(
    origins: Iterable[str], methods: Iterable[str], headers: Iterable[str], credentials: bool
) -> Cors:
    """Parse command-line words; each is a value, several values with commas, or a JSON list."""
    allowed = tuple(_origin(value) for value in _values("--allowed-origins", origins))
    if credentials and "*" in allowed:
        raise ConfigError(
            "--allow-credentials does not go with --allowed-origins '*': every web page could use "
            "what a browser knows of its user; name the origins"
        )
    return Cors(
        allowed,
        tuple(value.upper() for value in _values("--allowed-methods", methods)),
        tuple(_values("--allowed-headers", headers)),
        credentials,
    )


def _values(option: str, words: Iterable[str]) -> list[str]:
    found: list[str] = []
    for word in words:
        values: list[object] = [value.strip() for value in word.split(",")]
        if word.lstrip().startswith(("[", '"', "{")):
            try:
                values = json.loads(word)
            except ValueError:
                values = [None]
        if not isinstance(values, list) or not all(isinstance(v, str) and v for v in values):
            raise ConfigError(
                f"""{option} takes values, or a JSON list of strings such as '["*"]', """
                f"got {word[:64]!r}"
            )
        found += [str(value) for value in values]
    return found


def _origin(value: str) -> str:
    """An origin in the spelling of browsers."""
    if value in ("*", "null", "file://"):
        return value
    match = _ORIGIN.fullmatch(value.lower())
    if match is None or int(match["port"] or 1) not in range(1, 65536):
        raise ConfigError(
            f"--allowed-origins: {value[:64]!r} is no origin; an origin is a scheme, a host and "
            "perhaps a port, without a path, such as https://app.example or http://localhost:3000; "
            "'*' is all of them"
        )
    scheme, host, port = match["scheme"], match["host"], match["port"]
    is_default = port is None or _DEFAULT_PORTS.get(scheme) == str(int(port))
    return f"{scheme}://{host}" + ("" if is_default else f":{int(port)}")


class PageCheck:
    """Detects requests that a page of another origin made its browser send.

    As in Go's `http.CrossOriginProtection`, Sec-Fetch-Site decides, or else Origin compared with
    Host. Browsers set both headers and pages cannot change them; other clients send neither.
    is_local: the server listens on loopback only and has no key; the page's host must then be a
    name that no public DNS can point at this machine.
    """

    def __init__(self, origins: Iterable[str] = (), is_local: bool = False) -> None:
        self._allowed = frozenset(origins)
        self._is_local = is_local

    def is_foreign(self, headers: Mapping[bytes, bytes]) -> bool:
        """Whether to refuse a request of an unsafe method (not GET, HEAD or OPTIONS)."""
        site = headers.get(b"sec-fetch-site")
        if site is None and b"origin" not in headers:
            return False
        origin = headers.get(b"origin", b"").decode("latin-1")
        if "*" in self._allowed or origin in self._allowed or _is_of_an_app(origin):
            return False
        if site is not None:
            return site not in (b"same-origin", b"none")
        host = headers.get(b"host", b"").decode("latin-1")
        if origin.partition("://")[2] != host:
            return True
        return self._is_local and not is_local_name(host)


def _is_of_an_app(origin: str) -> bool:
    """Whether the origin is a desktop application or an extension, which no web page can claim."""
    return bool(origin) and origin != "null" and not origin.startswith(("http://", "https://"))


def is_local_name(host: str) -> bool:
    """Whether a host, with an optional port, is an address or a name outside public DNS."""
    name = re.sub(r":[0-9]*$", "", host.lower()).strip("[]").rstrip(".")
    if "." not in name or name.endswith(_LOCAL_SUFFIXES):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
