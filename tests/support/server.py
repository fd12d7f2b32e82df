"""A real server in a process of its own, and helpers to wait for it and to inspect processes."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


class Server:
    """A process of `python -m compiledllm.server` with options. Its log goes to a file.

    module: a module to run instead of compiledllm.server. context: for servers with TLS, whose
    tests also change `url`.
    """

    context: ssl.SSLContext | None = None

    def __init__(
        self,
        model: Path,
        folder: Path,
        *options: str,
        max_files: int | None = None,
        module: str = "compiledllm.server",
        **environment: str,
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log_path = folder / "server.log"
        command = [sys.executable, "-m", module, "--model", str(model)]
        command += ["--served-model-name", "tiny", "other-name", "--port", str(self.port)]
        command += ["--enforce-eager", "--kv-cache-memory-bytes", str(2**26), *options]
        cache = {"COMPILEDLLM_CACHE_DIR": str(folder / "cache")}
        with open(self.log_path, "w") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **cache, **environment},
            )
        if max_files is not None:  # set before the process's Python code reads the limit
            resource.prlimit(self.process.pid, resource.RLIMIT_NOFILE, (max_files, max_files))

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def wait_until_ready(self, seconds: float = 90) -> Server:
        wait_for(lambda: self.process.poll() is not None or self.get("/ready")[0] == 200, seconds)
        assert self.process.poll() is None, self.log
        return self

    def get(self, path: str, **headers: str) -> tuple[int | None, Any]:
        return self.request(path, None, **headers)

    def post(self, path: str, body: Any, **headers: str) -> tuple[int | None, Any]:
        """body: JSON, or bytes as they are."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.request(path, raw, **({"content-type": "application/json"} | headers))

    def request(self, path: str, body: bytes | None, **headers: str) -> tuple[int | None, Any]:
        """Status and body, parsed if it is JSON; None if nobody answers."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(self.url + path, body, named)
        try:
            with urllib.request.urlopen(request, timeout=150, context=self.context) as response:
                return response.status, parsed(response.read())
        except urllib.error.HTTPError as error:
            return error.code, parsed(error.read())
        except OSError:
            return None, None

    def engine_pid(self) -> int:
        """The engine's process: the server's child."""
        found = [
            int(path.name)
            for path in Path("/proc").iterdir()
            if path.name.isdigit() and parent_of(path) == self.process.pid
        ]
        engines = [pid for pid in found if b"engine_process" in command_of(pid)]
        assert len(engines) == 1, found
        return engines[0]

    def pids(self) -> dict[str, int]:
        return {"server": self.process.pid, "engine": self.engine_pid()}

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(40)
            except subprocess.TimeoutExpired:
                self.process.kill()
        return self.process.wait()


def parsed(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return body.decode(errors="replace")


def free_port() -> int:
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def metric_of(text: str, name: str) -> float:
    """The first value of a metric in the text of /metrics."""
    found = next(line for line in text.splitlines() if line.startswith(f"compiledllm:{name}{{"))
    return float(found.split()[-1])


@contextlib.contextmanager
def holding(hold: Path) -> Iterator[None]:
    """Meanwhile no request for more than 9 tokens ends, however long the machine takes.

    hold: the file FAKE_HOLD of fake engines.
    """
    hold.touch()
    try:
        yield
    finally:
        hold.unlink()


def wait_for(condition: Callable[[], Any], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def parent_of(process: Path) -> int | None:
    try:
        return int((process / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:  # it has just ended
        return None


def command_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def memory_mib(pid: int) -> float:
    """Resident memory without pages of files, which the kernel may drop at any time."""
    return _status_mib(pid, "RssAnon") + _status_mib(pid, "RssShmem")


def peak_memory_mib(pid: int) -> float:
    """An estimate of the maximum of `memory_mib` since 5 was written to /proc/PID/clear_refs."""
    return _status_mib(pid, "VmHWM") - _status_mib(pid, "RssFile")


def _status_mib(pid: int, name: str) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


class OwnSeconds:
    """Seconds that processes have taken since construction, on a machine shared with others.

    Time in which the processes do not compute counts a tenth, because other processes cause most of
    it.
    """

    def __init__(self, *pids: int) -> None:
        self._pids = pids
        self._start, self._computed = time.monotonic(), self._cpu_seconds()

    def so_far(self) -> float:
        waited, computed = time.monotonic() - self._start, self._cpu_seconds() - self._computed
        return min(waited, computed + waited / 10)

    def _cpu_seconds(self) -> float:
        stats = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2] for pid in self._pids]
        ticks = sum(int(field) for stat in stats for field in stat.split()[11:13])
        return ticks / os.sysconf("SC_CLK_TCK")


def is_alive(pid: int) -> bool:
    """Whether any thread of the process is left. Until then, its sockets stay open.

    The first thread of a killed process may be a zombie before the other threads have ended.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return False
    state, num_threads = stat[0], int(stat[17])
    return state != "Z" or num_threads > 1
