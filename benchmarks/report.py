"""A benchmark's result: the conditions, the work, and a row for everything measured, as JSON."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from compiledllm.platform import Platform, cpu_name

SCHEMA = 1
KINDS = ("latency", "throughput", "serve", "startup")
_PACKAGES = ("torch", "triton", "transformers", "flashinfer-python", "vllm")

Row = dict[str, Any]


@dataclass(slots=True)
class Report:
    """What goes into the JSON.

    hardware, versions: of this machine. work: what was run, without how; two reports compare only
    if both agree. ceilings: bytes/s and FLOP/s, None where the hardware is not known. complete:
    False in a file that was written on the way.
    """

    benchmark: str
    work: dict[str, Any]
    hardware: dict[str, Any]
    versions: dict[str, str]
    commit: str | None
    command: str
    flags: dict[str, Any]
    ceilings: dict[str, float] | None = None
    rows: list[Row] = field(default_factory=list)
    ratios: list[Row] = field(default_factory=list)
    complete: bool = False
    schema: int = SCHEMA

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    def save(self, path: Path) -> None:
        """Write the file whole or not at all."""
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        partial.replace(path)


def load_report(path: Path) -> Report:
    """Raises ValueError for what is not a report of this schema."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a readable report: {error}") from None
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"{path} is not a report of schema {SCHEMA}, its schema is {schema!r}")
    try:
        report = Report(**content)
    except TypeError as error:
        raise ValueError(f"{path} is not a report of schema {SCHEMA}: {error}") from None
    if report.benchmark not in KINDS:
        raise ValueError(f"{path}: benchmark must be one of {KINDS}, got {report.benchmark!r}")
    return report


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median and spread over repeats."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "values": list(values),
    }


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """The 50th, 90th and 99th percentile: the smallest value that many per cent do not exceed."""
    ordered = sorted(values)
    ranks = {p: max(-(-len(ordered) * p // 100) - 1, 0) for p in (50, 90, 99)}
    return {f"p{p}": ordered[rank] for p, rank in ranks.items()}


def against_floor(floor: float | None, measured: float) -> dict[str, Any]:
    """The floor, how close to it the measurement came, and whether it came closer than can be."""
    if floor is None or measured <= 0:  # a difference of two times can be lost in their noise
        return {"floor": floor, "percent": None, "broken": measured <= 0}
    percent = 100 * floor / measured
    return {"floor": floor, "percent": percent, "broken": percent > 100}


# -- conditions ------------------------------------------------------------------------------------


def hardware_facts(platform: Platform) -> dict[str, Any]:
    """This machine: device, name, cpu, cores; of a GPU also driver, clocks and power limit."""
    facts: dict[str, Any] = {
        "device": platform.device.type,
        "name": platform.name,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
    }
    return facts | _gpu_facts() if platform.is_cuda else facts


def _gpu_facts() -> dict[str, Any]:
    """From nvidia-smi, where it is there."""
    names = ("driver_version", "clocks.max.sm", "clocks.max.memory", "power.limit")
    program = shutil.which("nvidia-smi")
    if program is None:
        return {"driver": None}
    query = [program, f"--query-gpu={','.join(names)}", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True)
    values = [value.strip() for value in answer.stdout.partition("\n")[0].split(",")]
    if answer.returncode or len(values) != len(names):
        return {"driver": None}
    facts = ("driver", "max_sm_clock", "max_memory_clock", "power_limit")
    return dict(zip(facts, values, strict=True))


def versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for package in ("compiledllm", *_PACKAGES):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found | {"torch": torch.__version__}  # with the CUDA it was built for


def commit() -> str | None:
    """$GIT_COMMIT if set, else of the checkout this module lies in, "+" behind it if changed."""
    if given := os.environ.get("GIT_COMMIT"):
        return given
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True)
    except OSError:  # no git here
        return None
    return head.stdout.decode().strip() + "+" * bool(changed.stdout) or None


def command_line(arguments: Sequence[str]) -> str:
    """The command, to be run again anywhere: without this machine's folders."""
    return shlex.join(["compiledllm", *map(without_folder, arguments)])


def without_folder(value: str) -> str:
    """The last part of a path on this machine; anything else (a hub id, a URL, a number) as is."""
    path = Path(value)
    is_here = path.is_absolute() or (os.sep in value and (path.exists() or path.parent.is_dir()))
    return path.name if is_here else value


def new_report(
    benchmark: str, work: Mapping[str, Any], hardware: Mapping[str, Any], flags: Mapping[str, Any]
) -> Report:
    """A report without rows, its conditions filled in."""
    return Report(
        benchmark=benchmark,
        work=dict(work),
        hardware=dict(hardware),
        versions=versions(),
        commit=commit(),
        command=command_line(sys.argv[1:]),
        flags={
            name: without_folder(value) if isinstance(value, str) else value
            for name, value in flags.items()
            if value is not None
        },
    )
