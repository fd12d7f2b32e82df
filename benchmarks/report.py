"""A benchmark's result: the conditions, the work, and a row for everything measured, as JSON."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
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
    """A report as it is written to JSON.

    hardware, versions: facts of this machine. work: the work that was measured; only reports of
    equal work and hardware compare. ceilings: bytes/s and FLOP/s, None where they were not
    measured. complete: False in a file that was saved before the run ended.
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
        """Write the file atomically."""
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        partial.replace(path)


def load_report(path: Path) -> Report:
    """Read a report. Raises ValueError for a file that is no report of this schema."""
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


def run_script(main: Callable[[list[str]], None]) -> None:
    """Run a script's `main` on the process's arguments; bad ones end with a line and status 2."""
    try:
        main(sys.argv[1:])
    except ValueError as error:  # a ConfigError, too
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def collected(rows: Iterable[Row]) -> list[Row]:
    """The rows of a script's report, each of which is printed as soon as it has been measured."""
    found = []
    for row in rows:
        found.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
    return found


def script_facts(benchmark: str, platform: Platform) -> dict[str, Any]:
    """The conditions in the report of a script, to which the script adds its work and rows."""
    return {
        "benchmark": benchmark,
        "hardware": hardware_facts(platform),
        "versions": versions(),
        "commit": commit(),
        "command": command_line(sys.argv),
    }


def write_facts(facts: Mapping[str, Any], path: Path | None) -> None:
    """Write a report without a table as JSON: to `path`, or to standard output if there is none."""
    text = json.dumps(facts, indent=1) + "\n"
    if path is None:
        print(text, end="")
    else:
        path.write_text(text, encoding="utf-8")


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, lowest and highest value of repeats."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "values": list(values),
    }


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """The 50th, 90th and 99th percentiles (nearest rank)."""
    ordered = sorted(values)
    ranks = {p: max(-(-len(ordered) * p // 100) - 1, 0) for p in (50, 90, 99)}
    return {f"p{p}": ordered[rank] for p, rank in ranks.items()}


def against_floor(floor: float | None, measured: float) -> dict[str, Any]:
    """The floor, its percentage of the measurement, and whether the measurement is below it."""
    # TPOT is a difference of two times, which noise can make zero or negative.
    if floor is None or measured <= 0:
        return {"floor": floor, "percent": None, "broken": measured <= 0}
    percent = 100 * floor / measured
    return {"floor": floor, "percent": percent, "broken": percent > 100}


# -- conditions ------------------------------------------------------------------------------------


def hardware_facts(platform: Platform) -> dict[str, Any]:
    """This machine: device, name, CPU, cores; of a GPU also driver, clocks and power limit."""
    facts: dict[str, Any] = {
        "device": platform.device.type,
        "name": platform.name,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
    }
    return facts | _gpu_facts() if platform.is_cuda else facts


def _gpu_facts() -> dict[str, Any]:
    """Facts that nvidia-smi reports, if it is installed."""
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
    return found | {"torch": torch.__version__}  # names the build's CUDA version, too


def commit() -> str | None:
    """$GIT_COMMIT, or the commit of this checkout, with "+" appended if files are modified."""
    if given := os.environ.get("GIT_COMMIT"):
        return given
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True)
    except OSError:  # git is not installed
        return None
    return head.stdout.decode().strip() + "+" * bool(changed.stdout) or None


def command_line(arguments: Sequence[str]) -> str:
    """The command line with paths shortened to their last part, so that it suits any machine."""
    return shlex.join(["compiledllm", *map(without_folder, arguments)])


def without_folder(value: str) -> str:
    """The last part of an existing path; anything else (a hub id, a URL, a number) unchanged."""
    label, equals, rest = value.partition("=")
    if equals:  # `--other LABEL=PYTHON`, or an option and its value in one word
        return label + equals + without_folder(rest)
    path = Path(value)
    is_here = path.is_absolute() or (os.sep in value and (path.exists() or path.parent.is_dir()))
    return path.name if is_here else value


def _without_folders(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_without_folders(each) for each in value]
    return without_folder(value) if isinstance(value, str) else value


def new_report(
    benchmark: str, work: Mapping[str, Any], hardware: Mapping[str, Any], flags: Mapping[str, Any]
) -> Report:
    """A report with its conditions filled in and no rows."""
    return Report(
        benchmark=benchmark,
        work=dict(work),
        hardware=dict(hardware),
        versions=versions(),
        commit=commit(),
        command=command_line(sys.argv[1:]),
        flags={name: _without_folders(value) for name, value in flags.items() if value is not None},
    )
