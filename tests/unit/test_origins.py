"""Which origins are allowed, and whose pages' requests are refused."""

from __future__ import annotations

import pytest

from compiledllm.config import ConfigError
from compiledllm.server.origins import Cors, PageCheck, is_local_name, parse_cors


def origins(*words: str) -> tuple[str, ...]:
    return parse_cors(words, ["*"], ["*"], False).origins


def test_values_come_as_words_with_commas_and_as_vllms_json() -> None:
    expected = ("http://a.example", "https://b.example:8443")
    assert origins(*expected) == expected
    assert origins("http://a.example, https://b.example:8443") == expected
    assert origins('["http://a.example", "https://b.example:8443"]') == expected
    assert origins('["*"]') == origins("*") == ("*",)
    assert origins() == origins("[]") == ()
    cors = parse_cors(["*"], ['["get"]', "post"], ['["x-a"]'], False)
    assert cors == Cors(("*",), ("GET", "POST"), ("x-a",))


def test_origins_are_spelled_as_browsers_do() -> None:
    assert origins("HTTP://A.example:80", "https://b:443") == ("http://a.example", "https://b")
    found = origins("http://[::1]:3000", "null", "file://", "chrome-extension://abc", "app://obs")
    assert found == ("http://[::1]:3000", "null", "file://", "chrome-extension://abc", "app://obs")


@pytest.mark.parametrize(
    "value",
    ["a.example", "localhost:3000", "http:/a", "htps://a", "http://a/", "http://a/b", "http://a?b"]
    + ["http://", "http://*.a.example", "http://a:0", "http://a:70000", "http://u@a", "http://a b"]
    + ["http://ä.example", '["http://a"', '["a"]', "[1]", '{"a": 1}', "", "http://a,", '"*"'],
)
def test_what_is_no_origin_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match="--allowed-origins"):
        origins(value)


def test_credentials_need_named_origins() -> None:
    with pytest.raises(ConfigError, match="name the origins"):
        parse_cors(["*"], ["*"], ["*"], True)
    assert parse_cors(["http://a"], ["*"], ["*"], True).credentials


LOCAL = PageCheck(is_local=True)


def is_foreign(check: PageCheck, **headers: str) -> bool:
    named = {name.replace("_", "-").encode(): value.encode() for name, value in headers.items()}
    return check.is_foreign({b"host": b"127.0.0.1:8000"} | named)


@pytest.mark.parametrize(
    ("expected", "headers"),
    [
        (False, {}),  # curl, and every client library
        (False, {"host": "models.example"}),
        (False, {"origin": "http://127.0.0.1:8000"}),
        (False, {"origin": "http://localhost:8000", "host": "localhost:8000"}),
        (False, {"origin": "http://gpu1:8000", "host": "gpu1:8000"}),
        (False, {"origin": "https://models.example", "sec_fetch_site": "same-origin"}),  # a proxy
        (False, {"sec_fetch_site": "none", "origin": "chrome-extension://abc"}),
        (False, {"origin": "tauri://localhost", "sec_fetch_site": "cross-site"}),
        (True, {"origin": "https://evil.example"}),
        (True, {"origin": "https://evil.example", "sec_fetch_site": "cross-site"}),
        (True, {"origin": "http://localhost:3000", "sec_fetch_site": "same-site"}),
        (True, {"origin": "null"}),  # a sandboxed frame
        (True, {"origin": "http://evil.example:8000", "host": "evil.example:8000"}),  # rebinding
        (True, {"origin": "http://127.0.0.1.evil.example", "host": "127.0.0.1.evil.example"}),
        (True, {"sec_fetch_site": "cross-site"}),
    ],
)
def test_pages_of_others_are_told_from_clients(expected: bool, headers: dict[str, str]) -> None:
    assert is_foreign(LOCAL, **headers) == expected


def test_allowed_origins_are_nobodys_others() -> None:
    allowed = PageCheck(["http://a.example"], is_local=True)
    assert not is_foreign(allowed, origin="http://a.example", sec_fetch_site="cross-site")
    assert is_foreign(allowed, origin="http://b.example")
    assert not is_foreign(PageCheck(["*"]), origin="http://b.example")


def test_a_server_for_others_has_any_name() -> None:
    names = {"origin": "http://gpu.example:8000", "host": "gpu.example:8000"}
    assert not is_foreign(PageCheck(), **names) and is_foreign(LOCAL, **names)


@pytest.mark.parametrize(
    ("host", "expected"),
    [("localhost", True), ("LOCALHOST:80", True), ("a.localhost", True), ("127.0.0.1", True)]
    + [("[::1]:8000", True), ("192.168.1.5:1", True), ("box.local", True), ("box", True)]
    + [("evil.example", False), ("localhost.evil.example", False), ("1.2.3", False)]
    + [("evil.example.:80", False)],
)
def test_local_names(host: str, expected: bool) -> None:
    assert is_local_name(host) == expected
