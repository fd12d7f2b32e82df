"""Plots of a latency report: TPOT over batch size with the floor, and throughput over latency."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from compiledllm.benchmarks.report import Report, Row
from compiledllm.config import ConfigError


def check_plot(path: Path | None, output_len: int) -> None:
    """Raise ConfigError for a plot that cannot be made, before hours of measuring."""
    if path is None:
        return
    if find_spec("matplotlib") is None:
        raise ConfigError(
            "--plot needs matplotlib, which is not installed: pip install 'compiledllm[bench]'"
        )
    if not path.parent.is_dir():
        raise ConfigError(f"--plot {path}: the folder {path.parent} does not exist")
    if output_len < 2:
        raise ConfigError("--plot shows the time per output token: it needs --output-len >= 2")


def plot_report(report: Report, path: Path) -> None:
    """Write the plot; the file's suffix chooses the format, SVG by default."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = report.rows
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 5), layout="constrained")
    for label, series in _series(rows).items():
        batches = [row["batch"] for row in series]
        tpot = [row["tpot_ms"]["median"] for row in series]
        (line,) = left.plot(batches, tpot, marker="o", label=label)
        rates = [row["output_tokens_per_s"]["median"] for row in series]
        right.plot(tpot, rates, marker="o", label=label, color=line.get_color())
    for input_len, series in _floors(rows).items():
        floors = [row["tpot_floor_ms"]["floor"] for row in series]
        label = f"floor, input {input_len}"
        left.plot([row["batch"] for row in series], floors, "k--", linewidth=1, label=label)
    _label(left, "batch size", "time per output token, ms", "log")
    _label(right, "time per output token, ms", "output tokens/s", "linear")
    figure.suptitle(f"{report.work['model']}, {report.work['dtype']}, {report.hardware['name']}")
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--plot {path} cannot be written: {error}") from None
    finally:
        pyplot.close(figure)


def _series(rows: list[Row]) -> dict[str, list[Row]]:
    """Label -> the rows of one engine and input length, ordered by batch size."""
    series: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: (row["input_len"], row["batch"])):
        series.setdefault(f"{row['engine']}, input {row['input_len']}", []).append(row)
    return series


def _floors(rows: list[Row]) -> dict[int, list[Row]]:
    """Input length -> the first engine's rows; floors do not depend on the engine."""
    floors: dict[int, list[Row]] = {}
    first = rows[0]["engine"]
    for row in sorted(rows, key=lambda row: (row["input_len"], row["batch"])):
        if row["engine"] == first and row["tpot_floor_ms"]["floor"] is not None:
            floors.setdefault(row["input_len"], []).append(row)
    return floors


def _label(axes: Any, x: str, y: str, scale: str) -> None:
    axes.set(xlabel=x, ylabel=y, xscale=scale, yscale=scale)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
