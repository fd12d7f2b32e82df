"""`compiledllm bench tilings`, without a GPU: shapes, candidates, tables, and the refusal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from compiledllm import cli
from compiledllm.benchmarks import tilings
from compiledllm.kernels.tables import parse_products
from compiledllm.platform import Platform

PLATFORM = Platform(torch.device("cpu"), "NVIDIA H200", 0)


def test_products_of_models_are_listed_once(tiny_llama: Callable[..., Path]) -> None:
    model = str(tiny_llama())
    shapes = tilings.products_of([model, model])
    assert set(shapes) == {(128, 64), (64, 64), (224, 64), (64, 112)}
    assert len(shapes) == 4  # head and attn.qkv have the same shape


@pytest.mark.parametrize("num_rows", [1, 8, 24])
@pytest.mark.parametrize("num_inputs", [576, 4096, 14336])
def test_candidates_are_tilings_that_a_table_may_hold(num_rows: int, num_inputs: int) -> None:
    found = list(tilings.candidates(num_rows, num_inputs))
    assert 10 < len(found) == len(set(found))
    for fields in found:
        entry = {"rows": num_rows, "outputs": 64, "inputs": num_inputs, "tiling": fields}
        parse_products({"products": [entry]})


def test_only_clear_gains_become_entries() -> None:
    rule, other = (2, 1024, 4, 4), (4, 1024, 4, 4)
    assert tilings.entry_of(1, (64, 128), {rule: 1.0e-6, other: 0.98e-6}, rule) is None
    entry = tilings.entry_of(1, (64, 128), {rule: 1.0e-6, other: 0.9e-6}, rule)
    assert entry is not None and (entry["tiling"], entry["us"]) == (list(other), 0.9)
    entry = tilings.entry_of(1, (64, 128), {other: 0.9e-6}, rule)
    assert entry is not None and entry["rule_us"] is None


def test_a_table_keeps_what_was_not_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "new" / "table.json"
    one, two, new = (
        {"rows": rows, "outputs": 64, "inputs": inputs, "tiling": [1, 64, 4, 4]}
        for rows, inputs in ((1, 100), (8, 100), (24, 50))
    )
    tilings.write_table(path, [one, two], [], PLATFORM)
    tilings.write_table(path, [new], [(1, (64, 100)), (24, (64, 50))], PLATFORM)
    table = json.loads(path.read_text())
    assert table["products"] == [two, new] and table["gpu"] == "NVIDIA H200"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "tilings", "m"]) == 2
    assert "there is none here" in capsys.readouterr().err


def test_rows_beyond_the_kernels_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["bench", "tilings", "m", "--rows", "64"])
    assert "must be at most 32" in capsys.readouterr().err
