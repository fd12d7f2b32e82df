"""Prints reports as tables, and the progress bar of a long run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from compiledllm.benchmarks.report import Report, Row

_WIDTH = 200  # columns where the output is no terminal, so that no cell is cut
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
    table = _table("ratio (times: below 1 is better; rates: above 1)", "work", "engine", *metrics)
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
        "latency, ms: median (lowest-highest)",
        "batch", "input", "output", "engine", "TTFT", "floor", "% of floor", "TPOT", "floor",
        "% of floor", "ITL p50/p90/p99", "step: device + host", "tokens/s",
    )  # fmt: skip
    for row in rows:
        table.add_row(
            *(str(row[name]) for name in ("batch", "input_len", "output_len")),
            row["engine"],
            *_measured(row["ttft_ms"], row["ttft_floor_ms"]),
            *_measured(row["tpot_ms"], row.get("tpot_floor_ms")),
            _percentiles(row["itl_ms"]),
            _step(row["step_ms"]),
            _spread(row["output_tokens_per_s"], 0),
        )
    return table


def _throughput_table(rows: list[Row]) -> Table:
    table = _table(
        "throughput: median (lowest-highest)",
        "engine", "requests", "tokens in", "tokens out", "seconds", "floor", "% of floor",
        "requests/s", "output tokens/s", "total tokens/s",
    )  # fmt: skip
    for row in rows:
        table.add_row(
            row["engine"],
            *(f"{row[name]:,}" for name in ("requests", "input_tokens", "output_tokens")),
            *_measured(row["seconds"], row["floor_s"]),
            _spread(row["requests_per_s"], 2),
            _spread(row["output_tokens_per_s"], 0),
            _spread(row["total_tokens_per_s"], 0),
        )
    return table


def _serve_table(rows: list[Row]) -> Table:
    table = _table(
        "serving, ms: p50/p90/p99",
        "rate", "concurrency", "done", "failed", "TTFT", "TPOT", "floor", "% of floor", "ITL",
        "end to end", "requests/s", "output tokens/s", "good requests/s",
    )  # fmt: skip
    for row in rows:
        tpot = row["tpot_ms"]
        _, floor, percent = _measured(tpot and {"median": tpot["p50"]}, row["tpot_floor_ms"])
        table.add_row(
            "all at once" if row["request_rate"] is None else f"{row['request_rate']:g}/s",
            f"{row['mean_concurrency']:.1f} (most {row['max_concurrency'] or 'any'})",
            str(row["completed"]),
            str(row["failed"]),
            _percentiles(row["ttft_ms"]),
            _percentiles(tpot),
            floor,
            percent,
            _percentiles(row["itl_ms"]),
            _percentiles(row["e2el_ms"]),
            f"{row['requests_per_s']:.2f}",
            f"{row['output_tokens_per_s']:,.0f}",
            _number(row["goodput_per_s"], 2),
        )
    return table


def _startup_table(rows: list[Row]) -> Table:
    phases = list(rows[0]["phases_s"])
    table = _table(
        "process start to first token, seconds: median (lowest-highest)",
        "engine", "start", "wall", *phases, "floor", "% of floor",
    )  # fmt: skip
    for row in rows:
        values = (_number(row["phases_s"].get(phase), 2) for phase in phases)
        wall, floor, percent = _measured(row["wall_s"], row["floor_s"])
        table.add_row(row["engine"], row["start"], wall, *values, floor, percent)
    return table


_TABLES: dict[str, Callable[[list[Row]], Table]] = {
    "latency": _latency_table,
    "throughput": _throughput_table,
    "serve": _serve_table,
    "startup": _startup_table,
}


# -- cells -----------------------------------------------------------------------------------------


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        is_text = column in ("engine", "work", "start")
        table.add_column(column, justify="left" if is_text else "right", no_wrap=is_text)
    return table


def _measured(
    value: Mapping[str, Any] | None, floor: Mapping[str, Any] | None
) -> tuple[str, str, str]:
    """Three cells: the measurement, the floor, and the percentage of the floor."""
    if value is None:
        return "-", "-", "-"
    if floor is None or floor["floor"] is None:
        return _spread(value, 2), "-", "-"
    percent = _number(floor["percent"], 1) + (" !" if floor["broken"] else "")
    return _spread(value, 2), _number(floor["floor"], 2), percent


def _spread(value: Mapping[str, Any], digits: int) -> str:
    shown = _number(value["median"], digits)
    if len(value.get("values", ())) < 2:
        return shown
    return f"{shown} ({_number(value['min'], digits)}-{_number(value['max'], digits)})"


def _percentiles(value: Mapping[str, float] | None) -> str:
    return "/".join(f"{v:.2f}" for v in value.values()) if value else "-"


def _step(value: Mapping[str, float] | None) -> str:
    return f"{value['device']:.2f} + {value['host']:.2f}" if value else "-"


def _number(value: float | None, digits: int) -> str:
    if value is None:
        return "-"
    small = 0 < abs(value) < 10**-digits
    return f"{value:.2g}" if small else f"{value:,.{digits}f}"


def _joined(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _is_broken(row: Row) -> bool:
    return any(isinstance(value, dict) and value.get("broken") for value in row.values())
