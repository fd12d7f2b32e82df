"""Processes killed, stopped and told to end, clients that leave: nothing hangs, nothing is lost."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.server import free_port, is_alive, metric_of, wait_for

pytestmark = pytest.mark.real_model  # its tokenizer

JSON = {"content-type": "application/json"}
POST = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
LONG = {"prompt": "Once upon a time", "max_tokens": 1500, "ignore_eos": True, "seed": 1}


class Stream:
    """A streamed completion, read event by event."""

    def __init__(self, port: int, body: dict[str, Any]) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        raw = json.dumps(body | {"stream": True})
        self.connection.request("POST", "/v1/completions", raw, JSON)
        self.response = self.connection.getresponse()

    def events(self) -> Iterator[Any]:
        for line in self.response:
            if line.startswith(b"data: "):
                data = line[6:].strip()
                yield data.decode() if data == b"[DONE]" else json.loads(data)

    def close(self) -> None:
        self.connection.sock.close() if self.connection.sock else None
        self.response.close()


def metric(server: Any, name: str) -> float:
    return metric_of(str(server.get("/metrics")[1]), name)


@pytest.fixture(scope="module")
def own(start_server: Callable[..., Any]) -> Any:
    """One that these tests share: each leaves it with an engine that serves."""
    made = start_server("--stuck-timeout", "5").wait_until_ready()
    yield made
    made.stop()


def test_a_client_that_leaves_frees_its_blocks(own: Any) -> None:
    before = metric(own, "generation_tokens_total")
    for _ in range(3):
        stream = Stream(own.port, LONG)
        next(stream.events())
        stream.close()
    short = LONG | {"max_tokens": 50}
    whole = threading.Thread(target=own.post, args=("/v1/completions", short), daemon=True)
    whole.start()
    socket_ = socket.create_connection(("127.0.0.1", own.port))
    raw = json.dumps(LONG).encode()
    head = f"{POST}content-length: {len(raw)}\r\n\r\n"
    socket_.sendall(head.encode() + raw)
    time.sleep(0.5)
    socket_.close()  # a client that waits for a whole answer may leave, too
    whole.join()
    wait_for(lambda: metric(own, "kv_cache_usage_perc") == 0)
    assert metric(own, "num_requests_running") == metric(own, "num_requests_waiting") == 0
    assert metric(own, "generation_tokens_total") - before < 4 * 1500  # of those who left, not all


def test_a_killed_engine_is_started_again_and_told_of(own: Any) -> None:
    old = own.engine_pid()
    stream = Stream(own.port, LONG)
    events = stream.events()
    next(events)
    os.kill(old, signal.SIGKILL)
    rest = list(events)
    assert rest[-1] == "[DONE]"
    error = rest[-2]["error"]
    assert "ended by SIGKILL" in error["message"] and error["code"] == "engine_error"
    wait_for(lambda: own.get("/ready")[0] == 200, 90)
    assert own.engine_pid() != old and not is_alive(old)
    status, answer = own.post("/v1/completions", LONG | {"max_tokens": 3})
    assert status == 200 and answer["usage"]["completion_tokens"] == 3
    assert metric(own, "engine_restarts_total") > 0
    assert "starting it again" in own.log and "crash record" in own.log


def test_a_whole_answer_survives_the_engines_end(own: Any) -> None:
    """Nobody has seen any of it, however much there was."""
    body = LONG | {"max_tokens": 150, "n": 2, "logprobs": 1}
    expected = own.post("/v1/completions", body)[1]
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(own.post("/v1/completions", body)))
    before = metric(own, "generation_tokens_total")
    thread.start()
    wait_for(lambda: metric(own, "generation_tokens_total") > before + 20)
    os.kill(own.engine_pid(), signal.SIGKILL)
    thread.join(120)
    status, answer = found[0]
    assert status == 200 and answer["usage"] == expected["usage"]
    for choice, wanted in zip(answer["choices"], expected["choices"], strict=True):
        assert choice["text"] == wanted["text"]
        # Siblings may have begun in one step or in two: sums in another order.
        values = choice["logprobs"]["token_logprobs"]
        assert values == pytest.approx(wanted["logprobs"]["token_logprobs"], rel=1e-4)


def test_an_answer_with_a_form_survives_the_engines_end(own: Any) -> None:
    """The new process compiles the grammar again."""
    form = {"structured_outputs": {"regex": "[a-z]{150}"}}
    body = {"prompt": "x", "max_tokens": 400, "seed": 1, "n": 2} | form
    expected = own.post("/v1/completions", body)[1]
    assert all(len(choice["text"]) == 150 for choice in expected["choices"])
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(own.post("/v1/completions", body)))
    before = metric(own, "generation_tokens_total")
    thread.start()
    wait_for(lambda: metric(own, "generation_tokens_total") > before + 4)
    os.kill(own.engine_pid(), signal.SIGKILL)
    thread.join(120)
    status, answer = found[0]
    assert status == 200
    texts = [choice["text"] for choice in answer["choices"]]
    assert texts == [choice["text"] for choice in expected["choices"]]


def test_a_stopped_engine_is_unhealthy_until_it_is_replaced(own: Any) -> None:
    stream = Stream(own.port, LONG)
    events = stream.events()
    next(events)
    old = own.engine_pid()
    os.kill(old, signal.SIGSTOP)
    wait_for(lambda: own.get("/health")[0] == 503, 20)
    status, body = own.get("/health")
    assert "no sign of life for" in body["reason"] and "1 requests live" in body["reason"]
    assert own.get("/ready")[0] == 503
    assert "no sign of life for" in list(events)[-2]["error"]["message"]
    wait_for(lambda: own.get("/ready")[0] == 200, 90)
    assert own.engine_pid() != old and not is_alive(old)


def test_a_reader_of_one_byte_a_second_holds_nobody_up(own: Any) -> None:
    slow = socket.create_connection(("127.0.0.1", own.port))
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
    raw = json.dumps(LONG | {"stream": True}).encode()
    head = f"{POST}content-length: {len(raw)}\r\n\r\n"
    slow.sendall(head.encode() + raw)
    for _ in range(3):
        assert slow.recv(1)
        assert own.post("/v1/completions", LONG | {"max_tokens": 3})[0] == 200
        time.sleep(1)
    slow.close()


# -- starting -------------------------------------------------------------------------------------


def serve(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "compiledllm.cli", "serve", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_a_port_in_use_is_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = serve("--port", str(taken.getsockname()[1]))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "choose another --port" in done.stderr


def test_a_model_that_cannot_be_loaded_is_the_last_line(tmp_path: Path) -> None:
    done = serve("--port", str(free_port()), "--model", str(tmp_path / "none"))
    assert done.returncode == 2
    assert "model path does not exist" in done.stderr.splitlines()[-1]
    done = serve("--block-size", "5")
    assert done.returncode == 2 and "block_size must be a multiple of 16" in done.stderr
