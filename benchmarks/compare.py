"""Ratios between the rows of one report, and between two reports of the same work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from compiledllm.benchmarks.report import Report, Row

# Per benchmark: the fields that identify a cell, and the metrics to compare (a dot enters a dict).
_CELLS = {
    "latency": ("batch", "input_len", "output_len"),
    "throughput": ("requests",),
    "serve": ("request_rate", "max_concurrency"),
    "startup": ("start",),
}
_METRICS = {
    "latency": ("ttft_ms.median", "tpot_ms.median", "output_tokens_per_s.median"),
    "throughput": ("seconds.median", "output_tokens_per_s.median"),
    "serve": ("ttft_ms.p50", "ttft_ms.p99", "tpot_ms.p50", "itl_ms.p99", "output_tokens_per_s"),
    "startup": ("wall_s.median",),
}
METRIC_NAMES = {  # metric of a ratio -> its name in tables and plots
    "ttft_ms.median": "TTFT",
    "ttft_ms.p50": "TTFT p50",
    "ttft_ms.p99": "TTFT p99",
    "tpot_ms.median": "TPOT",
    "tpot_ms.p50": "TPOT p50",
    "itl_ms.p99": "ITL p99",
    "output_tokens_per_s.median": "tokens/s",
    "output_tokens_per_s": "tokens/s",
    "seconds.median": "seconds",
    "wall_s.median": "seconds",
}
# Hardware facts that must be equal in both reports. The driver is a version and may differ.
_HARDWARE = ("device", "name", "cpu", "cores")


def ratios_between_engines(benchmark: str, rows: Sequence[Row]) -> list[Row]:
    """For every cell, the first engine's figures divided by those of each other engine."""
    first = rows[0]["engine"] if rows else None
    ours = {_cell(benchmark, row): row for row in rows if row["engine"] == first}
    others = [row for row in rows if row["engine"] != first]
    return [_ratio(benchmark, ours[_cell(benchmark, row)], row) for row in others]


def compare_reports(a: Report, b: Report, force: bool = False) -> list[Row]:
    """For every row that both reports have, B's figures divided by A's.

    Reports of one engine each are compared whatever the engines are. Raises ValueError, naming the
    difference, if hardware or work differ, unless `force` is set.
    """
    differences = _differences(a, b)
    if differences and not force:
        raise ValueError(
            f"the reports cannot be compared: {'; '.join(differences)}; --force compares anyway"
        )
    if a.benchmark != b.benchmark:
        raise ValueError(f"a report of {a.benchmark} and one of {b.benchmark} share no figures")
    one_each = len({row["engine"] for row in a.rows}) == len({row["engine"] for row in b.rows}) == 1
    kind = a.benchmark
    mine = {(one_each or row["engine"], _cell(kind, row)): row for row in a.rows}
    pairs = [(mine.get((one_each or row["engine"], _cell(kind, row))), row) for row in b.rows]
    found = [_ratio(kind, row, base) for base, row in pairs if base is not None]
    if not found:
        raise ValueError("the reports have no row in common")
    return found


def _differences(a: Report, b: Report) -> list[str]:
    found = []
    if a.benchmark != b.benchmark:
        found.append(f"benchmark is {a.benchmark} in A and {b.benchmark} in B")
    for name in _HARDWARE:
        left, right = a.hardware.get(name), b.hardware.get(name)
        if left != right:
            found.append(f"hardware: {name} is {left} in A and {right} in B")
    for name in sorted(a.work.keys() | b.work.keys()):
        left, right = a.work.get(name), b.work.get(name)
        if left != right:
            found.append(f"work: {name} is {left} in A and {right} in B")
    return found


def _cell(benchmark: str, row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in _CELLS[benchmark])


def _ratio(benchmark: str, row: Row, base: Row) -> Row:
    cell = ", ".join(f"{name} {row[name]}" for name in _CELLS[benchmark])
    result: Row = {"cell": cell, "engine": row["engine"], "to": base["engine"]}
    for metric in _METRICS[benchmark]:
        above, below = _value(row, metric), _value(base, metric)
        result[metric] = above / below if above is not None and below else None
    return result


def _value(row: Row, metric: str) -> float | None:
    value: Any = row
    for name in metric.split("."):
        value = value and value[name]
    return None if value is None else float(value)
