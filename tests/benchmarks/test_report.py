"""The report: statistics, the JSON's schema, what compares with what, and the tables."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compiledllm.benchmarks.compare import compare_reports, ratios_between_engines
from compiledllm.benchmarks.floor import decode_cost
from compiledllm.benchmarks.model import Model
from compiledllm.benchmarks.plot import plot_ratios, plot_report
from compiledllm.benchmarks.profile import covered
from compiledllm.benchmarks.report import (
    KINDS,
    Report,
    against_floor,
    command_line,
    load_report,
    new_report,
    percentiles,
    spread,
    without_folder,
)
from compiledllm.benchmarks.startup import PHASES
from compiledllm.benchmarks.tables import print_report


def latency_row(engine: str, batch: int, tpot: float) -> dict[str, Any]:
    return {
        "engine": engine,
        "batch": batch,
        "input_len": 128,
        "output_len": 33,
        "ttft_ms": spread([10.0, 12.0, 11.0]),
        "tpot_ms": spread([tpot]),
        "itl_ms": percentiles([tpot]),
        "step_ms": {"host": 0.25, "device": tpot - 0.25},
        "output_tokens_per_s": spread([batch * 1e3 / tpot]),
        "ttft_floor_ms": against_floor(5.5, 11.0),
        "tpot_floor_ms": against_floor(2.0, tpot),
    }


def make_report(*rows: dict[str, Any], **changes: Any) -> Report:
    facts: dict[str, Any] = {
        "benchmark": "latency",
        "work": {"model": "tiny", "dtype": "float32", "output_len": 33, "seed": 1},
        "hardware": {"device": "cpu", "name": "CPU", "cpu": "CPU", "cores": 2},
        "versions": {"python": "3.12.1", "torch": "2.11.0"},
        "commit": "abc1234",
        "command": "compiledllm bench latency",
        "flags": {},
        "ceilings": {"read_bytes_per_s": 3e10, "copy_bytes_per_s": 2e10, "flops_per_s": 1e11},
        "rows": list(rows),
    }
    return Report(**(facts | changes))


def test_statistics() -> None:
    assert spread([3.0, 1.0, 2.5]) == {
        "median": 2.5, "min": 1.0, "max": 3.0, "values": [3.0, 1.0, 2.5],
    }  # fmt: skip
    assert percentiles([float(n) for n in range(100, 0, -1)]) == {"p50": 50, "p90": 90, "p99": 99}
    assert percentiles([7.0]) == {"p50": 7.0, "p90": 7.0, "p99": 7.0}


def test_faster_than_the_floor_is_broken() -> None:
    assert against_floor(5.0, 10.0) == {"floor": 5.0, "percent": 50.0, "broken": False}
    assert against_floor(5.0, 4.0) == {"floor": 5.0, "percent": 125.0, "broken": True}
    assert against_floor(5.0, -1.0) == {"floor": 5.0, "percent": None, "broken": True}
    assert against_floor(None, 4.0) == {"floor": None, "percent": None, "broken": False}


def test_overlapping_intervals_count_once() -> None:
    assert covered([(5, 7), (0, 2), (1, 3), (1.5, 2.5), (9, 9)]) == 5
    assert covered([]) == 0


def test_no_folder_of_this_machine_gets_into_a_report(tmp_path: Path) -> None:
    out = tmp_path / "a.json"
    arguments = ["bench", "latency", "--model", str(tmp_path), "--output-json", str(out)]
    assert command_line(arguments) == (
        f"compiledllm bench latency --model {tmp_path.name} --output-json a.json"
    )
    assert without_folder("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    assert without_folder("http://127.0.0.1:8000") == "http://127.0.0.1:8000"
    report = new_report("latency", {}, {}, {"model": str(tmp_path), "output_len": 5, "plot": None})
    assert report.flags == {"model": tmp_path.name, "output_len": 5}


def test_a_report_survives_its_file(tmp_path: Path) -> None:
    report = make_report(latency_row("compiledllm", 1, 4.0), complete=True)
    report.save(tmp_path / "a.json")
    assert load_report(tmp_path / "a.json") == report
    assert json.loads(report.to_json()) == json.loads((tmp_path / "a.json").read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is not a readable report"),
        ("{", "is not a readable report"),
        ("[]", "its schema is None"),
        ('{"schema": 99}', "its schema is 99"),
        ('{"schema": 1, "benchmark": "latency"}', "missing 6 required"),
    ],
)
def test_what_is_no_report_is_refused(content: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message):
        load_report(path)


def test_unknown_benchmark_is_refused(tmp_path: Path) -> None:
    make_report(benchmark="speed").save(tmp_path / "a.json")
    with pytest.raises(ValueError, match="must be one of .* got 'speed'"):
        load_report(tmp_path / "a.json")


def test_ratios_are_the_first_engines_to_the_others() -> None:
    rows = [latency_row("compiledllm", b, 4.0) for b in (1, 8)]
    rows += [latency_row("vllm", 1, 8.0), latency_row("vllm", 8, 5.0)]
    ratios = ratios_between_engines("latency", rows)
    assert [(r["engine"], r["to"], r["tpot_ms.median"]) for r in ratios] == [
        ("compiledllm", "vllm", 0.5),
        ("compiledllm", "vllm", 0.8),
    ]
    assert [r["output_tokens_per_s.median"] for r in ratios] == [2.0, 1.25]


def test_compare_matches_rows_by_work_and_engine() -> None:
    a = make_report(latency_row("compiledllm", 1, 4.0), latency_row("vllm", 1, 4.0))
    b = make_report(latency_row("compiledllm", 1, 3.0), latency_row("compiledllm", 8, 3.0))
    (ratio,) = compare_reports(a, b)
    assert ratio["tpot_ms.median"] == 0.75 and ratio["cell"].startswith("batch 1,")
    assert compare_reports(make_report(*a.rows[1:]), b)[0]["to"] == "vllm"  # one engine in each


@pytest.mark.parametrize(
    ("part", "change", "named"),
    [
        ("hardware", {"name": "another"}, "hardware: name is CPU in A and another in B"),
        ("hardware", {"cores": 8}, "hardware: cores is 2 in A and 8 in B"),
        ("work", {"model": "big"}, "work: model is tiny in A and big in B"),
        ("work", {"dtype": "bfloat16"}, "work: dtype is float32 in A and bfloat16 in B"),
        ("work", {"seed": 2}, "work: seed is 1 in A and 2 in B"),
    ],
)
def test_compare_refuses_other_hardware_and_other_work(
    part: str, change: dict[str, Any], named: str
) -> None:
    a = make_report(latency_row("compiledllm", 1, 4.0))
    b = copy.deepcopy(a)
    getattr(b, part).update(change)
    with pytest.raises(ValueError, match=f"{named}.*--force"):
        compare_reports(a, b)
    assert compare_reports(a, b, force=True)[0]["tpot_ms.median"] == 1.0


def test_compare_ignores_a_driver_and_refuses_what_has_nothing_in_common() -> None:
    a = make_report(latency_row("compiledllm", 1, 4.0))
    b = make_report(latency_row("compiledllm", 1, 4.0))
    b.hardware["driver"] = "999"
    assert compare_reports(a, b)
    with pytest.raises(ValueError, match="no row in common"):
        compare_reports(a, make_report(latency_row("compiledllm", 64, 4.0)))
    with pytest.raises(ValueError, match="share no figures"):
        compare_reports(a, make_report(benchmark="startup"), force=True)


def test_the_table_shows_floor_percent_and_flags_a_broken_row(
    capsys: pytest.CaptureFixture[str],
) -> None:
    good, broken = latency_row("compiledllm", 1, 4.0), latency_row("vllm", 1, 1.0)
    print_report(make_report(good))
    shown = capsys.readouterr().out
    assert " 50 " in shown and "30.0 GB/s read" in shown and "broken" not in shown
    print_report(make_report(good, broken))
    shown = capsys.readouterr().out
    assert " 200! " in shown and "a broken measurement" in shown


def startup_report() -> Report:
    """One as `bench startup` makes it, with two engines, which no committed result has."""
    rows = [
        {
            "engine": engine,
            "start": start,
            "wall_s": spread([wall, wall + 1]),
            "phases_s": {name: wall / len(PHASES) for name in PHASES},
            "floor_s": against_floor(1.5, wall),
        }
        for engine, start, wall in (("compiledllm", "cold", 31.0), ("vllm", "warm", 40.0))
    ]
    report = make_report(benchmark="startup")
    report.rows = rows
    return report


def reports_of_all_kinds() -> list[Report]:
    folder = Path(__file__).parents[2] / "benchmarks" / "results"
    found = [load_report(path) for path in sorted(folder.glob("*.json"))]
    return [*found, startup_report()]


def test_every_table_fits_120_columns_and_no_cell_is_cut(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for report in reports_of_all_kinds():
        print_report(report)
        shown = capsys.readouterr().out
        assert max(map(len, shown.splitlines())) <= 120 and "…" not in shown
        assert "─" * 30 in shown


@pytest.mark.parametrize("kind", ["latency", "throughput", "serve", "startup"])
def test_every_benchmark_has_a_picture_with_plain_numbers(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report = next(r for r in reports_of_all_kinds() if r.benchmark == kind)
    path = tmp_path / "plot.svg"
    plot_report(report, path)
    text = path.read_text()
    assert "<svg" in text and "mathdefault" not in text  # how powers of ten are written
    if report.ratios:
        plot_ratios(report.ratios, path)
        assert "<!-- TTFT -->" in path.read_text() or kind != "latency"


def test_floors_count_the_caches_bytes(tiny_llama: Callable[..., Path]) -> None:
    options = {"model": str(tiny_llama()), "device": "cpu", "dtype": "bfloat16"}
    plain, fp8 = (
        Model.from_options({**options, "kv_cache_dtype": dtype}, ("compiledllm",)).spec
        for dtype in ("auto", "fp8")
    )
    assert plain is not None and fp8 is not None
    assert decode_cost(plain, 2, 50).kv_bytes == 2 * decode_cost(fp8, 2, 50).kv_bytes > 0


def test_committed_results_are_reports_of_todays_schema() -> None:
    folder = Path(__file__).parents[2] / "benchmarks" / "results"
    reports = [load_report(path) for path in sorted(folder.glob("*.json"))]
    assert reports and all(report.complete and report.rows for report in reports)
    assert {report.benchmark for report in reports} <= set(KINDS)
    for report in reports:
        floors = [v for row in report.rows for v in row.values() if isinstance(v, dict)]
        assert not any(value.get("broken") for value in floors), report.command
