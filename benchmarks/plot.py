"""Pictures of reports, one for each benchmark. Floors are dashed, axes show plain numbers.

latency     TPOT over batch size; output tokens/s over TPOT
throughput  output tokens/s of each engine, beside the floor
serve       TTFT and TPOT (p50, up to p99) over load; output tokens/s over load
startup     seconds of each phase, stacked, for each start
compare     ratios, one bar for each cell and metric
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from compiledllm.benchmarks.compare import METRIC_NAMES
from compiledllm.benchmarks.report import Report, Row
from compiledllm.config import ConfigError


def check_plot(path: Path | None, output_len: int = 2) -> None:
    """Raise ConfigError for a plot that cannot be made, before anything is measured."""
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
    name = report.hardware["name"]
    _draw(_DRAWINGS[report.benchmark], report.rows, path, f"{_title(report)}, {name}")


def plot_ratios(ratios: list[Row], path: Path) -> None:
    """Write a plot of ratio rows, as `bench compare` has them."""
    _draw(_ratios, ratios, path, "ratios (times: below 1 is better; rates: above 1)")


def _draw(
    drawing: Callable[[Any, list[Row]], None], rows: list[Row], path: Path, title: str
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(12, 5), layout="constrained")
    try:
        drawing(figure, rows)
        figure.suptitle(title)
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--plot {path} cannot be written: {error}") from None
    finally:
        pyplot.close(figure)


def _title(report: Report) -> str:
    parts = [report.benchmark, report.work.get("model"), report.work.get("dtype")]
    return ", ".join(str(part) for part in parts if part)


# -- a picture for each benchmark ------------------------------------------------------------------


def _latency(figure: Any, rows: list[Row]) -> None:
    left, right = figure.subplots(1, 2)
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
    _label(left, "batch size", "time per output token, ms", log="xy")
    _ticks(left, [row["batch"] for row in rows])
    _label(right, "time per output token, ms", "output tokens/s")


def _throughput(figure: Any, rows: list[Row]) -> None:
    axes = figure.subplots()
    for place, row in enumerate(rows):
        rate = row["output_tokens_per_s"]
        spread = [[rate["median"] - rate["min"]], [rate["max"] - rate["median"]]]
        (bar,) = axes.bar(place, rate["median"], 0.6, yerr=spread, capsize=4)
        axes.bar_label(axes.containers[-1], [f"{rate['median']:,.0f}"], label_type="center")
        if row["floor_s"]["floor"] is not None:
            best = row["output_tokens"] / row["floor_s"]["floor"]
            axes.hlines(
                best, place - 0.4, place + 0.4, "k", "--", label="at the floor" * (place == 0)
            )
    axes.set_xticks(range(len(rows)), [row["engine"] for row in rows])
    _label(axes, "", "output tokens/s")


def _serve(figure: Any, rows: list[Row]) -> None:
    left, middle, right = figure.subplots(1, 3)
    by_rate = len({row["request_rate"] for row in rows}) > 1
    for number, (engine, series) in enumerate(_by_engine(rows).items()):
        loads, color = [_load(row, by_rate) for row in series], f"C{number}"
        for axes, metric in ((left, "ttft_ms"), (middle, "tpot_ms")):
            for share, style in (("p50", "o-"), ("p99", "o:")):
                values = [row[metric] and row[metric][share] for row in series]
                axes.plot(loads, values, style, color=color, label=f"{engine}, {share}")
        rates = [row["output_tokens_per_s"] for row in series]
        right.plot(loads, rates, "o-", color=color, label=engine)
    names = ("time to first token, ms", "time per output token, ms", "output tokens/s")
    for axes, name in zip((left, middle, right), names, strict=True):
        is_time = name.endswith("ms")
        load = "requests/s sent" if by_rate else "requests at once"
        _label(axes, load, name, log="xy" if is_time else "x")
        _ticks(axes, [_load(row, by_rate) for row in rows])


def _by_engine(rows: list[Row]) -> dict[str, list[Row]]:
    series: dict[str, list[Row]] = {}
    for row in rows:
        series.setdefault(row["engine"], []).append(row)
    return series


def _load(row: Row, by_rate: bool) -> float:
    """The load of a row; "all at once" counts as the rate that was reached."""
    if by_rate:
        return float(row["request_rate"] or round(row["requests_per_s"], 1))
    return float(row["max_concurrency"] or round(row["mean_concurrency"], 1))


def _startup(figure: Any, rows: list[Row]) -> None:
    axes = figure.subplots()
    names = [f"{row['engine']}, {row['start']}" for row in rows]
    begin = [0.0] * len(rows)
    for phase in rows[0]["phases_s"]:
        seconds = [row["phases_s"].get(phase) or 0.0 for row in rows]
        axes.barh(names, seconds, 0.6, left=begin, label=phase)
        begin = [a + b for a, b in zip(begin, seconds, strict=True)]
    for place, row in enumerate(rows):
        axes.text(begin[place], place, f" {row['wall_s']['median']:.1f} s", va="center")
    axes.invert_yaxis()
    axes.set_xlim(0, max(begin) * 1.1 or 1)
    _label(axes, "seconds from process start to first token", "")


def _ratios(figure: Any, rows: list[Row]) -> None:
    axes = figure.subplots()
    metrics = [name for name in rows[0] if name not in ("engine", "to", "cell")]
    height = 0.8 / len(metrics)
    for index, metric in enumerate(metrics):
        places = [place + index * height for place in range(len(rows))]
        axes.barh(
            places,
            [row[metric] or 0.0 for row in rows],
            height,
            label=METRIC_NAMES.get(metric, metric),
        )
    middle = (len(metrics) - 1) * height / 2
    axes.set_yticks([place + middle for place in range(len(rows))], [r["cell"] for r in rows])
    axes.axvline(1.0, color="k", linewidth=1, linestyle="--")
    axes.invert_yaxis()
    _label(axes, f"{rows[0]['engine']} / {rows[0]['to']}", "")


_DRAWINGS: dict[str, Callable[[Any, list[Row]], None]] = {
    "latency": _latency,
    "throughput": _throughput,
    "serve": _serve,
    "startup": _startup,
}


# -- series and axes -------------------------------------------------------------------------------


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


def _label(axes: Any, x: str, y: str, log: str = "") -> None:
    """Name the axes and write plain numbers beside them, also on a logarithmic axis."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axes.set(xlabel=x, ylabel=y)
    for name, axis in (("x", axes.xaxis), ("y", axes.yaxis)):
        if name in log:
            getattr(axes, f"set_{name}scale")("log")
            axis.set_minor_formatter(_few_numbers(axis))
            axis.set_major_formatter(FuncFormatter(_plain))
        elif axis.get_major_formatter().__class__.__name__ == "ScalarFormatter":
            axis.set_major_formatter(FuncFormatter(_plain))
            axis.set_minor_formatter(NullFormatter())
    axes.set_axisbelow(True)
    axes.grid(alpha=0.3, which="both" if log else "major")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small")


def _few_numbers(axis: Any) -> Any:
    """Numbers beside the 2s and 5s of a logarithmic axis, where an axis spans few decades."""
    from matplotlib.ticker import FuncFormatter

    low, high = axis.get_view_interval()
    is_short = low > 0 and high / low < 1000
    return FuncFormatter(lambda value, _: _plain(value, 0) if is_short and _leads(value) else "")


def _leads(value: float) -> bool:
    return f"{value:.0e}"[0] in "25"


def _plain(value: float, _: Any) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"


def _ticks(axes: Any, values: Iterable[float]) -> None:
    """Ticks of the x axis at the values that were measured."""
    from matplotlib.ticker import NullLocator

    places = sorted(set(values))
    axes.set_xticks(places, [_plain(value, None) for value in places])
    axes.xaxis.set_minor_locator(NullLocator())
