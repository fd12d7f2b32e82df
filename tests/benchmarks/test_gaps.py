"""The measurement of gaps beside a long prompt, at a tiny size."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from compiledllm.benchmarks import gaps, report

SIZES = {
    "num-streams": 3, "stream-len": 20, "prompt-len": 300, "num-steps-alone": 4, "num-iters": 2,
    "max-num-batched-tokens": 64, "num-kv-blocks": 200,
}  # fmt: skip


def test_streams_have_gaps_with_and_without_a_target(
    tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    file = tmp_path / "gaps.json"
    sizes = [word for name, size in SIZES.items() for word in (f"--{name}", str(size))]
    fixed = ["--device", "cpu", "--dtype", "float32", "--enforce-eager", "--output-json", str(file)]
    gaps.main([str(tiny_llama()), *sizes, *fixed, "--target-itl-ms", "500"])
    report = json.loads(file.read_text(encoding="utf-8"))
    assert report["work"]["prompt_len"] == 300 and report["commit"]
    without, with_target = report["rows"]
    assert without["target_itl_ms"] is without["slowdown"] is None
    assert with_target["target_itl_ms"] == 500 and with_target["slowdown"] > 0
    for row in report["rows"]:
        # 300 tokens are at least five steps of 64; each of three streams has a token of each step.
        assert row["gaps"] >= 2 * 3 * 5 and len(row["prompt_s"]["values"]) == 2
        assert 0 < row["gap_ms"]["p50"] <= row["gap_ms"]["p99"] <= row["gap_ms"]["max"]


def test_figures_of_a_row() -> None:
    found = gaps.Gaps([10.0] * 98 + [25.0, 40.0], [5.0, 6.0], [1.0, 3.0])
    row = found.row(30.0, 30.0, 1.1)
    assert row["gap_ms"] == {"p50": 10.0, "p90": 10.0, "p99": 25.0, "max": 40.0}
    assert row["p99_by_p50"] == 2.5 and row["percent_longer"] == {"than_ms": 30.0, "is": 1.0}
    assert row["prompt_s"]["median"] == 2.0 and row["gap_alone_ms"]["p50"] == pytest.approx(5.0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--stream-len", "512"), "--stream-len 512 is more than max_model_len - 1, 511"),
        (("--num-streams", "99"), "--num-streams 99 is more than max_num_seqs, 64; ask for less"),
        (("--block-size", "7"), "block_size"),
    ],
)
def test_sizes_that_the_engine_cannot_run_end_the_script_with_a_line(
    words: tuple[str, str],
    message: str,
    tiny_llama: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fixed = "--device", "cpu", "--enforce-eager", "--num-kv-blocks", "200"
    monkeypatch.setattr("sys.argv", ["gaps", str(tiny_llama()), *fixed, *words])
    with pytest.raises(SystemExit, match="2"):
        report.run_script(gaps.main)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and message in error
