"""The engine's process stopped, killed, hanging and broken in every state: what the server does.

The process is `fake_engine.py`: real but for the model, so that it starts in half a second.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from compiledllm.remote import restarts, vital_signs
from compiledllm.remote.engine_client import EngineClient
from compiledllm.remote.engine_requests import MAX_UNREAD_BYTES
from compiledllm.remote.limits import Limits
from compiledllm.remote.wire import Ready
from compiledllm.server.app import AppOptions, create_app
from tests.support.server import free_port, is_alive, metric_of, wait_for

FAKE = [sys.executable, str(Path(__file__).with_name("fake_engine.py"))]
OPTIONS = {"model": "fake", "skip_tokenizer_init": True, "max_num_seqs": 4, "block_size": 16}
KILL, HANG, RAISE, SLOW = 901, 902, 903, 904  # prompts that do something to the engine
STUCK_S = 1.0


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    text: str

    def json(self) -> Any:
        return json.loads(self.text)


async def call(app: Any, method: str, path: str, body: Any = None) -> Answer:
    """An HTTP request, without a socket."""
    head = {"host": "x", "content-type": "application/json"}
    scope = {"type": "http", "http_version": "1.1", "method": method, "scheme": "http"}
    scope |= {"path": path, "raw_path": path.encode(), "query_string": b"", "root_path": ""}
    scope |= {"headers": [(k.encode(), v.encode()) for k, v in head.items()], "state": {}}
    raw = [json.dumps(body).encode()]
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        if not raw:
            await asyncio.Event().wait()  # the client stays
        return {"type": "http.request", "body": raw.pop(), "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await app(scope, receive, send)
    headers = {k.decode(): v.decode() for k, v in sent[0]["headers"]}
    text = b"".join(message.get("body", b"") for message in sent).decode()
    return Answer(sent[0]["status"], headers, text)


class Rig:
    """A client with a fake engine, and the HTTP application in front of it."""

    def __init__(self, folder: Path, limits: Limits, command: list[str]) -> None:
        self._hold = folder / "hold"
        environment = {"FAKE_HOLD": str(self._hold)}
        self.client = EngineClient(OPTIONS, limits, folder / "crashes", command, environment)
        self.app = create_app(self.client, AppOptions(model_names=["fake"], api_keys=[]))

    @property
    def pid(self) -> int:
        child = self.client._child
        assert child is not None
        return child.process.pid

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)
        self._hold.unlink(missing_ok=True)

    async def until(self, condition: Callable[[], Any], seconds: float = 30) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "it did not happen in time"
            await asyncio.sleep(0.02)

    async def until_started_again(self, old: int) -> None:
        """Ready, with another process than this one."""
        await self.until(lambda: self.pid != old and self.client.state == "ready")
        assert (await self.get("/health")).status == 200

    async def until_running_again(self, old: int) -> None:
        """Another process than this one runs a request, as its own figures say."""
        await self.until_started_again(old)
        stats = self.client.stats
        await self.until(lambda: self.client.stats is not stats and self.client.stats.num_running)

    async def until_ready(self) -> None:
        await self.until(lambda: self.client.state == "ready")

    async def spawned_after(self, old: int) -> None:
        await self.until(lambda: self.pid != old)
        assert self.client.state == "loading"

    async def get(self, path: str) -> Answer:
        return await call(self.app, "GET", path)

    async def post(self, body: Any) -> Answer:
        return await call(self.app, "POST", "/v1/completions", body)

    def ask(self, first: int = 5, max_tokens: int = 5, **more: Any) -> asyncio.Task[Answer]:
        body = {"prompt": [first, 6, 7], "max_tokens": max_tokens, **more}
        return asyncio.create_task(self.post(body))

    async def asked(self, *arguments: Any, **more: Any) -> asyncio.Task[Answer]:
        """`ask`, once the engine runs it; it does not end before the next signal."""
        self._hold.touch()
        task, tokens = self.ask(*arguments, **more), self.client.stats
        await self.until(lambda: self.client.stats is not tokens and self.client.live)
        return task

    async def health(self) -> tuple[int, str]:
        answer = await self.get("/health")
        schema = self.app.openapi()
        declared = schema["paths"]["/health"]["get"]["responses"][str(answer.status)]
        form = declared["content"]["application/json"]["schema"]
        jsonschema.validate(answer.json(), form | {"components": schema["components"]})
        return answer.status, answer.json().get("reason", "")

    async def metric(self, name: str) -> float:
        return metric_of((await self.get("/metrics")).text, name)


@pytest.fixture
def live(tmp_path: Path) -> Callable[..., None]:
    """live(play, **limits): run `await play(rig)` with an engine that has started."""

    def run(
        play: Callable[[Rig], Awaitable[None]],
        settles: bool = True,
        command: list[str] = FAKE,
        **limits: float,
    ) -> None:
        async def main() -> None:
            given: dict[str, Any] = {"request_s": 30, "stuck_s": STUCK_S} | limits
            rig = Rig(tmp_path, Limits(99, 10**6, **given), command)
            rig.client.start()
            try:
                if settles:
                    await rig.client.wait_until_settled()
                    assert rig.client.state == "ready", rig.client.failure
                else:
                    await rig.until(lambda: rig.client._child or rig.client.failure)
                await play(rig)
            finally:
                await rig.client.stop()

        asyncio.run(asyncio.wait_for(main(), 60))

    return run


def is_ok(answer: Answer, max_tokens: int = 5) -> bool:
    return answer.status == 200 and answer.json()["usage"]["completion_tokens"] == max_tokens


def error_of(answer: Answer) -> str:
    assert answer.status == 500, answer.text
    return str(answer.json()["error"]["message"])


# -- stopped -----------------------------------------------------------------------------------


def test_a_stopped_idle_engine_is_unhealthy_refuses_and_is_replaced(
    live: Callable[..., None],
) -> None:
    async def play(rig: Rig) -> None:
        old = rig.pid
        assert await rig.health() == (200, "") and await rig.metric("engine_ready") == 1
        rig.signal(signal.SIGSTOP)
        await rig.until(rig.client.why_unhealthy)
        status, reason = await rig.health()
        assert status == 503 and "gave no sign of life" in reason
        assert await rig.metric("engine_seconds_without_step") > STUCK_S
        refused = await rig.ask()
        assert refused.status == 503 and int(refused.headers["retry-after"]) > 0
        assert "no sign of life" in refused.json()["error"]["message"]
        await rig.until_started_again(old)
        assert is_ok(await rig.ask()) and await rig.metric("engine_restarts_total") == 1

    live(play)


def test_a_stopped_busy_engine_is_replaced_and_its_requests_are_replayed(
    live: Callable[..., None],
) -> None:
    async def play(rig: Rig) -> None:
        old, waiting = rig.pid, await rig.asked(5, 100)
        rig.signal(signal.SIGSTOP)
        await rig.until(rig.client.why_unhealthy)
        assert "1 requests live" in (await rig.health())[1]
        assert is_ok(await waiting, 100)
        assert rig.pid != old

    live(play)


def test_an_engine_that_goes_on_in_time_is_healthy_again(live: Callable[..., None]) -> None:
    async def play(rig: Rig) -> None:
        old, waiting = rig.pid, await rig.asked(5, 100)
        rig.signal(signal.SIGSTOP)
        await rig.until(rig.client.why_unhealthy)
        rig.signal(signal.SIGCONT)
        await rig.until(lambda: not rig.client.why_unhealthy())
        assert is_ok(await waiting, 100) and rig.pid == old

    live(play, stuck_s=2.0)


def test_health_is_true_when_the_waiting_requests_have_timed_out(
    live: Callable[..., None],
) -> None:
    async def play(rig: Rig) -> None:
        waiting = await rig.asked(5, 500)
        rig.signal(signal.SIGSTOP)
        assert (await waiting).status == 504
        assert not rig.client.live
        await rig.until(rig.client.why_unhealthy)
        assert (await rig.health())[0] == 503
        assert (await rig.get("/ready")).status == 503

    live(play, request_s=0.3, stuck_s=1.0)


def test_an_engine_stopped_while_it_loads_is_replaced(
    live: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vital_signs, "MIN_LOAD_KILL_S", 4.0)

    async def play(rig: Rig) -> None:
        old = rig.pid
        rig.signal(signal.SIGSTOP)
        await rig.until(rig.client.why_unhealthy)
        status, reason = await rig.health()
        assert status == 503 and "gave no sign of life" in reason
        await rig.until_started_again(old)
        assert is_ok(await rig.ask())

    live(play, settles=False)


def test_a_client_waits_through_a_stopped_restart(
    live: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vital_signs, "MIN_LOAD_KILL_S", 4.0)

    async def play(rig: Rig) -> None:
        old, waiting = rig.pid, await rig.asked(5, 100)
        rig.signal(signal.SIGKILL)
        await rig.spawned_after(old)
        rig.signal(signal.SIGSTOP)
        await rig.until(rig.client.why_unhealthy)
        assert is_ok(await waiting, 100)

    live(play)


def test_what_a_stopped_engine_does_not_read_is_bounded(live: Callable[..., None]) -> None:
    async def play(rig: Rig) -> None:
        rig.signal(signal.SIGSTOP)
        body = {"prompt": [999] * 2000, "max_tokens": 5, "n": 32}
        refusals = 0
        for _ in range(200):  # they come and leave, 192 kB each
            try:
                async with asyncio.timeout(0.03):
                    refused = await rig.post(body)
                refusals += refused.status == 503
            except TimeoutError:
                pass
        assert refusals > 50 and rig.client._child is not None
        assert rig.client._child.num_unread_bytes < MAX_UNREAD_BYTES + 2**20
        rig.signal(signal.SIGCONT)
        await rig.until(lambda: not rig.client._child.num_unread_bytes)
        assert is_ok(await rig.ask())

    live(play, stuck_s=30)


# -- killed ------------------------------------------------------------------------------------


def test_an_engine_killed_in_any_state_is_started_again(live: Callable[..., None]) -> None:
    async def play(rig: Rig) -> None:
        old = rig.pid
        rig.signal(signal.SIGKILL)  # idle
        await rig.until_started_again(old)
        assert await rig.metric("engine_restarts_total") == 1
        old, waiting = rig.pid, await rig.asked(5, 100)
        streaming = rig.ask(5, 500, stream=True)
        await rig.until(lambda: any(each.was_shown for each in rig.client.live))
        rig.signal(signal.SIGKILL)  # busy
        assert "ended by SIGKILL" in (await streaming).text
        await rig.spawned_after(old)
        old = rig.pid
        rig.signal(signal.SIGKILL)  # and as it starts again
        await rig.until_started_again(old)
        assert is_ok(await waiting, 100)
        assert await rig.metric("engine_restarts_total") == 3

    live(play)


def test_killed_while_it_loads_for_the_first_time_it_is_the_end(
    live: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_LOAD_S", "30")

    async def play(rig: Rig) -> None:
        rig.signal(signal.SIGKILL)
        await rig.client.wait_until_dead()
        assert rig.client.state == "dead"
        assert (await rig.health()) == (503, "its process was ended by SIGKILL")

    live(play, settles=False)


def test_loading_has_a_deadline(live: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_LOAD_S", "30")

    async def play(rig: Rig) -> None:
        await rig.client.wait_until_dead()
        assert rig.client.failure is not None
        assert "loading took longer than 1 s (--load-timeout)" in rig.client.failure.error

    live(play, settles=False, load_s=1)


def test_a_slow_loader_is_healthy(
    live: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_LOAD_S", "2")

    async def play(rig: Rig) -> None:
        await rig.until(lambda: rig.client.signs._process > 0)
        while rig.client.state == "loading":
            assert (await rig.health())[0] == 200
            await asyncio.sleep(0.05)
        assert rig.client.num_restarts == 0

    live(play, settles=False)


def test_a_server_that_drains_starts_an_engine_again_only_for_those_who_wait(
    live: Callable[..., None],
) -> None:
    async def play(rig: Rig) -> None:
        old, waiting = rig.pid, await rig.asked(5, 100)
        draining = asyncio.create_task(rig.client.drain(30))
        await asyncio.sleep(0)
        assert (await rig.ask()).status == 503
        rig.signal(signal.SIGKILL)
        assert is_ok(await waiting, 100) and rig.client.state == "draining"
        await draining
        assert rig.pid != old
        rig.signal(signal.SIGKILL)
        await rig.client.wait_until_dead()
        assert rig.client.num_restarts == 1

    live(play)


# -- poison ------------------------------------------------------------------------------------


def test_poisonous_requests_are_found_and_cost_nobody_else(
    live: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restarts, "_FIRST_DELAY_S", 0.01)

    async def play(rig: Rig) -> None:
        harmless = [rig.ask(5, 400) for _ in range(2)]
        for deed in (KILL, RAISE, KILL, RAISE):
            cause = "SIGKILL" if deed == KILL else "the device is lost"
            await rig.until_ready()
            message = error_of(await rig.ask(deed))
            assert "second time while it ran this request" in message and cause in message
        assert all(is_ok(answer, 400) for answer in await asyncio.gather(*harmless))
        assert rig.client.num_restarts == 8

    live(play)


def test_those_that_only_waited_are_not_to_blame(
    live: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_STEP_S", "0.3")  # a suspect is on trial for more than a second

    async def play(rig: Rig) -> None:
        running = [rig.ask(SLOW, 5) for _ in range(4)]  # all that run at once
        await rig.until(lambda: rig.client.stats and rig.client.stats.num_running == 4)
        waiting = rig.ask(5, 5)
        await rig.until(lambda: rig.client.stats.num_waiting == 1)
        for _ in range(2):
            old = rig.pid
            rig.signal(signal.SIGKILL)
            await rig.until_running_again(old)
        assert is_ok(await waiting)
        blamed = [answer for answer in await asyncio.gather(*running) if not is_ok(answer)]
        assert len(blamed) == 1 and "second time" in error_of(blamed[0])

    live(play)


def test_an_engine_that_ends_without_a_culprit_is_given_up(
    live: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restarts, "_FIRST_DELAY_S", 0.01)
    monkeypatch.setattr(restarts, "MAX_CRASHES", 2)
    monkeypatch.setenv("FAKE_IDLE_DEED", "raise")  # at the first ping

    async def play(rig: Rig) -> None:
        await rig.client.wait_until_dead()
        assert await rig.health() == (503, "RuntimeError: the device is lost")
        assert rig.client.num_restarts == 2

    live(play, settles=False)  # it may be given up before anybody saw it ready


def test_an_engine_that_ends_while_its_client_loads_is_started_again(
    live: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def load_for_ever(client: EngineClient, ready: Ready) -> None:
        await asyncio.sleep(3600)

    monkeypatch.setattr(EngineClient, "_load_texts", load_for_ever)
    monkeypatch.setattr(restarts, "MAX_CRASHES", 1)
    monkeypatch.setenv("FAKE_IDLE_DEED", "raise")

    async def play(rig: Rig) -> None:
        await rig.client.wait_until_dead()
        assert rig.client.num_restarts == 1

    live(play, settles=False)


def test_a_step_that_hangs_ends_with_its_engine(live: Callable[..., None]) -> None:
    async def play(rig: Rig) -> None:
        hanging = rig.ask(HANG)
        await rig.until(rig.client.why_unhealthy)
        assert "no step was finished" in (await rig.health())[1]  # the process still answers
        assert "no step was finished" in error_of(await hanging)
        await rig.until_ready()
        assert is_ok(await rig.ask())

    live(play)


# -- broken ------------------------------------------------------------------------------------


@pytest.mark.parametrize("raw", [b"\0\0\0\1\xc1", b"\xff\xff\xff\xff", b"\0\0\0\0"])
def test_a_frame_that_is_none_ends_the_engine_which_is_started_again(
    raw: bytes, live: Callable[..., None], tmp_path: Path
) -> None:
    async def play(rig: Rig) -> None:
        old = rig.pid
        assert rig.client._child is not None
        rig.client._child._writer.write(raw)
        await rig.until_started_again(old)
        (path,) = (tmp_path / "crashes").iterdir()
        record = json.loads(path.read_text())
        assert "WireError: a frame" in record["error"] and record["thread"] == "frames"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        assert is_ok(await rig.ask())

    live(play)


def test_an_engine_that_says_what_is_no_message_is_replaced(live: Callable[..., None]) -> None:
    async def play(rig: Rig) -> None:
        old = rig.pid
        assert rig.client._child is not None
        rig.client._child._reader.feed_data(b"\0\0\0\1\xc1")
        await rig.until_started_again(old)
        assert is_ok(await rig.ask())

    live(play)


@pytest.mark.parametrize("place", ["_watch", "observe"])
def test_a_fault_of_the_servers_own_side_is_the_end(
    place: str, live: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any) -> None:
        raise MemoryError("no more")

    async def play(rig: Rig) -> None:
        monkeypatch.setattr(rig.client.signs, "tick", broken)
        if place == "observe":
            rig.client.observe = broken
        asking = rig.ask(5, 100)
        await rig.client.wait_until_dead()
        assert rig.client.state == "dead" and "MemoryError" in (await rig.health())[1]
        assert "MemoryError" in error_of(await asking)

    live(play)


def test_an_engine_that_cannot_be_started_is_the_end(live: Callable[..., None]) -> None:
    async def play(rig: Rig) -> None:
        await rig.client.wait_until_dead()
        assert "cannot be started" in (await rig.health())[1]

    live(play, settles=False, command=["/nonexistent"])


def test_a_full_disk_costs_the_record_and_nothing_else(
    live: Callable[..., None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "crashes").write_text("a file")

    async def play(rig: Rig) -> None:
        old = rig.pid
        rig.signal(signal.SIGKILL)
        await rig.until_started_again(old)
        assert is_ok(await rig.ask())

    live(play)
    assert "the crash record cannot be written" in caplog.text


# -- what is left behind -------------------------------------------------------------------------


def family(pid: int) -> list[int]:
    """A process and its descendants."""
    found = [pid]
    for path in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            fields = (path / "stat").read_text().rpartition(")")[2].split()
            if int(fields[1]) == pid and fields[0] != "Z":
                found += family(int(path.name))
    return found


def test_an_engines_own_children_end_with_it(
    live: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_CHILD", "1")

    async def play(rig: Rig) -> None:
        members = family(rig.pid)
        assert len(members) == 3  # with the guardian and its own child
        rig.signal(signal.SIGKILL)
        await rig.until(lambda: not any(map(is_alive, members)))

    live(play)


class FakeServer:
    """`compiledllm serve` with the fake engine."""

    CODE = (
        "import sys, functools; from compiledllm.server import launch; from compiledllm import cli;"
        "launch.EngineClient = functools.partial(launch.EngineClient, command=sys.argv[1].split());"
        "sys.exit(cli.main(sys.argv[2:]))"
    )

    def __init__(self, folder: Path, port: int, *options: str, **environment: str) -> None:
        self.port, self.log = port, folder / f"{port}.log"
        command = [sys.executable, "-c", self.CODE, " ".join(FAKE), "serve", "fake"]
        command += ["--skip-tokenizer-init", "--port", str(port), *options]
        cache = {"COMPILEDLLM_CACHE_DIR": str(folder)}
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env={**os.environ, **cache, **environment}
            )

    def get(self, path: str) -> int | None:
        try:
            with urllib.request.urlopen(
                f"http://127.0.0.1:{self.port}{path}", timeout=10
            ) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return None

    def send(self, first: int, max_tokens: int = 50) -> socket.socket:
        """A request whose answer is not waited for."""
        connection = socket.create_connection(("127.0.0.1", self.port))
        raw = json.dumps({"prompt": [first], "max_tokens": max_tokens}).encode()
        head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
        head += "content-type: application/json\r\n"
        connection.sendall(f"{head}content-length: {len(raw)}\r\n\r\n".encode() + raw)
        return connection

    def is_busy(self) -> bool:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=10) as answer:
            return metric_of(answer.read().decode(), "num_requests_running") > 0

    def engine(self) -> int | None:
        for pid in family(self.process.pid)[1:]:
            with contextlib.suppress(OSError):
                if b"fake_engine" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    return pid
        return None


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., FakeServer]]:
    servers: list[FakeServer] = []

    def start(*options: str, **environment: str) -> FakeServer:
        servers.append(FakeServer(tmp_path, free_port(), *options, **environment))
        return servers[-1]

    yield start
    for server in servers:
        members = family(server.process.pid)
        server.process.kill()
        server.process.wait()
        wait_for(lambda members=members: not any(map(is_alive, members)))


def test_nothing_outlives_a_killed_server_whatever_its_engine_does(
    serve: Callable[..., FakeServer],
) -> None:
    loading, stopped = serve(FAKE_LOAD_S="60", FAKE_CHILD="1"), serve()
    wait_for(lambda: len(family(loading.process.pid)) == 4)
    wait_for(lambda: stopped.get("/ready") == 200)
    os.kill(stopped.engine(), signal.SIGSTOP)
    for server in (loading, stopped):
        members = family(server.process.pid)
        server.process.kill()
        server.process.wait()
        wait_for(lambda members=members: not any(map(is_alive, members)))


def test_told_to_end_it_ends_whatever_its_engine_does(serve: Callable[..., FakeServer]) -> None:
    loading, stopped = serve(FAKE_LOAD_S="60"), serve("--shutdown-timeout", "1")
    wait_for(lambda: loading.get("/health") == 200 and loading.engine())
    wait_for(lambda: stopped.get("/ready") == 200)
    os.kill(stopped.engine(), signal.SIGSTOP)
    with stopped.send(5):
        time.sleep(0.3)  # for the request to be let in
        for server in (loading, stopped):
            members = family(server.process.pid)
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(20) == 0, server.log.read_text()
            wait_for(lambda members=members: not any(map(is_alive, members)))


def test_told_to_end_it_finishes_what_it_has_and_told_twice_it_ends_at_once(
    serve: Callable[..., FakeServer], tmp_path: Path
) -> None:
    hold = tmp_path / "hold"
    hold.touch()  # no answer ends
    first, second = serve(FAKE_HOLD=str(hold)), serve(FAKE_HOLD=str(hold))
    answers, members = {}, family(second.process.pid)
    for server in (first, second):
        wait_for(lambda server=server: server.get("/ready") == 200)
        answers[server] = server.send(5, 40)
        members += family(server.process.pid)
        wait_for(server.is_busy)
        server.process.send_signal(signal.SIGTERM)
    # A signal sent while an equal one is still pending is lost.
    wait_for(lambda: second.get("/ready") == 503)
    second.process.send_signal(signal.SIGTERM)
    assert second.process.wait(30) == 130
    hold.unlink()
    with answers[first], answers[second]:
        assert b'"completion_tokens":40' in answers[first].makefile("rb").read()
    assert first.process.wait(20) == 0
    wait_for(lambda: not any(map(is_alive, members)))


def test_an_engine_given_up_ends_the_server_with_the_cause(
    serve: Callable[..., FakeServer],
) -> None:
    lost = serve(FAKE_DEED="raise")
    assert lost.process.wait(30) == 1
    assert lost.log.read_text().splitlines()[-1] == "error: RuntimeError: the device is lost"
