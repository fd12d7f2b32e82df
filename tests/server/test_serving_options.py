"""Where and how a server listens, what it says to people, and its options in a file."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import socket
import ssl
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.server import Server, wait_for

pytestmark = pytest.mark.real_model  # its tokenizer

TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}"
    "{% if shout is defined %}{{ shout }}{% endif %}"
)
CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "ignore_eos": True}


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for 127.0.0.1 and its key, in one file."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    path = tmp_path_factory.mktemp("tls") / "server.pem"
    subject = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject]
    subprocess.run(
        [*command, "-keyout", str(path), "-out", f"{path}.crt"], check=True, capture_output=True
    )
    path.write_text(Path(f"{path}.crt").read_text() + path.read_text())
    return path


@pytest.fixture(scope="module")
def tls_server(start_server: Callable[..., Server], certificate: Path) -> Server:
    """Behind TLS and a proxy's path, with an access log."""
    options = ["--ssl-certfile", str(certificate), "--root-path", "/llm", "--access-log"]
    found = start_server(*options, "--max-model-len", "auto", "--num-kv-blocks", "10")
    found.url = f"https://127.0.0.1:{found.port}"
    found.context = ssl.create_default_context(cafile=str(certificate))
    return found.wait_until_ready()


# -- TLS, a root path, an access log --------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "/llm"])
def test_a_proxy_may_keep_its_path_or_take_it_off(prefix: str, tls_server: Server) -> None:
    assert tls_server.get(f"{prefix}/health")[0] == 200
    assert tls_server.get(f"{prefix}/openapi.json")[1]["servers"] == [{"url": "/llm"}]
    status, answer = tls_server.post(f"{prefix}/v1/chat/completions", CHAT)
    assert status == 200 and answer["usage"]["completion_tokens"] == 3
    assert tls_server.get("/llmx/health")[0] == 404


def test_a_client_of_plain_http_is_turned_away_and_others_go_on(tls_server: Server) -> None:
    with socket.create_connection(("127.0.0.1", tls_server.port), timeout=20) as plain:
        plain.sendall(b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n")
        assert not plain.recv(100).startswith(b"HTTP")
    assert tls_server.get("/health")[0] == 200


def test_a_line_tells_each_answer_and_no_text(tls_server: Server) -> None:
    secret = CHAT | {"messages": [{"role": "user", "content": "swordfish"}]}
    tls_server.post("/v1/chat/completions", secret | {"stream": True}, x_request_id="streamed")
    tls_server.post("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 2}, x_request_id="two")
    tls_server.post("/v1/completions", b"{", x_request_id="broken")
    wait_for(lambda: "[broken]" in tls_server.log)
    lines = {name: line for line in tls_server.log.splitlines() if (name := id_of(line))}
    assert re.search(
        r"127\.0\.0\.1 POST /v1/chat/completions 200 \d+\.\d{3} s \d+\+3 tokens, length",
        lines["streamed"],
    )
    assert re.search(r"/v1/completions 200 .* s 2\+\d tokens, (length|stop)", lines["two"])
    assert re.search(r"/v1/completions 400 \d+\.\d{3} s \[broken\]", lines["broken"])
    assert "swordfish" not in tls_server.log


def id_of(line: str) -> str | None:
    found = re.search(r" s (?:\d.* )?\[(\w+)\]$", line)
    return found and found[1]


def test_an_automatic_length_is_what_the_cache_holds(tls_server: Server) -> None:
    assert tls_server.get("/v1/models")[1]["data"][0]["max_model_len"] == 160
    options = tls_server.get("/config")[1]
    assert options["options"]["max_model_len"] == 160
    assert options["choices"]["max_model_len"] == "160 (what the KV cache holds)"
    assert "context    160 (what the KV cache holds)" in tls_server.log
    long = {"prompt": [5] * 160, "max_tokens": 1}
    error = tls_server.post("/v1/completions", long)[1]["error"]
    assert "max_model_len=160" in error["message"]


# -- a Unix socket, and options in a file ----------------------------------------------------------


class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost")
        self._path = str(path)

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(60)
        self.sock.connect(self._path)


def ask(path: Path, method: str, route: str, body: Any = None, key: str = "") -> tuple[int, Any]:
    connection = UnixConnection(path)
    try:
        headers = {"content-type": "application/json", "authorization": f"Bearer {key}"}
        connection.request(method, route, None if body is None else json.dumps(body), headers)
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    except OSError:
        return 0, None
    finally:
        connection.close()


@pytest.fixture(scope="module")
def socket_server(
    start_server: Callable[..., Server], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Server, Path]:
    folder = tmp_path_factory.mktemp("uds")
    (folder / "template.jinja").write_text(TEMPLATE)
    (folder / "options.yaml").write_text(
        f"uds: {folder / 'socket'}\n"
        f"chat_template: {folder / 'template.jinja'}\n"
        "default-chat-template-kwargs: {shout: loud}\n"
        "max_num_seqs: 2k\nlog-level: warning\nenable-prefix-caching: false\n"
        "disable-fastapi-docs: true\napi-key: [one, two]\n"
        "allowed-origins: [https://a.example]\n"
        "enable_lora: false\n"
    )
    found = start_server("--config", str(folder / "options.yaml"), "--max-num-seqs=4")
    wait_for(lambda: ask(folder / "socket", "GET", "/ready")[0] == 200, 90)
    return found, folder / "socket"


def test_a_file_gives_options_and_the_command_line_wins(
    socket_server: tuple[Server, Path],
) -> None:
    server, path = socket_server
    assert ask(path, "GET", "/config")[0] == 401
    options = ask(path, "GET", "/config", key="two")[1]["options"]
    assert options["max_num_seqs"] == 4 and not options["enable_prefix_caching"]
    assert [ask(path, "GET", route, key="one")[0] for route in ("/docs", "/openapi.json")] == [
        *(404, 404),
    ]
    assert "INFO" not in server.log  # log-level: warning


def test_a_template_of_the_servers_own_renders_with_its_defaults(
    socket_server: tuple[Server, Path],
) -> None:
    def prompt(**more: Any) -> str:
        body = {"messages": CHAT["messages"], **more}
        ids = ask(socket_server[1], "POST", "/tokenize", body, "one")[1]["tokens"]
        text = ask(socket_server[1], "POST", "/detokenize", {"tokens": ids}, "one")[1]["prompt"]
        return str(text)

    assert prompt() == "[user]hiloud"
    assert prompt(chat_template_kwargs={"shout": "soft"}) == "[user]hisoft"


def test_the_socket_goes_with_its_server(socket_server: tuple[Server, Path]) -> None:
    server, path = socket_server
    assert server.stop() == 0
    assert not path.exists()


# -- what any server shows ------------------------------------------------------------------------


def test_the_cache_and_the_phases_of_requests_are_measured(server: Server) -> None:
    server.post("/v1/completions", {"prompt": [5, 6], "max_tokens": 7, "n": 2})
    text = server.get("/metrics")[1]
    (cache,) = re.findall(r"^compiledllm:cache_config_info\{(.*)\} 1.0$", text, re.M)
    assert 'block_size="16"' in cache and re.search(r'num_gpu_blocks="\d+"', cache)
    assert 'enable_prefix_caching="True"' in cache
    for name in ("queue_time", "prefill_time", "decode_time", "inference_time"):
        (count,) = re.findall(rf"^compiledllm:request_{name}_seconds_count\S* (\S+)", text, re.M)
        assert float(count) >= 1
    sums = dict(re.findall(r"^compiledllm:request_params_(\w+)_sum\S* (\S+)$", text, re.M))
    assert float(sums["n"]) >= 2 and float(sums["max_tokens"]) >= 7


def test_ping_load_and_docs_are_there(server: Server) -> None:
    assert server.get("/ping") == server.post("/ping", {}) == server.get("/health")
    assert server.get("/load") == (200, {"server_load": 0})
    status, page = server.get("/docs")
    assert status == 200 and "<code>POST /v1/chat/completions</code>" in page
    assert "<code>temperature</code>" in page and "<b>required</b>" in page
    assert "http://" not in page and "https://" not in page and "<script" not in page


def test_a_wrong_path_is_answered_with_those_that_exist(server: Server) -> None:
    status, answer = server.get("/v1/modls")
    assert status == 404
    assert "did you mean /v1/models?" in answer["error"]["message"]
    assert "/v1/chat/completions" in answer["error"]["message"]
