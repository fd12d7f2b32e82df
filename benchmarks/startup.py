"""Time from process start to the first token, cold (empty compile caches) and warm."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compiledllm.benchmarks.report import Row, against_floor, spread

if TYPE_CHECKING:
    from compiledllm.benchmarks.model import Model

# Variables that name the caches of engines and compilers. Caches elsewhere stay, also when cold.
_CACHES = {
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_CACHE_DIR": "triton",
    "FLASHINFER_WORKSPACE_BASE": "flashinfer",
    "VLLM_CACHE_ROOT": "vllm",
    "CUDA_CACHE_PATH": "cuda",
}
_MARK = "compiledllm startup: "  # marks the child's line among the engines' own output
# "import": the interpreter and the engine's package. "config": finding the model and reading its
# config, which imports a part of transformers. "rest": time that the engine does not attribute.
PHASES = ("import", "config", "weights", "compile", "capture", "rest", "first token")


def measure_startup(
    engines: Sequence[str],
    model: Model,
    input_len: int,
    num_cold: int,
    num_warm: int,
    advance: Callable[[str], None],
) -> Iterator[Row]:
    """Yield a row for each engine and kind of start, without floors.

    Warm starts use the caches that the last cold start filled. The model's files are in the
    operating system's page cache in both.
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
        kept = tempfile.TemporaryDirectory(prefix="compiledllm-startup-")
        with kept as folder:
            cold = []
            for index in range(max(num_cold, 1)):
                caches = Path(folder) / str(index)
                cold.append(_start(engine, setup, caches))
                advance(f"{engine}, cold")
            warm = []
            for _ in range(num_warm):
                warm.append(_start(engine, setup, caches))
                advance(f"{engine}, warm")
        for start, runs in (("cold", cold[:num_cold]), ("warm", warm)):
            if runs:
                yield _row(engine, start, runs)


def _start(engine: str, setup: Mapping[str, Any], caches: Path) -> dict[str, float]:
    """Seconds of each phase in a fresh process, and "wall" as measured by this process."""
    folders = {name: str(caches / folder) for name, folder in _CACHES.items()}
    request = json.dumps({"engine": engine, **setup})
    started = time.monotonic()
    command = [sys.executable, "-m", "compiledllm.benchmarks.startup", request, repr(started)]
    phases: dict[str, float] = {}
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            command, env=os.environ | folders, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(_MARK):
                wall = time.monotonic() - started
                phases = json.loads(line.removeprefix(_MARK)) | {"wall": wall}
        process.wait()
        if not phases:
            errors.seek(0)
            last = errors.read().strip().splitlines()[-1:] or ["it printed no error"]
            status = process.returncode
            raise ValueError(f"{engine} did not start (exit status {status}): {last[0]}")
    return phases


def _row(engine: str, start: str, runs: Sequence[Mapping[str, float]]) -> Row:
    """One row. Its phases are those of the median run, as medians of phases would not sum up."""
    middle = sorted(runs, key=lambda run: run["wall"])[(len(runs) - 1) // 2]
    return {
        "engine": engine,
        "start": start,
        "wall_s": spread([run["wall"] for run in runs]),
        "phases_s": {name: middle[name] for name in PHASES},
    }


def add_floor(row: Row, weight_bytes: int | None, upload_bytes_per_s: float) -> None:
    """Add "floor_s" to the row: the seconds of one upload of the weights."""
    floor = None if weight_bytes is None else weight_bytes / upload_bytes_per_s
    row["floor_s"] = against_floor(floor, row["wall_s"]["median"])


def child(request: Mapping[str, Any], started: float) -> dict[str, float]:
    """Run in the fresh process: load the engine, generate one token, print the phases' seconds."""
    from compiledllm.benchmarks.model import Model
    from compiledllm.benchmarks.peers import make_peer
    from compiledllm.benchmarks.workload import random_requests
    from compiledllm.platform import Platform

    model = Model(
        path=Path(request["path"]),
        spec=None,
        vocab_size=request["vocab_size"],
        platform=Platform.detect(request["device"]),
        dtype=request["dtype"],
        options=request["options"],
    )
    (prompt,) = random_requests(1, request["input_len"], 1, request["vocab_size"], seed=1)
    imported = time.monotonic()
    peer = make_peer(request["engine"], model)
    loaded = time.monotonic()
    peer.generate([prompt])
    ended = time.monotonic()
    phases = dict.fromkeys(PHASES, 0.0)
    phases |= {name: phase_s for name, phase_s in peer.startup_s.items() if name in PHASES}
    phases["rest"] = loaded - imported - sum(phases.values())
    phases["import"] += imported - started
    phases["first token"] = ended - loaded
    return phases


if __name__ == "__main__":
    result = child(json.loads(sys.argv[1]), float(sys.argv[2]))
    print("\n" + _MARK + json.dumps(result), flush=True)
