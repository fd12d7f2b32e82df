"""Tables of tilings: where they come from, and what a bad one does."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from compiledllm.kernels import (
    decode_attention_triton,
    launch,
    moe_triton,
    quantized_cuda,
    quantized_experts_cuda,
    skinny_triton,
    tables,
)
from compiledllm.kernels.moe_routing_triton import Routing
from compiledllm.kernels.packed import Layout
from compiledllm.kernels.skinny_triton import Tiling, rule_for, tiling_for

SHIPPED = sorted(Path(tables.__file__).with_name("tilings").glob("*.json"))


@pytest.fixture
def h200(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """As if the current device were an H200. Gives the folder of the machine's own tables."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    monkeypatch.setattr(launch, "max_shared_memory", lambda: 227 * 1024)
    tables.use_folder(tmp_path)
    yield tmp_path
    tables.use_folder(tmp_path / "none")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_tables_are_worth_their_entries(path: Path) -> None:
    table = json.loads(path.read_text(encoding="utf-8"))
    assert tables.file_name(table["gpu"]) == path.name
    assert len(tables.parse_products(table)) == len(table["products"]), "a shape stands twice"
    for entry in table["products"]:
        assert entry["us"] < 0.97 * entry["rule_us"], entry
        rule = rule_for(entry["rows"], entry["outputs"], entry["inputs"])
        fields = [rule.outputs, rule.columns, rule.num_warps, rule.num_stages]
        assert entry["tiling"] != fields, f"the rule has caught up with {entry}"
    quantized, experts = table.get("quantized", []), table.get("experts", [])
    assert len(tables.parse_quantized(table)) == len(quantized)
    assert len(tables.parse_experts(table)) == len(experts)
    for entry in quantized + experts:
        assert entry["rule_us"] is None or entry["us"] < 0.97 * entry["rule_us"], entry


def test_measured_shapes_have_their_tilings_and_others_the_rules(h200: Path) -> None:
    assert tiling_for(1, 2048, 8192) == Tiling(2, 4096, 8) != rule_for(1, 2048, 8192)
    assert tiling_for(1, 2060, 8192) == Tiling(2, 4096, 8)  # hardly more than was measured
    for shape in ((1, 2048, 8193), (17, 2048, 8192), (1, 2080, 8192)):
        assert tiling_for(*shape) == rule_for(*shape)


def test_the_machines_own_table_goes_first(h200: Path) -> None:
    entries = [
        {"rows": 1, "outputs": 2048, "inputs": 8192, "tiling": [8, 64, 1, 4]},
        {"rows": 24, "outputs": 100, "inputs": 200, "tiling": [16, 128, 2, 3]},
    ]
    (h200 / "nvidia-h200.json").write_text(json.dumps({"products": entries}))
    assert tiling_for(1, 2048, 8192) == Tiling(8, 64, 1, 4)
    assert tiling_for(32, 100, 200) == Tiling(16, 128, 2, 3)
    assert tiling_for(1, 1024, 3072) == Tiling(4, 2048, 8, 4)  # as shipped


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"products": [{"rows": 1}]}',
        '{"products": [{"rows": 1, "outputs": 1, "inputs": 1, "tiling": [1, 48, 4, 4]}]}',
        '{"products": [{"rows": 1, "outputs": 1, "inputs": 1, "tiling": [1, 64, 4]}]}',
    ],
)
def test_a_broken_table_is_named_and_left_out(
    text: str, h200: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (h200 / "nvidia-h200.json").write_text(text)
    assert tiling_for(1, 2048, 8192) == Tiling(2, 4096, 8)
    assert "is no table of tilings" in caplog.text and "bench tilings" in caplog.text


def test_without_a_gpu_there_are_only_rules() -> None:
    if not torch.cuda.is_available():
        assert tables.product_tiling(1, 2048, 8192) is None


@pytest.mark.parametrize("kib", [99, 163, 227])
def test_tiles_fit_in_the_gpus_shared_memory(kib: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "max_shared_memory", lambda: kib * 1024)
    for num_rows in (8, 24):
        for shape in ((4096, 14336), (4096, 4096), (28672, 4096), (576, 576)):
            t = tiling_for(num_rows, *shape)
            rows = skinny_triton.multiplied_rows(num_rows)
            assert (
                t.num_stages >= 1
                and 2 * t.columns * (t.outputs + rows) * t.num_stages <= kib * 1024
            )
    attention: Any = decode_attention_triton
    for head_dim in (64, 128, 256):
        for num_programs in (1, 64, 4096):
            t = attention.decode_tiling(head_dim, 4, torch.bfloat16, num_programs)
            assert 4 * t.keys * head_dim * t.num_stages <= kib * 1024


def test_the_choice_of_attention_tiles_follows_the_number_of_multiprocessors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same load of each multiprocessor gives the same tiles."""
    module: Any = decode_attention_triton
    found = []
    for num_sms in (66, 132):
        monkeypatch.setattr(module, "num_multiprocessors", lambda n=num_sms: n)
        loads = [num_sms * share // 8 for share in (1, 3, 8, 31, 33, 65)]
        tilings = [module.decode_tiling(64, 4, torch.bfloat16, n) for n in loads]
        found.append((tilings, [module._even_splits_per_sm(64, n) for n in loads]))
    assert found[0] == found[1]
    assert len(set(found[0][0])) == 3 and len(set(found[0][1])) == 3


def test_rows_share_the_tiling_of_the_product_they_are_padded_to() -> None:
    assert [tables.padded_rows(n) for n in (1, 2, 16, 17, 32)] == [1, 16, 16, 32, 32]
    assert skinny_triton.MAX_SKINNY_ROWS == 32


def test_the_machines_own_table_decides_which_compiled_code_fits(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from compiledllm.runner.artifact_key import own_tilings_digest

    monkeypatch.setenv("COMPILEDLLM_CACHE_DIR", str(tmp_path))
    assert own_tilings_digest("NVIDIA H200") == "none"
    path = tmp_path / "tilings" / tables.file_name("NVIDIA H200")
    path.parent.mkdir()
    digests = set()
    for text in ("{}", "[]"):
        path.write_text(text)
        digests.add(own_tilings_digest("NVIDIA H200"))
    assert len(digests) == 2 and own_tilings_digest("NVIDIA H100") == "none"


def test_measured_quantised_products_have_their_tilings(h200: Path) -> None:
    layout = Layout("int4", 1, "bfloat16", False)
    entry = {"layout": str(layout), "rows": 5, "outputs": 64, "inputs": 256}
    table = {"products": [], "quantized": [entry | {"tiling": [1, 2, 2, 3, 1]}]}
    (h200 / "nvidia-h200.json").write_text(json.dumps(table))
    found = [quantized_cuda.tiling_for(layout, rows, 64, 256) for rows in (2, 8)]
    assert found == [quantized_cuda.Tiling(1, 2, 2, 3, 1)] * 2
    for rows, other in ((1, layout), (9, layout), (8, replace(layout, scale_dtype="float16"))):
        expected = quantized_cuda.rule_for(other, rows, 64, 256)
        assert quantized_cuda.tiling_for(other, rows, 64, 256) == expected
    assert tiling_for(1, 2048, 8192) == Tiling(2, 4096, 8)  # as shipped


def test_measured_products_of_experts_have_their_tilings(h200: Path) -> None:
    """Also with half and twice the number of items, if the blocks have equally many rows."""
    layout, weight = Layout("fp4", 4, "uint8", False), torch.empty(32, 96, 64, dtype=torch.bfloat16)
    sizes = {"experts": 32, "outputs": 96, "inputs": 64, "us": 1.0, "rule_us": 2.0}
    entries = [
        {"weights": tables.SIXTEEN_BITS, "rows": 16, "items": 100, "tiling": [32, 256, 4, 6]},
        {"weights": tables.SIXTEEN_BITS, "rows": 16, "items": 10, "tiling": [64, 64, 4, 3]},
        {"weights": str(layout), "rows": 1, "items": 4, "tiling": [2, 1, 4, 2, 1]},
    ]
    table = {"products": [], "experts": [sizes | entry for entry in entries]}
    (h200 / "nvidia-h200.json").write_text(json.dumps(table))
    for items, expected in ((50, (32, 256, 4, 6)), (128, (32, 256, 4, 6)), (19, (64, 64, 4, 3))):
        t = moe_triton.tiling_for(items, weight)
        assert (t.rows, t.outputs, t.columns, t.num_warps, t.num_stages) == (16, *expected)
    for items, other in ((201, weight), (24, weight), (100, weight.half()[:16]), (4, weight)):
        rule = moe_triton.rule_for(items, len(other), other.dtype)
        assert moe_triton.tiling_for(items, other) == rule
    ids = torch.zeros(4, dtype=torch.int32)
    for items, tiling in ((4, (2, 1, 4, 2, 1)), (8, (2, 1, 4, 2, 1)), (9, None)):
        routing = Routing(ids, None, 1, items, 32, 4)
        found = quantized_experts_cuda.tiling_for(layout, routing, 96, 64)
        rule = quantized_experts_cuda.rule_for("fp4", 1)
        assert found == (quantized_cuda.Tiling(*tiling) if tiling else rule)


@pytest.mark.parametrize("kib", [227, 99], ids=["9.0", "12.0"])
@pytest.mark.parametrize("record_bytes", [0, 1088, 1344, 1664, 1728])
def test_rules_fit_into_the_shared_memory_of_a_block(
    record_bytes: int, kib: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records of 4 bits with few and many scales, and of 6 bits."""
    monkeypatch.setattr(quantized_cuda, "max_shared_memory", lambda: kib * 1024)
    layout = Layout("int6" if record_bytes == 1728 else "int4", 8, "int8", False)
    for rows, outputs, inputs in itertools.product(
        (1, 9, 17, 33), (2048, 8192, 2**15), (4096, 8192)
    ):
        tokens = next(n for n in (8, 16, 32, 64) if rows <= n)
        rule = quantized_cuda.rule_for(layout, rows, outputs, inputs)
        t = rule.fitted(record_bytes, tokens)
        slots = t.row_tiles * t.n_warps * t.k_warps * t.depth * t.chunk
        sums = t.k_warps * tokens * (16 * t.row_tiles * t.n_warps + 4) * 4
        assert slots * record_bytes + sums < kib * 1024
        assert t == rule or record_bytes == 1728 or kib == 99


@pytest.mark.parametrize("tiling", [[1, 1, 4, 1], [1, 8, 8, 1, 1], [0, 1, 4, 1, 1], "text"])
def test_a_quantised_entry_that_no_kernel_takes_is_no_table(tiling: object) -> None:
    entry = {"layout": "x", "rows": 1, "outputs": 1, "inputs": 1, "tiling": tiling}
    with pytest.raises((ValueError, TypeError)):
        tables.parse_quantized({"quantized": [entry]})
    of_experts = entry | {"experts": 2, "items": 2}
    for weights in ("x", tables.SIXTEEN_BITS):
        with pytest.raises((ValueError, TypeError)):
            tables.parse_experts({"experts": [of_experts | {"weights": weights}]})
