"""Keys, and what is answered before a route is reached, or in its place."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")

from compiledllm.config import ConfigError
from compiledllm.remote.engine_client import EngineClient
from compiledllm.remote.limits import Limits
from compiledllm.server import security
from compiledllm.server.api_keys import read_keys
from compiledllm.server.app import AppOptions, create_app
from compiledllm.server.openai.body_budget import MAX_BODY_BYTES
from compiledllm.server.origins import Cors

# -- keys -----------------------------------------------------------------------------------------


def test_keys_come_from_everywhere(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("\ufefffrom-file\n\n  another  \n", encoding="utf-8")
    found = read_keys(["one", " two "], str(file), "three,,four ,")
    assert found == ["one", "two", "from-file", "another", "three", "four"]
    assert read_keys([], None, None) == []


@pytest.mark.parametrize("key", ["", " ", "\t\n", "a b", "schlüssel", "a\x00b"])
def test_a_source_without_a_usable_key_is_refused(key: str, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(key, encoding="utf-8")
    for sources in (([key], None, None), ([], str(file), None), ([], None, key)):
        with pytest.raises(ConfigError, match="key") as refused:
            read_keys(*sources)
        assert "\n" not in str(refused.value)
        assert not key.strip() or key not in str(refused.value)  # it may be nearly right
    with pytest.raises(ConfigError):
        read_keys(["good"], None, key)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path, tmp_path / "none", tmp_path / "bytes"):
        with pytest.raises(ConfigError, match="--api-key-file .* cannot be read"):
            read_keys([], str(path), None)
    with pytest.raises(ConfigError, match="COMPILEDLLM_API_KEY has no key"):
        read_keys([], None, ",")


# -- answers --------------------------------------------------------------------------------------

PAGE = "https://page.example"
PREFLIGHT = {"origin": PAGE, "access-control-request-method": "POST"}
PREFLIGHT |= {"access-control-request-headers": "authorization,content-type"}


class Site:
    """The application of an engine that is loading, with a route that fails."""

    def __init__(self, keys: Iterable[str] = (), cors: Cors | None = None) -> None:
        engine = EngineClient({}, Limits(9, 99, 9, stuck_s=9), Path())
        self.app = create_app(engine, AppOptions(["m"], list(keys), cors or Cors(), True))

        @self.app.get("/fails")
        async def fails() -> None:
            raise RuntimeError("nobody expected this")

    def ask(self, method: str, path: str, body: Iterable[bytes] = (), **headers: str) -> Any:
        """Status, headers and body."""
        return asyncio.run(self.ask_async(method, path, body, **headers))

    async def ask_async(
        self, method: str, path: str, body: Iterable[bytes] = (), **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        named = {"host": "127.0.0.1"} | {k.replace("_", "-"): v for k, v in headers.items()}
        scope = {"type": "http", "method": method, "path": path, "query_string": b""}
        scope |= {"headers": [(k.encode(), v.encode()) for k, v in named.items()], "scheme": "http"}
        pieces = iter(body)
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            await asyncio.sleep(0)
            piece = next(pieces, None)
            return {"type": "http.request", "body": piece or b"", "more_body": piece is not None}

        async def send(message: Any) -> None:
            sent.append(message)

        await self.app(scope, receive, send)
        found = {k.decode(): v.decode() for k, v in sent[0]["headers"]}
        return sent[0]["status"], found, b"".join(m.get("body", b"") for m in sent[1:])


KEY = {"authorization": "Bearer k"}


@pytest.fixture
def site() -> Site:
    return Site(["k"], Cors((PAGE,)))


def test_a_preflight_needs_no_key(site: Site) -> None:
    status, headers, _ = site.ask("OPTIONS", "/v1/chat/completions", **PREFLIGHT)
    assert status == 200 and headers["access-control-allow-origin"] == PAGE
    assert headers["access-control-allow-headers"] == "authorization,content-type"
    status, headers, _ = site.ask("OPTIONS", "/v1/models", **PREFLIGHT | {"origin": "http://b"})
    assert status == 400 and "access-control-allow-origin" not in headers
    assert site.ask("OPTIONS", "/v1/models", origin=PAGE)[0] == 401


@pytest.mark.parametrize(
    ("status", "method", "path", "headers"),
    [
        (200, "GET", "/v1/models", KEY),
        (401, "GET", "/v1/models", {}),
        (401, "GET", "/v1/models", {"authorization": "Bearer K"}),
        (404, "GET", "/none", KEY),
        (405, "GET", "/tokenize", KEY),
        (413, "POST", "/tokenize", KEY | {"content-length": str(MAX_BODY_BYTES + 1)}),
        (400, "POST", "/tokenize", KEY),
        (500, "GET", "/fails", KEY),
    ],
)
def test_every_answer_can_be_read_by_an_allowed_page(
    status: int, method: str, path: str, headers: dict[str, str], site: Site
) -> None:
    found = site.ask(method, path, **headers, origin=PAGE)
    assert found[0] == status
    assert found[1]["access-control-allow-origin"] == PAGE and found[1]["vary"] == "Origin"
    assert "x-request-id" in found[1] and len(json.loads(found[2])) > 0
    assert "x-request-id, retry-after" in found[1]["access-control-expose-headers"]
    other = site.ask(method, path, **headers, origin="http://b")[1]
    assert "access-control-allow-origin" not in other


def test_all_origins(site: Site) -> None:
    found = Site(["k"], Cors(("*",))).ask("GET", "/v1/models", origin="http://b")
    assert found[0] == 401 and found[1]["access-control-allow-origin"] == "*"


def test_a_failure_is_logged_once_and_hides_nothing(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    _, _, body = site.ask("GET", "/fails", **KEY)
    assert json.loads(body)["error"]["message"] == "RuntimeError: nobody expected this"
    assert [line for line in caplog.messages if "failed" in line] == ["GET '/fails' failed"]


def test_pages_of_other_origins_may_not_post() -> None:
    site = Site()
    assert site.ask("POST", "/v1/completions", [b"{}"], origin="https://evil.example")[0] == 403
    assert site.ask("GET", "/v1/models", origin="https://evil.example")[0] == 200
    own = {"origin": "http://127.0.0.1", "content-type": "application/json"}
    assert site.ask("POST", "/tokenize", [b"{}"], **own)[0] == 503  # loading


# -- bodies ---------------------------------------------------------------------------------------

CHUNKED = {"transfer-encoding": "chunked", "content-type": "application/json"}


def test_a_body_is_counted_as_it_comes() -> None:
    site = Site()
    pieces = [b" " * 2**20] * 34
    status, _, body = site.ask("POST", "/tokenize", pieces, **CHUNKED)
    assert status == 413 and "at most 33554432 bytes" in json.loads(body)["error"]["message"]


def test_all_unfinished_bodies_share_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(security, "MAX_UNFINISHED_BYTES", 2500)

    async def run() -> None:
        site = Site()
        asked = [site.ask_async("POST", "/tokenize", [b" " * 600] * 2, **CHUNKED) for _ in range(3)]
        found = await asyncio.gather(*asked)
        statuses = sorted(status for status, _, _ in found)
        assert statuses == [400, 400, 503]
        refused = next(headers for status, headers, _ in found if status == 503)
        assert refused["retry-after"] == "1"
        assert (await site.ask_async("POST", "/tokenize", [b" " * 900] * 2, **CHUNKED))[0] == 400

    asyncio.run(run())
