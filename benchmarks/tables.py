"""Prints reports as tables, and the progress bar of a long run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from compiledllm.benchmarks.compare import METRIC_NAMES
from compiledllm.benchmarks.report import Report, Row

_WIDTH = 120  # columns where the output is no terminal; every table fits
_BROKEN = "faster than the floor or not above zero: a broken measurement"


def print_report(report: Report) -> None:
    """Print conditions, rows and ratios."""
    console = _console()
    hardware = report.hardware
    console.print(f"{hardware['name']}; {_joined(report.versions)}; commit {report.commit}")
    if report.ceilings:
        shown = {"read": "read_bytes_per_s", "copied": "copy_bytes_per_s"}
        rates = [f"{report.ceilings[key] / 1e9:,.1f} GB/s {name}" for name, key in shown.items()]
        flops = report.ceilings["flops_per_s"] / 1e12
        console.print(f"ceilings: {', '.join(rates)}, {flops:,.2f} TFLOP/s multiplied")
    console.print(f"work: {_joined(report.work)}")
    console.print(_TABLES[report.benchmark](report.rows))
    if report.ratios:
        console.print(_ratio_table(report.ratios))
    if any(_is_broken(row) for row in report.rows):
        console.print(f"! {_BROKEN}", style="bold red")


def print_ratios(ratios: list[Row]) -> None:
    """Print ratio rows: {"cell": ..., "engine": ..., "to": ..., metric: ratio}."""
    _console().print(_ratio_table(ratios))


def _console() -> Console:
    return Console() if sys.stdout.isatty() else Console(width=_WIDTH)


def _ratio_table(ratios: list[Row]) -> Table:
    metrics = [name for name in ratios[0] if name not in ("engine", "to", "cell")]
    names = [METRIC_NAMES.get(metric, metric) for metric in metrics]
    table = _table("ratio (times: below 1 is better; rates: above 1)", "work", "engine", *names)
    for row in ratios:
        values = (_number(row[metric], 3) for metric in metrics)
        table.add_row(row["cell"], f"{row['engine']} / {row['to']}", *values)
    return table


@contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """Yield a function that advances the bar by one and shows a description."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    console = Console(stderr=True)
    hidden = not console.is_terminal
    with Progress(*columns, TimeElapsedColumn(), console=console, disable=hidden) as bar:
        task = bar.add_task("measuring", total=total)
        yield lambda done: bar.update(task, advance=1, description=done)


# -- a table for each benchmark --------------------------------------------------------------------


def _latency_table(rows: list[Row]) -> Table:
    table = _table(
        "latency, ms: median ± half the spread; floor and what % it is",
        "batch", "in", "engine", "TTFT", "floor", "%", "TPOT", "floor", "%", "ITL p50/90/99",
        "device+host", "tokens/s",
    )  # fmt: skip
    for row in rows:
        table.add_row(
            *(str(row[name]) for name in ("batch", "input_len")),
            row["engine"],
            *_measured(row["ttft_ms"], row["ttft_floor_ms"]),
            *_measured(row["tpot_ms"], row.get("tpot_floor_ms")),
            _percentiles(row["itl_ms"]),
            _step(row["step_ms"]),
            _spread(row["output_tokens_per_s"]),
        )
    return table


def _throughput_table(rows: list[Row]) -> Table:
    table = _table(
        "throughput: median ± half the spread; floor and what % it is",
        "engine", "requests", "tokens in", "out", "seconds", "floor", "%", "requests/s",
        "output tokens/s", "all tokens/s",
    )  # fmt: skip
    for row in rows:
        table.add_row(
            row["engine"],
            *(f"{row[name]:,}" for name in ("requests", "input_tokens", "output_tokens")),
            *_measured(row["seconds"], row["floor_s"]),
            _spread(row["requests_per_s"]),
            _spread(row["output_tokens_per_s"]),
            _spread(row["total_tokens_per_s"]),
        )
    return table


def _serve_table(rows: list[Row]) -> Table:
    table = _table(
        "serving, p50/p90/p99: ms, and end to end in s; floor and what % it is",
        "rate", "at once", "done", "TTFT", "TPOT", "floor", "%", "ITL", "end to end", "req/s",
        "tokens/s", "good/s",
    )  # fmt: skip
    for row in rows:
        tpot = row["tpot_ms"]
        _, floor, percent = _measured(tpot and {"median": tpot["p50"]}, row["tpot_floor_ms"])
        failed = f" ({row['failed']} failed)" if row["failed"] else ""
        most = f" of {row['max_concurrency']}" if row["max_concurrency"] else ""
        table.add_row(
            "all" if row["request_rate"] is None else f"{row['request_rate']:g}/s",
            f"{row['mean_concurrency']:.1f}{most}",
            f"{row['completed']}{failed}",
            _percentiles(row["ttft_ms"]),
            _percentiles(tpot),
            floor,
            percent,
            _percentiles(row["itl_ms"]),
            _percentiles(row["e2el_ms"], 1e3),
            _number(row["requests_per_s"]),
            _number(row["output_tokens_per_s"]),
            _number(row["goodput_per_s"]),
        )
    return table


def _startup_table(rows: list[Row]) -> Table:
    """Phases one below the other, as there are more of them than starts."""
    runs = [f"{row['engine']}, {row['start']}" for row in rows]
    table = _table(
        "process start to first token, seconds: median ± half the spread", "phase", *runs
    )
    for phase in rows[0]["phases_s"]:
        table.add_row(phase, *(_number(row["phases_s"].get(phase)) for row in rows))
    cells = [_measured(row["wall_s"], row["floor_s"]) for row in rows]
    for name, index in (("in all", 0), ("floor", 1), ("% of floor", 2)):
        table.add_row(name, *(cell[index] for cell in cells))
    return table


_TABLES: dict[str, Callable[[list[Row]], Table]] = {
    "latency": _latency_table,
    "throughput": _throughput_table,
    "serve": _serve_table,
    "startup": _startup_table,
}


# -- cells -----------------------------------------------------------------------------------------


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.padding = (0, 0)
    for column in columns:
        is_text = column in ("engine", "work", "phase")
        justify: Literal["left", "right"] = "left" if is_text else "right"
        table.add_column(column, justify=justify, no_wrap=is_text, overflow="fold")
    return table


def _measured(
    value: Mapping[str, Any] | None, floor: Mapping[str, Any] | None
) -> tuple[str, str, str]:
    """Three cells: the measurement, the floor, and the percentage of the floor."""
    if value is None:
        return "-", "-", "-"
    if floor is None or floor["floor"] is None:
        return _spread(value), "-", "-"
    percent = "-" if floor["percent"] is None else f"{floor['percent']:.0f}"
    return _spread(value), _number(floor["floor"]), percent + "!" * bool(floor["broken"])


def _spread(value: Mapping[str, Any]) -> str:
    """The median, with half the distance of the extremes as a percentage of the median."""
    shown = _number(value["median"])
    if len(value.get("values", ())) < 2 or not value["median"]:
        return shown
    half = (value["max"] - value["min"]) / 2 / abs(value["median"])
    return f"{shown} ±{half:.0%}"


def _percentiles(value: Mapping[str, float] | None, unit: float = 1.0) -> str:
    """Percentiles in units of `unit`."""
    return "/".join(_number(v / unit).replace(",", "") for v in value.values()) if value else "-"


def _step(value: Mapping[str, float] | None) -> str:
    return f"{_number(value['device'])}+{value['host']:.2f}" if value else "-"


def _number(value: float | None, digits: int = 3) -> str:
    """A number with so many significant digits, and all those before the point."""
    if value is None:
        return "-"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:#.{digits}g}" if value else "0"


def _joined(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _is_broken(row: Row) -> bool:
    return any(isinstance(value, dict) and value.get("broken") for value in row.values())
