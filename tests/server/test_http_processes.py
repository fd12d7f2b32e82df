"""Several HTTP processes in front of the same engines: real processes, killed, drained and asked.

The engine is `fake_engine.py`; `test_http.py` has several before a real one.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from tests.server.test_life import FAKE
from tests.support.server import command_of, free_port, holding, is_alive, parent_of, wait_for

CODE = (
    "import sys, functools; from compiledllm.server import launch_processes; "
    "from compiledllm import cli; launch_processes.SharedEngineLife = functools.partial("
    "launch_processes.SharedEngineLife, command=sys.argv[1].split());"
    "sys.exit(cli.main(sys.argv[2:]))"
)
KILL = 901  # a prompt that ends the engine


class Fleet:
    """`compiledllm serve` with several HTTP processes and fake engines."""

    def __init__(self, folder: Path, *options: str, count: int = 2, **environment: str) -> None:
        self.port, self.log_path = free_port(), folder / "fleet.log"
        self._hold = folder / "hold"
        command = [sys.executable, "-c", CODE, " ".join(FAKE), "serve", "fake"]
        command += ["--skip-tokenizer-init", "--port", str(self.port), "--block-size", "16"]
        command += ["--api-server-count", str(count), *options]
        own = {"COMPILEDLLM_CACHE_DIR": str(folder), "FAKE_HOLD": str(self._hold)}
        own |= {"OMP_NUM_THREADS": "1"} | environment
        with open(self.log_path, "w") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env={**os.environ, **own}
            )

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def wait_until_ready(self) -> Fleet:
        wait_for(lambda: "ready at" in self.log or self.process.poll() is not None, 90)
        assert self.process.poll() is None, self.log
        return self

    def pids(self, name: str) -> list[int]:
        """The children whose command has this name in it."""
        children = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit()]
        children = [c for c in children if parent_of(Path(f"/proc/{c}")) == self.process.pid]
        return [pid for pid in children if name.encode() in command_of(pid)]

    def http_pids(self) -> list[int]:
        return self.pids("http_process")

    def all_pids(self) -> list[int]:
        return [*self.http_pids(), *self.pids("fake_engine")]

    def engine_pid(self) -> int:
        (pid,) = self.pids("fake_engine")
        return pid

    def metric(self, name: str) -> float:
        status, text = Client(self).ask("GET", "/metrics")
        assert status == 200
        lines = text.splitlines()
        found = [
            x for x in lines if x.startswith((f"compiledllm:{name}{{", f"compiledllm:{name} "))
        ]
        return sum(float(line.split()[-1]) for line in found)

    def generated(self) -> list[float]:
        """By engine, the tokens that were generated."""
        lines = Client(self).ask("GET", "/metrics")[1].splitlines()
        found = [x for x in lines if x.startswith("compiledllm:generation_tokens_total{")]
        return [float(line.split()[-1]) for line in found]

    def clients(self, per_process: int) -> dict[int, list[Client]]:
        """Connections, as many to each process."""
        found: dict[int, list[Client]] = {pid: [] for pid in self.http_pids()}
        while any(len(clients) < per_process for clients in found.values()):
            client = Client(self)
            if len(of_process := found[client.server_pid()]) < per_process:
                of_process.append(client)
        return found

    def holding(self) -> AbstractContextManager[None]:
        return holding(self._hold)

    def settle(self, restarts: int) -> None:
        """Wait for all processes to serve again, the HTTP processes having been restarted."""
        wait_for(lambda: self.metric("http_process_restarts_total") == restarts)
        wait_for(lambda: self.metric("http_processes") == 2)


class Client:
    """A connection, which stays with one of the processes."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._connection = http.client.HTTPConnection("127.0.0.1", fleet.port, timeout=60)
        self._connection.connect()

    def server_pid(self) -> int:
        """Which process has accepted the connection."""
        self.ask("GET", "/version")
        assert isinstance(self._connection.sock, socket.socket)
        ours = f"{self._connection.sock.getsockname()[1]:04X}"
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[2].endswith(f":{ours}") and fields[1].endswith(f":{self._fleet.port:04X}"):
                return next(p for p in self._fleet.http_pids() if has_socket(p, fields[9]))
        raise AssertionError("the connection is not there")

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, str]:
        self._connection.request(method, path, body and json.dumps(body), JSON if body else {})
        answer = self._connection.getresponse()
        return answer.status, answer.read().decode()

    def complete(self, first: int = 5, max_tokens: int = 5, **more: Any) -> tuple[int, Any]:
        """Status, and the number of tokens or the error."""
        body = {"prompt": [first, 6, 7], "max_tokens": max_tokens, **more}
        status, text = self.ask("POST", "/v1/completions", body)
        answer = json.loads(text)
        return status, answer["usage"]["completion_tokens"] if status == 200 else answer["error"]

    def stream(self, max_tokens: int) -> Stream:
        body = {"prompt": [5, 6, 7], "max_tokens": max_tokens, "stream": True}
        more = {"return_token_ids": True, "stream_options": {"include_usage": True}}
        self._connection.request("POST", "/v1/completions", json.dumps(body | more), JSON)
        return Stream(self._connection.getresponse())


JSON = {"content-type": "application/json"}


class Stream:
    """An answer in events."""

    def __init__(self, answer: http.client.HTTPResponse) -> None:
        self._answer = answer
        assert answer.status == 200

    def first(self) -> bytes:
        """The first line, once the request runs."""
        return self._answer.readline()

    def rest(self) -> tuple[int, int, bool]:
        """Tokens as counted by the server, errors, and whether the stream ended as it should."""
        tokens = errors = 0
        lines = []
        with contextlib.suppress(OSError, http.client.HTTPException):
            lines = [line for line in self._answer if line.startswith(b"data: ")]
        for line in lines[:-1]:
            event = json.loads(line[6:])
            errors += "error" in event
            tokens += (event.get("usage") or {}).get("completion_tokens", 0)
        return tokens, errors, bool(lines) and lines[-1].strip() == b"data: [DONE]"


def has_socket(pid: int, inode: str) -> bool:
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            if os.readlink(path) == f"socket:[{inode}]":
                return True
    return False


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Fleet]]:
    """start(*options, **environment) -> Fleet. All are killed at the end, and leave nothing."""
    fleets: list[Fleet] = []

    def start(*options: str, **more: Any) -> Fleet:
        fleets.append(Fleet(tmp_path_factory.mktemp("fleet"), *options, **more))
        return fleets[-1]

    yield start
    for fleet in fleets:
        pids = fleet.all_pids()
        fleet.process.kill()
        fleet.process.wait()
        wait_for(lambda pids=pids: not any(map(is_alive, pids)))


@pytest.fixture(scope="module")
def fleet(start: Callable[..., Fleet]) -> Fleet:
    """Two HTTP processes with room for 64 requests. The last of its tests ends it."""
    return start("--max-num-seqs", "64").wait_until_ready()


@pytest.fixture(scope="module")
def pair(start: Callable[..., Fleet]) -> Fleet:
    """Two HTTP processes before two engines, which run two requests each."""
    limits = ["--max-num-seqs", "2", "--max-queued-requests", "4"]
    pair = start(*limits, "--data-parallel-size", "2").wait_until_ready()
    wait_for(lambda: pair.metric("engine_ready") == 2)
    return pair


def in_threads(works: list[Callable[[], Any]]) -> list[Any]:
    with concurrent.futures.ThreadPoolExecutor(len(works)) as pool:
        return [future.result(60) for future in [pool.submit(work) for work in works]]


def test_requests_go_through_all_processes_and_metrics_are_of_all(fleet: Fleet) -> None:
    names = ["request_generation_tokens_sum", "generation_tokens_total", "request_success_total"]
    before = [fleet.metric(name) for name in names]
    clients = fleet.clients(per_process=3)
    every = [client for of_one in clients.values() for client in of_one]
    assert in_threads([client.complete for client in every]) == [(200, 5)] * 6
    for client in (of_one[0] for of_one in clients.values()):
        status, text = client.ask("GET", "/health")
        assert status == 200 and json.loads(text)["http_processes"] == ["ready", "ready"]
        assert client.ask("GET", "/ready")[0] == 200
        assert json.loads(client.ask("GET", "/v1/models")[1])["data"][0]["max_model_len"] == 2048
        shown = client.ask("GET", "/metrics")[1]
        for name, old, new in zip(names, before, (30, 30, 6), strict=True):
            lines = [x for x in shown.splitlines() if x.startswith(f"compiledllm:{name}{{")]
            assert sum(float(line.split()[-1]) for line in lines) - old == new, name
        assert shown.count("# TYPE compiledllm:e2e_request_latency_seconds histogram") == 1


def test_new_connections_are_dealt_out(fleet: Fleet) -> None:
    clients = [Client(fleet) for _ in range(60)]
    found = Counter(client.server_pid() for client in clients)
    assert len(found) == 2 and min(found.values()) >= 10, found


def test_load_counts_the_requests_of_all(fleet: Fleet) -> None:
    clients = fleet.clients(per_process=2)
    with fleet.holding():
        streams = [client.stream(20) for of_one in clients.values() for client in of_one]
        assert all(stream.first() for stream in streams)
        loads = [json.loads(c.ask("GET", "/load")[1]) for (c,) in fleet.clients(1).values()]
        assert loads == [{"server_load": 4}] * 2
    assert [stream.rest() for stream in streams] == [(20, 0, True)] * 4


def test_a_killed_http_process_costs_its_own_requests_and_comes_back(fleet: Fleet) -> None:
    killed, spared = fleet.http_pids()
    clients = fleet.clients(per_process=4)
    restarts = fleet.metric("http_process_restarts_total")
    counted = fleet.metric("request_success_total")
    with fleet.holding():
        streams = {pid: [c.stream(60) for c in clients[pid]] for pid in (killed, spared)}
        assert all(stream.first() for of_one in streams.values() for stream in of_one)
        finished = clients[spared][0]
        os.kill(killed, signal.SIGKILL)
        lost = in_threads([stream.rest for stream in streams[killed]])
        assert not any(is_whole for _, _, is_whole in lost)
        wait_for(lambda: not is_alive(killed))  # until then it may be dealt connections
        other = Client(fleet)
        assert other.complete() == (200, 5)
        assert other.server_pid() != killed
        wait_for(lambda: fleet.metric("num_requests_running") == 4)  # the others were aborted
    kept = in_threads([stream.rest for stream in streams[spared]])
    assert kept == [(60, 0, True)] * 4
    fleet.settle(restarts + 1)
    assert killed not in fleet.http_pids() and spared in fleet.http_pids()
    assert finished.complete() == (200, 5)
    clients = fleet.clients(per_process=1)
    assert [c.complete() for (c,) in clients.values()] == [(200, 5)] * 2
    assert fleet.metric("request_success_total") == counted + 1 + 4 + 1 + 2, "none is forgotten"
    assert fleet.metric("num_requests_running") == 0
    assert json.loads(finished.ask("GET", "/load")[1]) == {"server_load": 0}


def test_a_killed_engine_ends_each_request_once_and_is_started_once(fleet: Fleet) -> None:
    restarts, engine = fleet.metric("engine_restarts_total"), fleet.engine_pid()
    clients = fleet.clients(per_process=6)
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        with fleet.holding():
            shown = [c.stream(60) for of_one in clients.values() for c in of_one[:3]]
            assert all(stream.first() for stream in shown)
            silent = [
                pool.submit(c.complete, 5, 60) for of_one in clients.values() for c in of_one[3:]
            ]
            wait_for(lambda: fleet.metric("num_requests_running") == 12)
            os.kill(engine, signal.SIGKILL)
            wait_for(lambda: not is_alive(engine))
        assert in_threads([stream.rest for stream in shown]) == [(0, 1, True)] * 6
        assert [future.result(60) for future in silent] == [(200, 60)] * 6
    assert fleet.metric("engine_restarts_total") == restarts + 1
    assert fleet.engine_pid() != engine and len(fleet.http_pids()) == 2
    assert [c.complete() for of_one in clients.values() for c in of_one[3:4]] == [(200, 5)] * 2


def test_a_request_that_ends_engines_is_found_among_those_of_all_processes(fleet: Fleet) -> None:
    restarts = fleet.metric("engine_restarts_total")
    clients = fleet.clients(per_process=4)
    killer, *others = (client for of_one in clients.values() for client in of_one)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        with fleet.holding():
            harmless = [pool.submit(client.complete, 5, 40) for client in others]
            wait_for(lambda: fleet.metric("num_requests_running") == 7)
            status, error = killer.complete(KILL, 50)
        assert status == 500 and "the engine ended" in error["message"]
        assert [future.result(60) for future in harmless] == [(200, 40)] * 7
    assert fleet.metric("engine_restarts_total") == restarts + 2


def test_the_queue_is_that_of_all_processes(pair: Fleet) -> None:
    clients = [c for of_one in pair.clients(per_process=8).values() for c in of_one]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        with pair.holding():
            answers = [pool.submit(c.complete, 5, 20) for c in clients]
            wait_for(lambda: sum(answer.done() for answer in answers) == 4)
        found = Counter(future.result(60)[0] for future in answers)
    assert found == {200: 12, 429: 4}, "two run and four wait at each engine"
    assert pair.metric("admission_rejections_total") == 4
    health = json.loads(clients[0].ask("GET", "/health")[1])
    assert health["replicas"] == ["ready", "ready"] and len(health["http_processes"]) == 2


def test_a_chat_stays_with_its_engine_whichever_process_takes_the_next_turn(pair: Fleet) -> None:
    first, second = (client for (client,) in pair.clients(1).values())
    chat = [9] * 64

    def turn(client: Client) -> list[float]:
        """By engine, how many tokens were generated meanwhile."""
        before = pair.generated()
        assert client.complete(prompt=chat) == (200, 5)
        return [new - old for new, old in zip(pair.generated(), before, strict=True)]

    stream = Client(pair).stream(400)
    assert stream.first()
    turn(first)  # by the engine that the stream left free, which is not the one for a tie
    stream.rest()
    for client in (second, first, second):
        chat = [*chat, *[20 + len(chat)] * 64]
        assert turn(client) == [0, 5]


def test_told_twice_it_ends_at_once(pair: Fleet) -> None:
    stream = Client(pair).stream(2000)
    assert stream.first()
    pids = pair.all_pids()
    os.kill(pair.http_pids()[0], signal.SIGSTOP)  # as one that hangs, and would keep the port
    pair.process.send_signal(signal.SIGTERM)
    wait_for(lambda: "draining" in pair.log)
    pair.process.send_signal(signal.SIGTERM)
    assert pair.process.wait(30) == 130
    wait_for(lambda: not any(map(is_alive, pids)))


def test_told_to_end_all_processes_finish_what_they_have(fleet: Fleet) -> None:
    clients = fleet.clients(per_process=2)
    with fleet.holding():
        streams = [client.stream(60) for of_one in clients.values() for client in of_one]
        assert all(stream.first() for stream in streams)
        pids = fleet.all_pids()
        for pid in (*fleet.http_pids(), fleet.process.pid):  # as systemd without KillMode=mixed
            os.kill(pid, signal.SIGTERM)
        wait_for(lambda: "draining" in fleet.log)
    assert in_threads([stream.rest for stream in streams]) == [(60, 0, True)] * 4
    assert fleet.process.wait(30) == 0, fleet.log
    wait_for(lambda: not any(map(is_alive, pids)))
    assert "Traceback" not in fleet.log.rpartition("draining")[2]


def test_a_process_imports_only_what_it_needs() -> None:
    """One that serves alone nothing of several, and one of several neither engine nor owner."""
    code = """if True:
        import sys
        import compiledllm.server.launch
        assert not {"compiledllm.remote.hub", "compiledllm.remote.shared_wire"} & set(sys.modules)
        import compiledllm.server.http_process
        assert not {"torch", "compiledllm.remote.hub"} & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_engine_given_up_ends_all_with_the_cause(start: Callable[..., Fleet]) -> None:
    lost = start(FAKE_DEED="raise")
    assert lost.process.wait(60) == 1
    assert lost.log.splitlines()[-1] == "error: RuntimeError: the device is lost"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--api-server-count", "0"], "must be an integer of at least 1, got '0'"),
        (["--api-server-count", "-1"], "must be an integer of at least 1, got '-1'"),
        (["--api-server-count", "x"], "must be an integer of at least 1, got 'x'"),
        (["-asc", "2", "--uds", "/tmp/x"], "leave out one of the two"),
        (["-asc", "2", "--responses-store", "9"], "--responses-store 9"),
        (["-asc", "2", "--port", "TAKEN"], "choose another --port"),
        (["-asc", "2", "--api-key", ""], "key"),
    ],
)
def test_wrong_options_are_refused(
    options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from compiledllm import cli

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        given = [port if option == "TAKEN" else option for option in options]
        with contextlib.suppress(SystemExit):
            assert cli.main(["serve", "fake", "--skip-tokenizer-init", *given]) == 2
    assert said in capsys.readouterr().err
