"""`compiledllm bench tilings`, without a GPU: shapes, candidates, tables, and the refusal."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compiledllm import cli
from compiledllm.benchmarks import expert_tilings, quantized_tilings, tilings
from compiledllm.benchmarks.cli import QUANTIZED_FORMATS
from compiledllm.kernels import dense_linear_cuda
from compiledllm.kernels.packed import Layout
from compiledllm.kernels.quantized_cuda import Tiling
from compiledllm.kernels.tables import (
    SIXTEEN_BITS,
    ExpertProduct,
    parse_experts,
    parse_products,
    parse_quantized,
)
from compiledllm.models.formats.assign import ONLINE
from compiledllm.platform import Platform
from tests.support.cuda_on_cpu import use_cuda_kernels_on_cpu

PLATFORM = Platform(torch.device("cpu"), "NVIDIA H200", 0)


def test_products_of_models_are_listed_once(tiny_llama: Callable[..., Path]) -> None:
    model = str(tiny_llama())
    shapes = (128, 64), (64, 64), (224, 64), (64, 112)  # head and attn.qkv have the same shape
    products = tilings.products_of([model, model], [1, 8, 64])
    assert sorted(products) == sorted(itertools.product((1, 8), shapes))


def test_products_of_another_kernel_are_left_out(
    tiny_llama: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense_linear_cuda, "is_hopper", lambda: True)
    monkeypatch.setattr(dense_linear_cuda, "num_multiprocessors", lambda: 2)
    dense_linear_cuda.tiling_for.cache_clear()
    found = tilings.products_of([str(tiny_llama())], [1, 8])
    dense_linear_cuda.tiling_for.cache_clear()
    assert {num_rows for num_rows, _ in found} == {1}


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
        cli.main(["bench", "tilings", "m", "--rows", "65"])
    assert "must be at most 64" in capsys.readouterr().err


# -- quantised products ----------------------------------------------------------------------------

LAYOUTS = {
    "fp8": Layout("fp8", 0, "float32", False),
    "int4": Layout("int4", 1, "bfloat16", False),
    "Q6_K": Layout("int8", 8, "int8", False, has_factors=True),
}


@pytest.mark.parametrize("num_rows", [1, 8, 16, 64])
@pytest.mark.parametrize("name", LAYOUTS)
def test_candidates_of_quantised_products_may_be_in_a_table(name: str, num_rows: int) -> None:
    layout = LAYOUTS[name]
    found = list(quantized_tilings.candidates(layout, num_rows))
    assert 8 <= len(found) == len(set(found))
    entries = [
        {"layout": str(layout), "rows": num_rows, "outputs": 64, "inputs": 128 * i, "tiling": t}
        for i, t in enumerate(found)
    ]
    parsed = parse_quantized({"products": [], "quantized": entries})
    assert list(parsed.values()) == found


def test_quantised_products_are_those_of_the_kernel(
    tiny_llama: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also the head's. FP8 of more rows goes to the library; GGUF's types have 256 inputs."""
    assert tuple(quantized_tilings.FORMATS) == QUANTIZED_FORMATS
    monkeypatch.setattr(quantized_tilings, "_layout", lambda spec, num_inputs: LAYOUTS["fp8"])
    model = [str(tiny_llama())]
    found = quantized_tilings.products_of(model, ["fp8", "Q6_K"], [1, 16, 64])
    assert {p[1:3] for p in found} == {(128, 64), (64, 64), (224, 64), (64, 112)}
    assert {p.spec.code for p in found} == {"fp8"}
    assert {p.rows for p in found if p.num_outputs % 16 == 0} == {1, 16}
    assert quantized_tilings.products_of(model, [], [1]) == []  # the model's own are 16-bit


def test_a_table_of_quantised_products_keeps_the_others(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    one, two, new = (
        {"layout": "fp8 0 float32 000 1", "rows": rows, "outputs": 64, "inputs": 128}
        | {"tiling": [1, 1, 4, depth, 1], "us": 1.0, "rule_us": 1.5}
        for rows, depth in ((1, 1), (16, 1), (12, 2))
    )
    key = tilings.quantized_key
    tilings.write_table(path, [], [], PLATFORM, {key(one): one, key(two): two})
    tilings.write_table(path, [], [], PLATFORM, {key(new): new, ("x", 1, 1, 1): None})
    table = json.loads(path.read_text())
    assert table["quantized"] == [one, new] and table["products"] == []
    tilings.write_table(path, [], [], PLATFORM, {key(one): None, key(new): None})
    assert "quantized" not in json.loads(path.read_text())


def test_every_candidate_is_measured_and_the_best_becomes_an_entry(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the kernels compiled for a CPU; times are made up."""
    use_cuda_kernels_on_cpu(monkeypatch)
    monkeypatch.setattr(quantized_tilings, "_DEVICE", "cpu")
    monkeypatch.setattr(tilings, "num_copies", lambda num_bytes: 1)
    monkeypatch.setattr(quantized_tilings, "compile_in_processes", lambda function, jobs: None)
    fast, slow = (1, 1, 4, 2, 1), (1, 1, 8, 2, 1)
    monkeypatch.setattr(quantized_tilings, "candidates", lambda layout, rows: [slow, fast])

    def seconds(calls: list[Any], device: Any, **how: Any) -> float:
        assert all(call().shape == (3, 32) for call in calls)
        return 1e-6 if calls[0].keywords["tiling"] == Tiling(*fast) else 2e-6

    monkeypatch.setattr(quantized_tilings, "seconds_per_call", seconds)
    quantized_tilings._layout.cache_clear()
    product = quantized_tilings.Product(ONLINE["int4"], 32, 256, 3)
    shown: list[str] = []
    found = quantized_tilings.measure_products([product], shown.append)
    quantized_tilings._layout.cache_clear()
    entry = {"layout": "int4 1 bfloat16 000 1", "rows": 3, "outputs": 32, "inputs": 256}
    entry |= {"tiling": list(fast), "us": 1.0, "rule_us": 2.0}
    assert found == {("int4 1 bfloat16 000 1", 8, 256, 32): entry}
    assert shown == ["3 x 32 x 256 in int4"]


# -- products of experts ---------------------------------------------------------------------------


def test_products_of_experts_are_those_of_the_models_layers(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = [str(tiny_model("mixtral"))]
    monkeypatch.setattr(expert_tilings, "_has_table", lambda product: True)
    found = expert_tilings.products_of(model, [], [1, 8])
    sizes = {(p.num_outputs, p.num_inputs, p.is_first) for p in found}
    (hidden,) = {p.num_inputs for p in found if p.is_first}
    (size,) = {p.num_inputs for p in found if not p.is_first}
    assert sizes == {(2 * size, hidden, True), (hidden, size, False)}
    assert {(p.spec, p.tokens) for p in found} == {(None, 1), (None, 8)} and len(found) == 4
    in_formats = expert_tilings.products_of(model, ["int4", "mxfp4"], [1])
    assert {p.spec for p in in_formats} == {
        quantized_tilings.FORMATS[name] for name in ("int4", "mxfp4")
    }


@pytest.mark.parametrize("rows", [16, 32, 64, 128])
def test_candidates_of_experts_may_be_in_a_table(rows: int) -> None:
    found = list(expert_tilings.candidates(rows))
    assert 6 <= len(found) == len(set(found))
    entries = [
        {"weights": SIXTEEN_BITS, "experts": 8, "rows": rows, "items": i + 1}
        | {"outputs": 64, "inputs": 64, "tiling": fields}
        for i, fields in enumerate(found)
    ]
    assert list(parse_experts({"experts": entries}).values()) == found


def of_experts(format: str | None, is_first: bool, tokens: int) -> expert_tilings.Product:
    spec = quantized_tilings.FORMATS[format] if format else None
    return expert_tilings.Product(spec, 6, 2, 64, 256, is_first, tokens)


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("format", [None, "int4"])
def test_every_tiling_of_experts_gives_the_same_product(
    format: str | None, is_first: bool, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the kernels compiled for a CPU, or in Triton's interpreter; times are made up."""
    use_cuda_kernels_on_cpu(monkeypatch)
    for module in (expert_tilings, quantized_tilings):
        monkeypatch.setattr(module, "_DEVICE", "cpu")
    monkeypatch.setattr(expert_tilings, "num_copies", lambda num_bytes: 2)
    monkeypatch.setattr(
        expert_tilings, "compile_in_processes", lambda function, jobs: function(jobs[:1])
    )
    fast, slow = ((1, 1, 2, 2, 1), (1, 1, 4, 2, 1)) if format else ((32, 64, 4, 3), (64, 32, 4, 2))
    for name in ("candidates", "candidates_of_codes"):
        monkeypatch.setattr(expert_tilings, name, lambda *_: [slow, fast])
    results = list[list[torch.Tensor]]()  # of the rule, slow, fast, and again rule, fast, others

    def seconds(calls: list[Any], device: Any, **how: Any) -> float:
        results.append([call().float().clone() for call in calls])
        return 1e-6 if len(results) in (3, 5) else 2e-6

    monkeypatch.setattr(expert_tilings, "seconds_per_call", seconds)
    product = of_experts(format, is_first, tokens)
    shown: list[str] = []
    ((key, entry),) = expert_tilings.measure_products([product], shown.append).items()
    assert len(results) == 6 and entry is not None
    assert (entry["tiling"], entry["us"], entry["rule_us"]) == (list(fast), 1.0, 2.0)
    name = "int4 1 bfloat16 000 1" if format else SIXTEEN_BITS
    rows = (1 if tokens == 1 else 8) if format else 16
    assert key == ExpertProduct(name, 6, rows, 64, 256, 2 * tokens)
    assert parse_experts({"experts": [entry]}) == {key: fast}
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], atol=1e-3, rtol=0.01)


def test_a_tokens_experts_are_others_than_those_of_the_call_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(expert_tilings, "_DEVICE", "cpu")
    calls = [set(ids[0].tolist()) for ids in expert_tilings._choices(of_experts(None, True, 1))]
    assert all(len(experts) == 2 for experts in calls) and len(calls) > 3
    assert not any(before & after for before, after in itertools.pairwise(calls))
