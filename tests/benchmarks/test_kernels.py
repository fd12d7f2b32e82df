"""`compiledllm info --kernels`: kernels of a step, sorted into parts with floors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from compiledllm import cli
from compiledllm.benchmarks.floor import Ceilings
from compiledllm.benchmarks.kernels import (
    ATTENTION,
    LAYERS,
    OTHER,
    PRODUCTS,
    Kernel,
    kernels_of,
    parts_of,
)
from compiledllm.benchmarks.profile import Event
from compiledllm.models.registry import load_spec

NAMES = {
    "decode_step": LAYERS,
    "_one_row_kernel": PRODUCTS,
    "_few_rows_kernel": PRODUCTS,
    "quantized_linear": PRODUCTS,
    "warpgroup_linear": PRODUCTS,
    "dense_linear": PRODUCTS,
    "nvjet_tst_64x8_64x16_4x1_v_bz_TNT": PRODUCTS,
    "void gemvNSP_kernel<__nv_bfloat16, float>(int, int)": PRODUCTS,
    "void cutlass::device_kernel<flash::enable_sm90<...>>(...)": ATTENTION,
    "aten::addmm": PRODUCTS,
    "_decode_kernel": ATTENTION,
    "decode_attention": ATTENTION,
    "aten::scaled_dot_product_attention": ATTENTION,
    "_step_kernel": ATTENTION,
    "triton_red_fused_add_mul_rsqrt_0": OTHER,
    "Memcpy DtoH (Device -> Pinned)": OTHER,
}


def test_kernels_are_sorted_into_parts_by_name() -> None:
    found = {name: kernels_of([Event(0, 1, name)], 1)[0].kind for name in NAMES}
    assert found == NAMES


def test_time_during_which_earlier_kernels_run_is_theirs() -> None:
    events = [Event(0, 4, "a"), Event(3, 5, "b<int>(x)"), Event(5, 9, "a"), Event(6, 8, "b<y>()")]
    assert kernels_of(events, 2) == [Kernel("a", OTHER, 1, 4), Kernel("b", OTHER, 1, 0.5)]


def test_parts_of_a_step_add_up_to_its_cost(tiny_llama: Callable[..., Path]) -> None:
    spec = load_spec(tiny_llama()).with_dtypes("float32")
    kernels = [Kernel("_few_rows_kernel", PRODUCTS, 7, 40.0), Kernel("x", OTHER, 1, 3.0)]
    products, attention, other = parts_of(kernels, spec, 4, 100, Ceilings(1e9, 2e9, 1e12))
    assert products.num_bytes == spec.num_bytes(spec.weights_read)
    assert attention.num_bytes == 4 * 100 * 3 * 2 * 2 * 16 * 4  # layers, K and V, heads, dim
    assert products.floor_us == pytest.approx(products.num_bytes / 2e9 * 1e6)
    assert products.share_of_floor == pytest.approx(products.floor_us / 40)
    assert (attention.us, attention.share_of_floor) == (0, None)
    assert (other.us, other.floor_us, other.share_of_floor) == (3, None, None)


def test_a_kernel_of_all_layers_has_their_bytes(tiny_llama: Callable[..., Path]) -> None:
    spec, ceilings = load_spec(tiny_llama()).with_dtypes("float32"), Ceilings(1e9, 2e9, 1e12)
    separate = parts_of([Kernel("_few_rows_kernel", PRODUCTS, 7, 40.0)], spec, 4, 100, ceilings)
    kernels = [Kernel("decode_step", LAYERS, 1, 40.0), Kernel("_few_rows_kernel", PRODUCTS, 1, 5.0)]
    layers, head, other = together = parts_of(kernels, spec, 4, 100, ceilings)
    assert [part.kind for part in together] == [LAYERS, PRODUCTS, OTHER]
    assert (layers.us, head.us, other.us) == (40, 5, 0)
    assert head.num_bytes == 4 * (spec.vocab_size + 1) * spec.hidden_size  # and the final norm
    for total in ("num_bytes", "floor_us"):
        found = sum(getattr(part, total) or 0 for part in together)
        assert found == pytest.approx(sum(getattr(part, total) or 0 for part in separate))


def test_info_measures_decode_steps(
    tiny_llama: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a CPU the operators stand for kernels. No weights are needed."""
    ceilings = Ceilings(1e10, 1e10, 1e11)
    monkeypatch.setattr("compiledllm.benchmarks.kernels.measure_ceilings", lambda *_: ceilings)
    (tmp_path / "config.json").write_bytes((tiny_llama() / "config.json").read_bytes())
    command = ["info", str(tmp_path), "--device", "cpu", "--kernels", "1", "3", "--context-len"]
    assert cli.main([*command, "32", "--json"]) == 0
    one, three = json.loads(capsys.readouterr().out)
    assert (one["rows"], three["rows"], three["bucket"]) == (1, 3, None)
    assert 32 < three["context"] <= 32 + 10
    assert 0 < three["busy_us"] <= three["wall_us"]
    parts = {part["kind"]: part for part in three["parts"]}
    assert parts[PRODUCTS]["us"] > 0 and parts[ATTENTION]["us"] > 0
    assert cli.main([*command, "505"]) == 2
    assert "longer than the context of 512" in capsys.readouterr().err


def test_info_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    from compiledllm.benchmarks.kernels import Part, StepKernels, lines_of

    kernels = [Kernel(f"k{i}", OTHER, 2, 10 - i) for i in range(4)]
    parts = [Part(PRODUCTS, 50.0, 10**6, 40.0), Part(OTHER, 34.0, 0, None)]
    lines = lines_of(StepKernels(8, 8, 1044, 100.0, 90.0, 60.0, parts, kernels), max_kernels=3)
    assert "8 requests, 1044 tokens each (captured for 8): 100 us" in lines[0]
    assert "60%" in lines[0] and "80%" in lines[3]
    assert lines[-2].split() == ["1", "more", "kernels", "7.0", "2.0"]
