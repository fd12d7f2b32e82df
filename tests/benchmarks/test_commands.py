"""Each `compiledllm bench` sub-command at a tiny size, and what it says to bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from compiledllm import cli
from compiledllm.benchmarks.report import load_report
from compiledllm.benchmarks.startup import PHASES

ENGINES = ["compiledllm", "transformers"]


def bench(*arguments: str) -> int:
    return cli.main(["bench", *arguments])


@pytest.fixture
def tiny(tiny_llama: Callable[..., Path]) -> list[str]:
    """Options of a tiny model on a CPU, uncompiled, for two engines."""
    return [
        "--model",
        str(tiny_llama()),
        "--enforce-eager",
        "--device",
        "cpu",
        "--engine",
        *ENGINES,
    ]


def test_latency(tiny: list[str], tmp_path: Path) -> None:
    out, plot = tmp_path / "a.json", tmp_path / "a.svg"
    grid = ["--batch-size", "1", "2", "--input-len", "5", "17", "--output-len", "4"]
    files = ["--output-json", str(out), "--plot", str(plot)]
    assert bench("latency", *tiny, *grid, "--num-iters", "3", *files) == 0
    report = load_report(out)
    assert report.complete and report.ceilings and report.work["dtype"] == "float32"
    cells = [(row["engine"], row["batch"], row["input_len"]) for row in report.rows]
    assert sorted(cells) == sorted((e, b, n) for e in ENGINES for b in (1, 2) for n in (5, 17))
    for row in report.rows:
        assert len(row["ttft_ms"]["values"]) == len(row["tpot_ms"]["values"]) == 3
        assert row["ttft_floor_ms"]["percent"] > 0 and row["tpot_floor_ms"]["floor"] > 0
        assert set(row["itl_ms"]) == {"p50", "p90", "p99"}
        step = row["step_ms"]
        assert (step is None) == (row["engine"] == "transformers")
        assert step is None or (step["device"] > 0 and step["host"] >= 0)
    assert [(r["engine"], r["to"]) for r in report.ratios] == [tuple(ENGINES)] * 4
    assert plot.read_text().lstrip().startswith("<?xml")


def test_kinds_of_sampling_take_turns_in_one_engine(tiny: list[str], tmp_path: Path) -> None:
    out = tmp_path / "a.json"
    grid = ["--batch-size", "3", "--input-len", "5", "--output-len", "3", "--num-iters", "1"]
    kinds = ["greedy", "temperature", "filtered", "one-penalised", "logprobs"]
    ours = [*tiny[: tiny.index("--engine")], "--engine", "compiledllm"]
    assert bench("latency", *ours, *grid, "--sampling", *kinds, "--output-json", str(out)) == 0
    report = load_report(out)
    assert [row["engine"] for row in report.rows] == [f"compiledllm, {kind}" for kind in kinds]
    assert len(report.ratios) == 4


def test_latency_of_one_token_has_no_time_per_token(
    tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    size = ["--batch-size", "1", "--input-len", "5", "--output-len", "1", "--num-iters", "1"]
    assert bench("latency", *tiny, *size) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])  # one JSON object ends the output
    assert all(row["tpot_ms"] is None and row["itl_ms"] is None for row in report["rows"])


def test_random_weights_need_only_a_config(
    tiny_llama: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_bytes((tiny_llama() / "config.json").read_bytes())
    options = ["--model", str(tmp_path), "--load-format", "dummy", "--device", "cpu"]
    options += ["--enforce-eager"]
    size = ["--batch-size", "2", "--input-len", "5", "--output-len", "3", "--num-iters", "1"]
    assert bench("latency", *options, *size, "--engine", *ENGINES) == 0
    assert len(json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]) == 2


def test_throughput_of_a_mix(tiny: list[str], tmp_path: Path) -> None:
    data, out = tmp_path / "x.jsonl", tmp_path / "b.json"
    lines = [{"prompt_token_ids": [5] * n, "output_len": 1 + n % 4} for n in range(1, 20)]
    data.write_text("\n".join(map(json.dumps, lines)))
    dataset = ["--dataset-name", "file", "--dataset-path", str(data)]
    files = ["--output-json", str(out), "--plot", str(tmp_path / "b.png")]
    assert bench("throughput", *tiny, *dataset, *files) == 0
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
    for row in load_report(out).rows:
        assert (row["requests"], row["input_tokens"]) == (19, sum(range(1, 20)))
        assert row["output_tokens"] == sum(1 + n % 4 for n in range(1, 20))
        rate = row["output_tokens_per_s"]["median"]
        assert rate == pytest.approx(row["output_tokens"] / row["seconds"]["median"])
        assert 0 < row["floor_s"]["percent"] < 100


def test_startup_parts_sum_to_the_wall(tiny: list[str], tmp_path: Path) -> None:
    out = tmp_path / "c.json"
    options = [
        *tiny[:5],
        "--num-iters-cold",
        "1",
        "--num-iters-warm",
        "1",
        "--compile-when",
        "start",
    ]
    files = ["--output-json", str(out), "--plot", str(tmp_path / "c.svg")]
    assert bench("startup", *options, *files) == 0
    assert "first token" in (tmp_path / "c.svg").read_text()
    rows = load_report(out).rows
    assert [row["start"] for row in rows] == ["cold", "warm"]
    for row in rows:
        assert tuple(row["phases_s"]) == PHASES and row["phases_s"]["compile"] > 0
        assert min(row["phases_s"].values()) >= 0
        assert sum(row["phases_s"].values()) == pytest.approx(row["wall_s"]["median"], rel=0.02)
        assert row["phases_s"]["rest"] < 0.05 * row["wall_s"]["median"]


def test_compare(tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--batch-size", "1", "--input-len", "5", "--num-iters", "1"]
    files = [str(tmp_path / name) for name in ("a.json", "b.json")]
    for path, output_len in zip(files, ("3", "4"), strict=True):
        output = ["--output-len", output_len, "--output-json", path]
        assert bench("latency", *tiny[:5], *size, *output) == 0
    capsys.readouterr()
    plot = tmp_path / "c.svg"
    assert bench("compare", files[0], files[0], "--plot", str(plot)) == 0
    assert "1.00" in capsys.readouterr().out and plot.exists()
    assert bench("compare", *files) == 2
    assert "work: output_len is 3 in A and 4 in B" in capsys.readouterr().err
    assert bench("compare", *files, "--force") == 2  # other cells: nothing in common
    assert "no row in common" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["latency", "--model", "/no/such"], "model path does not exist"),
        (["throughput", "--model", "/no/such"], "model path does not exist"),
        (["startup", "--model", "/no/such"], "model path does not exist"),
        (["latency", "--block-size", "24"], "multiple of 16, got 24"),
        (["latency", "--plot", "/no/such/x.svg"], "the folder /no/such does not exist"),
        (["throughput", "--plot", "/no/such/x.svg"], "the folder /no/such does not exist"),
        (["startup", "--plot", "/no/such/x.svg"], "the folder /no/such does not exist"),
        (["serve", "--plot", "/no/such/x.svg"], "the folder /no/such does not exist"),
        (["latency", "--plot", "x.svg", "--output-len", "1"], "it needs --output-len >= 2"),
        (["throughput", "--dataset-name", "file"], "go together"),
        (["startup", "--num-iters-cold", "0", "--num-iters-warm", "0"], "nothing to measure"),
        (["compare", "/no/a.json", "/no/b.json"], "/no/a.json is not a readable report"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(*arguments) == 2
    shown = capsys.readouterr().err
    assert message in shown and shown.startswith("error: ") and shown.count("\n") == 1


def test_a_request_longer_than_the_context_is_refused(
    tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench("latency", *tiny, "--input-len", "5", "--output-len", "600") == 2
    assert "longer than the context of 512" in capsys.readouterr().err


@pytest.mark.parametrize("benchmark", ["latency", "throughput", "startup"])
def test_an_engine_that_is_not_installed_is_refused_before_another_is_loaded(
    benchmark: str,
    tiny: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("compiledllm.benchmarks.run.find_spec", lambda name: name != "vllm" or None)
    assert bench(benchmark, *tiny[:5], "--engine", "compiledllm", "vllm") == 2
    assert (
        capsys.readouterr().err == "error: engine 'vllm' is not installed here: pip install vllm\n"
    )


def test_a_broken_line_of_a_dataset_is_named(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "x.jsonl"
    data.write_text('{"prompt_token_ids": [1]}\n{"prompt_token_ids": [1}\n')
    assert bench("throughput", *tiny, "--dataset-name", "file", "--dataset-path", str(data)) == 2
    assert "x.jsonl, line 2:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value"),
    [("--batch-size", "0"), ("--input-len", "0"), ("--output-len", "-1"), ("--engine", "tgi")],
)
def test_zero_lengths_and_unknown_engines_are_refused_by_the_parser(
    option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        bench("latency", option, value)
    assert exit_.value.code == 2 and f"argument {option}" in capsys.readouterr().err
