"""Time from process start to the first token: cold (empty caches), warm, and from a build."""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compiledllm import ledger
from compiledllm.benchmarks.report import Row, against_floor, spread
from compiledllm.benchmarks.startup_child import MARK

if TYPE_CHECKING:
    from compiledllm.benchmarks.model import Model

# Environment variable of a cache -> its folder in each start's caches. Other caches are not
# emptied, not even for a cold start.
_CACHES = {
    "COMPILEDLLM_CACHE_DIR": "compiledllm",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_CACHE_DIR": "triton",
    "FLASHINFER_WORKSPACE_BASE": "flashinfer",
    "VLLM_CACHE_ROOT": "vllm",
    "CUDA_CACHE_PATH": "cuda",
    "TMPDIR": "tmp",
}
_BUILD = """
import json, pathlib, sys
from compiledllm import bytecode
with bytecode.kept():
    from compiledllm.engine.build import build
    build(json.loads(sys.argv[1]), pathlib.Path(sys.argv[2]))
"""
_NO_COMPILER = {"CC": "/no/compiler", "CXX": "/no/compiler"}
# "process" is the start of the interpreter. The phases of the engine's ledger follow. "rest" is the
# time that no phase covers. For other engines, "rest" is most of the time.
PHASES = ("process", *ledger.PHASES, "first token")


def measure_startup(
    engines: Sequence[str],
    model: Model,
    input_len: int,
    counts: Mapping[str, int],
    advance: Callable[[str], None],
) -> Iterator[Row]:
    """Yield a row for each engine and kind of start, without floors.

    counts: number of starts by kind. "cold": every cache is empty. "warm": with the caches that the
    last cold start filled. "built": every cache is empty and no C++ compiler is found, but
    `compiledllm build` has made an artifact; only for our own engine. For every kind, the model's
    files are in the operating system's page cache.
    """
    setup = {
        "path": str(model.path),
        "vocab_size": model.vocab_size,
        "device": str(model.platform.device),
        "dtype": model.dtype,
        "options": dict(model.options),
        "input_len": input_len,
    }
    for engine in engines:
        with tempfile.TemporaryDirectory(prefix="compiledllm-startup-") as folder:
            starts = _Starts(engine, setup, Path(folder), advance)
            cold = [starts.run("cold") for _ in range(max(counts["cold"], 1))]
            warm = [starts.run("warm") for _ in range(counts["warm"])]
            built = []
            if counts["built"] and engine == "compiledllm":
                starts.build()
                built = [starts.run("built") for _ in range(counts["built"])]
        for kind, runs in (("cold", cold[: counts["cold"]]), ("warm", warm), ("built", built)):
            if runs:
                yield _row(engine, kind, runs)


class _Starts:
    """Starts an engine in fresh processes, with caches in folders below `folder`."""

    def __init__(
        self, engine: str, setup: dict[str, Any], folder: Path, advance: Callable[[str], None]
    ) -> None:
        self._request = {"engine": engine, **setup}
        self._folder = folder
        self._advance = advance
        self._count = 0
        self._warm = folder

    def run(self, kind: str) -> dict[str, Any]:
        request, environment = self._request, {}
        caches = self._warm
        if kind != "warm":
            caches = self._new_caches()
        if kind == "cold":
            self._warm = caches
        if kind == "built":
            options = request["options"] | {"artifact_dir": str(self._folder / "built")}
            request, environment = request | {"options": options}, _NO_COMPILER
        found = _start(request, _environment(caches) | environment)
        self._advance(f"{request['engine']}, {kind}")
        return found

    def build(self) -> None:
        request = self._request
        given = request["options"] | {name: request[name] for name in ("device", "dtype")}
        options = json.dumps({"model": request["path"], **given})
        done = subprocess.run(
            [sys.executable, "-c", _BUILD, options, str(self._folder / "built")],
            env=_environment(self._new_caches()),
            capture_output=True,
            text=True,
        )
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:] or ["it printed no error"]
            raise ValueError(f"compiledllm build failed: {last[0]}")

    def _new_caches(self) -> Path:
        self._count += 1
        return self._folder / str(self._count)


def _environment(caches: Path) -> dict[str, str]:
    folders = {name: caches / folder for name, folder in _CACHES.items()}
    for folder in folders.values():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return os.environ | {name: str(folder) for name, folder in folders.items()}


def _start(request: Mapping[str, Any], environment: Mapping[str, str]) -> dict[str, Any]:
    """The facts that the fresh process prints, and "wall_s" as measured by this process."""
    started = time.monotonic()
    command = [sys.executable, "-m", "compiledllm.benchmarks.startup_child"]
    found: dict[str, Any] = {}
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            [*command, json.dumps(request), repr(started)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(MARK):
                found = json.loads(line.removeprefix(MARK))
                found["wall_s"] = time.monotonic() - started
        process.wait()
        if not found:
            errors.seek(0)
            why = f"{request['engine']} did not start (exit status {process.returncode}): "
            raise ValueError(why + _named_error(errors.read()))
    phases = {name: found["phases_s"].get(name, 0.0) for name in PHASES}
    phases["rest"] += found["wall_s"] - sum(phases.values())
    return found | {"phases_s": phases}


def _named_error(text: str) -> str:
    """The last line that names an exception, because CUDA's errors end in lines of advice."""
    lines = text.strip().splitlines()
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)]
    return (named or lines or ["it printed no error"])[-1]


def _row(engine: str, kind: str, runs: Sequence[Mapping[str, Any]]) -> Row:
    """One row. Its phases are those of the median run, because medians of phases do not add up.

    cpu_s: CPU seconds of the process, on all cores together. imported: heavy packages that the
    median run had imported by its first token.
    """
    middle = sorted(runs, key=lambda run: run["wall_s"])[(len(runs) - 1) // 2]
    weights_s = middle["phases_s"]["weights"]
    return {
        "engine": engine,
        "start": kind,
        "wall_s": spread([run["wall_s"] for run in runs]),
        "cpu_s": statistics.median(run["cpu_s"] for run in runs),
        "phases_s": middle["phases_s"],
        "weights_bytes_per_s": middle["weight_bytes"] / weights_s if weights_s else 0.0,
        "compile": middle["compile"],
        "imported": middle["imported"],
    }


def add_floor(row: Row, weight_bytes: int | None, upload_bytes_per_s: float) -> None:
    """Add "floor_s" to the row: the seconds of one upload of the weights."""
    floor = None if weight_bytes is None else weight_bytes / upload_bytes_per_s
    row["floor_s"] = against_floor(floor, row["wall_s"]["median"])
