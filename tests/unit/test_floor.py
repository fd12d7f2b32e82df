"""The floor formulas against numbers worked out by hand from the models' published shapes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from compiledllm.benchmarks.floor import (
    Ceilings,
    decode_cost,
    offline_floor,
    prefill_cost,
    time_per_output_token_floor,
    time_to_first_token_floor,
)
from compiledllm.models.matrices import Formats, QuantSpec
from compiledllm.models.spec import (
    AttentionSpec,
    LayerSpec,
    MlpSpec,
    ModelSpec,
    NormSpec,
    RopeSpec,
)


def llama(
    hidden: int, layers: int, heads: int, kv_heads: int, head_dim: int, mlp: int, vocab: int
) -> ModelSpec:
    attn = AttentionSpec(
        heads, kv_heads, head_dim, head_dim**-0.5, RopeSpec((1.0,) * (head_dim // 2))
    )
    layer = LayerSpec(hidden, attn, MlpSpec(mlp), NormSpec(1e-5))
    return ModelSpec(
        "LlamaForCausalLM", vocab, hidden, (layer,) * layers, NormSpec(1e-5), True, 8192,
        "bfloat16", (2,),
    )  # fmt: skip


# model, parameters read in a step, KV bytes of a token in bfloat16
MODELS = {
    # a layer: 576*576*2 + 576*192*2 + 3*576*1536 + 2*576 = 3,540,096; 30 of them, norm, head
    "SmolLM2-135M": (llama(576, 30, 9, 3, 64, 1536, 49152), 134_515_008, 23_040),
    # a layer: 2048*2048*2 + 2048*512*2 + 3*2048*8192 + 2*2048 = 60,821,504
    "Llama-3.2-1B": (llama(2048, 16, 32, 8, 64, 8192, 128256), 1_235_814_400, 32_768),
    # a layer: 4096*4096*2 + 4096*1024*2 + 3*4096*14336 + 2*4096 = 218,112,000
    "Llama-3.1-8B": (llama(4096, 32, 32, 8, 128, 14336, 128256), 7_504_924_672, 131_072),
}


@pytest.mark.parametrize("name", MODELS)
def test_decode_reads_weights_once_and_every_context(name: str) -> None:
    spec, parameters, kv_bytes = MODELS[name]
    assert spec.weights_read.num_parameters == parameters
    cost = decode_cost(spec, batch=8, context=1024)
    assert cost.weight_bytes == 2 * parameters
    assert cost.kv_bytes == 8 * 1024 * kv_bytes
    attention = 4 * 1024 * spec.attentions[0].q_size * len(spec.layers)
    assert cost.flops == 8 * (2 * parameters + attention)


def test_published_floors_at_3_tb_per_s() -> None:
    """8B at batch 1 and 64, context 1024, on 3.0 TB/s and 790 TFLOP/s: 5.05 and 7.87 ms."""
    spec, h100 = MODELS["Llama-3.1-8B"][0], Ceilings(3.0e12, 3.0e12, 790e12)
    assert decode_cost(spec, 1, 1024).floor_s(h100) * 1e3 == pytest.approx(5.048, abs=0.001)
    assert decode_cost(spec, 64, 1024).floor_s(h100) * 1e3 == pytest.approx(7.866, abs=0.001)
    assert prefill_cost(spec, 1, 128).floor_s(h100) * 1e3 == pytest.approx(5.0, abs=0.05)
    assert prefill_cost(spec, 1, 1024).floor_s(h100) * 1e3 == pytest.approx(18.4, abs=0.1)


def test_the_longer_of_moving_and_computing_is_the_floor() -> None:
    spec = MODELS["SmolLM2-135M"][0]
    cost = decode_cost(spec, 1, 100)
    assert cost.floor_s(Ceilings(1.0, 1.0, 1e30)) == cost.num_bytes
    assert cost.floor_s(Ceilings(1e30, 1e30, 1.0)) == cost.flops


SLOW_MEMORY, SLOW_ARITHMETIC = Ceilings(1.0, 1.0, 1e30), Ceilings(1e30, 1e30, 1.0)


@pytest.mark.parametrize("name", MODELS)
def test_time_per_output_token_follows_the_growing_context(name: str) -> None:
    """3 tokens in, 4 out: the steps after the first token see 4, 5 and 6 tokens, 5 on average."""
    spec, parameters, kv_bytes = MODELS[name]
    floor = time_per_output_token_floor(spec, SLOW_MEMORY, 2, 3, 4)
    assert floor == pytest.approx(2 * parameters + 2 * 5 * kv_bytes)
    attention = sum(4 * 5 * attn.q_size for attn in spec.attentions)
    floor = time_per_output_token_floor(spec, SLOW_ARITHMETIC, 2, 3, 4)
    assert floor == pytest.approx(2 * (2 * parameters + attention))


def with_formats(spec: ModelSpec, formats: Formats) -> ModelSpec:
    return replace(spec, layers=tuple(replace(layer, formats=formats) for layer in spec.layers))


def test_products_of_8_bits_take_half_the_time() -> None:
    spec, parameters, _ = MODELS["Llama-3.1-8B"]
    layer = 218_112_000 - 2 * 4096  # without norms
    others = 2 * (parameters - 32 * layer)
    attention = 4 * 1024 * 4096 * 32
    for code, share in (("fp8", 1), ("int8", 1), ("int4", 2), ("fp4", 2)):
        names = "attn.qkv", "attn.out", "mlp.gate_up", "mlp.down"
        stored = with_formats(spec, tuple((name, QuantSpec(code, 128)) for name in names))
        assert stored.weights_read.num_parameters == parameters
        cost = decode_cost(stored, 1, 1024)
        assert cost.flops == share * 32 * layer + others + attention, code
    fp8 = with_formats(spec, (("mlp.down", QuantSpec("fp8")),))
    saved = prefill_cost(spec, 2, 100).flops - prefill_cost(fp8, 2, 100).flops
    assert saved == 2 * 100 * 32 * 4096 * 14336


@pytest.mark.parametrize("name", MODELS)
def test_offline_floor_reads_weights_for_the_longest_output_only(name: str) -> None:
    """3 in, 3 out and 5 in, 1 out: three steps; the KV of 4 and 5 tokens is read again."""
    spec, parameters, kv_bytes = MODELS[name]
    floor = offline_floor(spec, SLOW_MEMORY, [(3, 3), (5, 1)])
    assert floor == 3 * 2 * parameters + (4 + 5) * kv_bytes
    width = sum(attn.q_size for attn in spec.attentions)
    prompts = prefill_cost(spec, 1, 3).flops + prefill_cost(spec, 1, 5).flops
    floor = offline_floor(spec, SLOW_ARITHMETIC, [(3, 3), (5, 1)])
    assert floor == prompts + 2 * 2 * parameters + 4 * (4 + 5) * width


def test_layers_with_a_window_read_no_more_than_it() -> None:
    """Two layers of one KV head of 4, one of which sees 10 tokens; counted token by token."""
    spec = llama(8, 2, 1, 1, 4, 16, 50)
    windowed = replace(spec.layers[0], mixer=replace(spec.attentions[0], sliding_window=10))
    spec = replace(spec, layers=(windowed, spec.layers[1]))
    assert decode_cost(spec, 3, 8).kv_bytes == 3 * (8 + 8) * 16
    assert decode_cost(spec, 3, 70).kv_bytes == 3 * (10 + 70) * 16
    attention = decode_cost(spec, 1, 70).flops - decode_cost(spec, 1, 0).flops
    assert attention == 4 * (10 + 70) * 4
    prompt = (
        prefill_cost(spec, 1, 70).flops - prefill_cost(llama(8, 2, 1, 1, 4, 16, 50), 1, 70).flops
    )
    assert prompt == -2 * 60**2 * 4  # the triangle of keys that the windowed layer leaves out
    floor = offline_floor(spec, SLOW_MEMORY, [(8, 4)])
    assert floor == 4 * 2 * spec.weights_read.num_parameters + (9 + 10 + 10 + 9 + 10 + 11) * 16


def test_published_floors_of_a_whole_grid_cell() -> None:
    """Llama-3.1-8B, 128 prompts of 1024 tokens, 129 out, at 3.0 TB/s and 790 TFLOP/s."""
    spec, h100 = MODELS["Llama-3.1-8B"][0], Ceilings(3.0e12, 3.0e12, 790e12)
    tpot = time_per_output_token_floor(spec, h100, 128, 1024, 129)
    assert tpot * 1e3 == pytest.approx((15.0098 + 128 * 1088 * 131_072e-9) / 3.0, abs=0.005)
    ttft = time_to_first_token_floor(spec, h100, 128, 1024)
    assert ttft == pytest.approx(128 * (2 * 6.98e9 * 1024 + 2 * 1024**2 * 4096 * 32) / 790e12, 0.01)


def test_the_better_of_two_measurements_is_the_ceiling() -> None:
    assert Ceilings(1.0, 5.0, 3.0).at_least(Ceilings(2.0, 4.0, 3.0)) == Ceilings(2.0, 5.0, 3.0)
    assert Ceilings(1.0, 5.0, 3.0).bytes_per_s == 5.0
