"""What the server says to bad input, to those without a key, and to those who only look."""

from __future__ import annotations

import base64
import http.client
import json
import re
import socket
import threading
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.real_model  # its tokenizer

CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}


def error_of(answer: tuple[int | None, Any], status: int) -> dict[str, Any]:
    assert answer[0] == status, answer
    error: dict[str, Any] = answer[1]["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return error


# -- bodies ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/tokenize"])
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"messages": ' + b'{"a":' * 5000 + b"1" + b"}" * 5001,
        b'{"messages": [{"role": "user", "content": "\\ud800"}], "prompt": "\\ud800"}',
        b'{"temperature": NaN, "prompt": "x", "messages": [{"role": "user", "content": "x"}]}',
    ],
    ids=lambda body: repr(body[:20]),
)
def test_broken_bodies_are_a_400(path: str, body: bytes, server: Any) -> None:
    error_of(server.post(path, body), 400)


def test_a_body_of_more_than_32_mib_is_a_413(server: Any) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.putrequest("POST", "/v1/completions")
    connection.putheader("content-length", str(33 * 2**20))
    connection.endheaders()
    response = connection.getresponse()
    assert response.status == 413 and "at most 33554432 bytes" in response.read().decode()


def test_a_body_that_lies_about_its_length_is_cut_off(server: Any) -> None:
    def pieces() -> Any:
        for _ in range(34):
            yield b"x" * 2**20

    for ending in ("keep-alive", "close"):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
        headers = {"connection": ending, "content-type": "application/json"}
        connection.request("POST", "/v1/completions", pieces(), headers, encode_chunked=True)
        response = connection.getresponse()
        assert response.status == 413 and "at most 33554432 bytes" in response.read().decode()
    assert server.get("/health")[0] == 200


def test_headers_without_end_are_cut_off(server: Any) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n" + b"x-long: " + b"y" * 2**16)
        assert connection.recv(2**12).startswith(b"HTTP/1.1 400")
    assert server.get("/health")[0] == 200


def test_unknown_paths_and_methods_are_said_in_openais_shape(server: Any) -> None:
    error = error_of(server.get("/v1/completion"), 404)
    assert "no route /v1/completion; did you mean /v1/completions?" in error["message"]
    error = error_of(server.get("/v1/completions"), 405)
    assert error["message"] == "/v1/completions takes POST, got GET"
    error = error_of(server.get("/v1/models/none"), 404)
    assert "model 'none' does not exist; there is tiny" in error["message"]


def test_json_needs_no_content_type_and_nothing_else_is_read(server: Any) -> None:
    def post(content_type: str | None) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        headers = {} if content_type is None else {"content-type": content_type}
        connection.request("POST", "/v1/chat/completions", json.dumps(CHAT), headers)
        response = connection.getresponse()
        return response.status, json.loads(response.read())

    for content_type in (None, "application/json; charset=utf-8", "application/problem+json"):
        assert post(content_type)[0] == 200
    for content_type in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        error = error_of(post(content_type), 415)
        assert f"'content-type: application/json', got '{content_type}'" in error["message"]


def test_nothing_that_a_client_chose_forges_a_line_of_the_log(server: Any) -> None:
    hostile = "x\nERROR 00:00:00 forged \x1b[31m"
    for fields in ({"request_id": hostile}, {"model": hostile}, {hostile: 1}, {"user": hostile}):
        server.post("/v1/chat/completions", CHAT | fields)
    server.get("/v1/%0aERROR%2000:00:00%20forged%1b")
    assert not [line for line in server.log.splitlines() if line.startswith("ERROR 00:00:00")]
    assert "\x1b" not in server.log


def test_unknown_fields_are_accepted_and_named(server: Any) -> None:
    body = CHAT | {"continuous": True, "metadata": {"a": 1}}
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    for _ in range(2):
        kind = {"content-type": "application/json"}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), kind)
        response = connection.getresponse()
        response.read()
        assert response.status == 200
        assert response.getheader("x-ignored-fields") == "continuous,metadata"
    assert server.log.count("a field that is ignored: 'continuous'") == 1


def test_other_origins_get_nothing_unless_allowed(server: Any) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.request("GET", "/v1/models", headers={"origin": "https://elsewhere.example"})
    response = connection.getresponse()
    response.read()
    assert response.status == 200
    assert not [name for name, _ in response.getheaders() if name.startswith("access-control")]


def test_every_answer_has_its_requests_id(server: Any) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    for given in ("my-id-17", "bad\tid", None):
        headers = {} if given is None else {"x-request-id": given}
        connection.request("GET", "/v1/models", headers=headers)
        response = connection.getresponse()
        response.read()
        found = response.getheader("x-request-id")
        assert found and (found == given) == (given == "my-id-17")
    headers = {"x-request-id": "mine", "content-type": "application/json"}
    for _ in range(2):  # an id may be used again
        connection.request("POST", "/v1/chat/completions", json.dumps(CHAT), headers)
        assert json.loads(connection.getresponse().read())["id"] == "chatcmpl-mine"


# -- tokens and text ------------------------------------------------------------------------------


def test_tokens_there_and_back(server: Any) -> None:
    status, answer = server.post("/tokenize", {"prompt": "Hello wörld", "return_token_strs": True})
    assert status == 200 and answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert answer["max_model_len"] == 2048
    assert server.post("/detokenize", {"tokens": answer["tokens"]})[1] == {"prompt": "Hello wörld"}
    status, chat = server.post("/tokenize", {"messages": CHAT["messages"]})
    assert status == 200 and chat["count"] > 5
    error_of(server.post("/tokenize", {}), 400)
    error_of(server.post("/detokenize", {"tokens": [49152]}), 400)


# -- the state ------------------------------------------------------------------------------------


def test_the_state_is_told(server: Any) -> None:
    server.post("/v1/chat/completions", CHAT)
    assert server.get("/health") == (200, {"status": "ok", "engine": "ready"})
    assert server.get("/ready")[1]["ready"] is True
    assert set(server.get("/version")[1]) == {"version"}
    config = server.get("/config")[1]
    assert config["options"]["max_num_seqs"] == 64
    assert config["choices"]["max_num_seqs"] == "64 (the default on a CPU)"
    options = config["options"]
    assert options["dtype"] in ("float32", "bfloat16") and options["device"] == "cpu"
    assert options["attention_backend"] == "torch"
    assert options["num_kv_blocks"] == int(config["choices"]["num_kv_blocks"].partition(" (")[0])
    assert "auto" not in options.values()  # generation_config is "off"
    paths = server.get("/openapi.json")[1]["paths"]
    assert {"/v1/chat/completions", "/v1/completions", "/metrics", "/health"} <= set(paths)


def test_metrics_count(server: Any) -> None:
    def value(name: str) -> float:
        text = server.get("/metrics")[1]
        found = re.search(rf"^compiledllm:{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
        assert found, name
        return float(found[1])

    before = value("generation_tokens_total"), value("prompt_tokens_total")
    _, answer = server.post("/v1/chat/completions", CHAT | {"ignore_eos": True})
    assert value("generation_tokens_total") == before[0] + 2
    assert value("prompt_tokens_total") == before[1] + answer["usage"]["prompt_tokens"]
    assert value("num_requests_running") == value("num_requests_waiting") == 0
    assert value("recompiles_total") == value("corrupted_requests_total") == 0
    assert value("engine_ready") == 1 and value("kv_cache_usage_perc") == 0
    assert value("time_to_first_token_seconds_count") > 0
    assert 'finished_reason="length"' in server.get("/metrics")[1]


def test_the_page_asks_nobody_else(server: Any) -> None:
    status, page = server.get("/")
    assert status == 200 and "<title>compiledllm</title>" in page
    assert not re.findall(r"""(?:src|href|fetch)\s*[=(]\s*["'](?:https?:)?//""", page)


# -- keys, strictness, salts ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def locked(start_server: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Keys from everywhere, strict, a small queue, vLLM's metric names, several HTTP processes."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text("from-file\nanother\n")
    return start_server(
        *("--api-key", "from-flag", "--api-key-file", str(keys), "--strict-fields"),
        *("--metrics-prefix", "vllm:", "--max-num-seqs", "1", "--max-queued-requests", "1"),
        *("--api-server-count", "2"),
        COMPILEDLLM_API_KEY="from-env,more",
    )


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def test_every_route_but_two_needs_a_key(locked: Any) -> None:
    locked.wait_until_ready()
    for path in ("/v1/models", "/metrics", "/config", "/version", "/", "/openapi.json", "/nope"):
        assert error_of(locked.get(path), 401)["code"] == "invalid_api_key"
        assert locked.get(path, authorization="from-flag")[0] == 401
        assert locked.get(path, **bearer("wrong"))[0] == 401
    assert locked.get("/health")[0] == locked.get("/ready")[0] == 200
    error_of(locked.post("/tokenize", {"prompt": "x"}), 401)
    error_of(locked.get("/health/../v1/models"), 401)
    for key in ("from-flag", "from-file", "another", "from-env", "more"):
        assert locked.get("/v1/models", **bearer(key))[0] == 200
    assert locked.get("/v1/models", host="evil/health", **bearer("wrong"))[0] == 400
    assert locked.get("/v1/models", host="evil", **bearer("wrong"))[0] == 401
    assert "from-flag" not in locked.log


def test_holders_of_different_keys_share_no_prefixes(locked: Any) -> None:
    """Neither cached_tokens nor the time of an answer tells one of the other's prompts."""
    locked.wait_until_ready()

    def cached(key: str, **more: Any) -> int:
        body = {"prompt": list(range(100, 180)), "max_tokens": 1} | more
        status, answer = locked.post("/v1/completions", body, **bearer(key))
        assert status == 200
        found: int = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        return found

    assert cached("from-flag") == 0 and cached("from-flag") > 16
    assert cached("another") == 0 and cached("another") > 16
    assert cached("another", cache_salt="own") == 0 and cached("another", cache_salt="own") > 16


def test_a_browser_may_give_the_key_as_a_password(locked: Any) -> None:
    locked.wait_until_ready()
    connection = http.client.HTTPConnection("127.0.0.1", locked.port, timeout=20)
    connection.request("GET", "/")
    refused = connection.getresponse()
    refused.read()
    assert refused.getheader("www-authenticate") == 'Basic realm="compiledllm"'
    for password, status in (("more", 200), ("wrong", 401), ("", 401)):
        key = base64.b64encode(f"me:{password}".encode()).decode()
        assert locked.get("/", authorization=f"Basic {key}")[0] == status
    assert locked.get("/", authorization="Basic ???")[0] == 401


def test_strict_servers_refuse_unknown_fields(locked: Any) -> None:
    locked.wait_until_ready()
    answer = locked.post("/v1/chat/completions", CHAT | {"foo": 1}, **bearer("more"))
    assert "unknown fields: foo" in error_of(answer, 400)["message"]
    assert "vllm:num_requests_running" in locked.get("/metrics", **bearer("more"))[1]


def test_too_many_requests_are_told_to_come_back(locked: Any) -> None:
    locked.wait_until_ready()
    body = CHAT | {"max_tokens": 150, "ignore_eos": True}
    found: list[tuple[int | None, Any]] = []

    def ask() -> None:
        found.append(locked.post("/v1/chat/completions", body, **bearer("more")))

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    statuses = sorted(status or 0 for status, _ in found)
    assert set(statuses) == {200, 429} and statuses.count(200) >= 2
    refused = next(body for status, body in found if status == 429)
    assert "running or waiting" in refused["error"]["message"]


def test_answers_of_several_processes_are_those_of_one(server: Any, locked: Any) -> None:
    """Texts, stop strings, grammars, log probabilities, several outputs."""
    locked.wait_until_ready()
    assert locked.get("/health")[1]["http_processes"] == ["ready", "ready"]
    chat = {"messages": [{"role": "user", "content": "Tell me more."}], "seed": 5, "max_tokens": 8}
    for body in (
        chat | {"n": 2, "logprobs": True, "top_logprobs": 2},
        chat | {"stop": ["e", "a"]},
        chat | {"response_format": {"type": "json_object"}, "max_tokens": 16},
        chat | {"stream": True, "stream_options": {"include_usage": True}},
    ):
        expected = contents(server.post("/v1/chat/completions", body))
        assert len(expected) == body.get("n", 1) and all(expected)
        for _ in range(3):  # each over a connection of its own, which either process may get
            answer = locked.post("/v1/chat/completions", body, **bearer("more"))
            assert contents(answer) == expected


def contents(answer: tuple[int | None, Any]) -> list[str]:
    """The text of each choice, whole or streamed."""
    status, body = answer
    assert status == 200, body
    if not isinstance(body, str):
        return [choice["message"]["content"] for choice in body["choices"]]
    events = [line[6:] for line in body.splitlines() if line.startswith("data: ")]
    assert events.pop() == "[DONE]"
    choices = [choice for event in events for choice in json.loads(event)["choices"]]
    return ["".join(choice["delta"].get("content") or "" for choice in choices)]


def test_salts_keep_prefixes_apart(server: Any) -> None:
    def cached(**fields: Any) -> int:
        text = "A long enough beginning to fill some blocks of the cache, I think. " * 4
        body = {"prompt": text, "max_tokens": 1} | fields
        answer = server.post("/v1/completions", body)[1]
        found: int = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        return found

    assert cached(cache_salt="tenant a") == 0
    assert cached(cache_salt="tenant a") > 16
    assert cached(cache_salt="tenant b") == 0
    assert cached() == 0
