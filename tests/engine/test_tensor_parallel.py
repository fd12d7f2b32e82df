"""Tensor parallelism on CPUs: two or four ranks give the logits and the tokens of one process."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed

from compiledllm import (
    ConfigError,
    Engine,
    RequestOutput,
    SamplingParams,
    StructuredOutputsParams,
)
from compiledllm.cli import main
from compiledllm.kernels.attention import make_backend
from compiledllm.models.decoder import Decoder
from compiledllm.models.gguf.convert import convert_gguf
from compiledllm.models.layers.block import DecoderBlock
from compiledllm.models.registry import load_spec
from compiledllm.models.sharded_spec import sharded
from compiledllm.models.weights import load_weights
from tests.models.test_families import logits_in_chunks
from tests.support import ranks as ranks_support
from tests.support.families import DELTA_NET, EXPERTS, IN_ENGINE, SHARED, VARIANTS
from tests.support.gguf_files import write_quantized
from tests.support.greedy import load_reference
from tests.support.quantized import KINDS, save_quantized
from tests.support.ranks import GREEDY, PROMPTS, LastingRanks, lasting_ranks

FIXED = ranks_support.FIXED | {"max_num_batched_tokens": 48}
NUM_BEST = 8
Outputs = list[RequestOutput]


@pytest.fixture(scope="module")
def ranks(request: pytest.FixtureRequest) -> Iterator[LastingRanks]:
    with lasting_ranks(request.param) as found:
        yield found


two = pytest.mark.parametrize("ranks", [2], indirect=True)


def run(model: Path, size: int, params: SamplingParams | None = None, **options: Any) -> Outputs:
    """Outputs of the prompts, by default greedy and with the logits of all prompt tokens."""
    engine = Engine(model, **FIXED | {"tensor_parallel_size": size} | options)
    outputs = engine.generate(
        PROMPTS, params or SamplingParams(**GREEDY, prompt_logprobs=NUM_BEST), use_tqdm=False
    )
    engine.core.scheduler.check_invariants()
    return outputs


def tokens_of(outputs: Outputs) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


def logits_of(outputs: Outputs) -> np.ndarray:
    """The largest log probabilities at all prompt positions but the first."""
    rows = [p for output in outputs for p in (output.prompt_logprobs or []) if p]
    return np.array([sorted(x.logprob for x in row.values())[-NUM_BEST:] for row in rows])


def assert_equal(model: Path, size: int, **options: Any) -> None:
    expected, actual = run(model, 1, **options), run(model, size, **options)
    np.testing.assert_allclose(logits_of(actual), logits_of(expected), atol=2e-4, rtol=1e-4)
    assert tokens_of(actual) == tokens_of(expected)


CHANGES: dict[str, dict[str, Any]] = {
    "qwen3_next": {"linear_num_key_heads": 4},
    "qwen3_5": {"linear_num_key_heads": 4},
    "qwen3_5_moe": {"linear_num_key_heads": 4, "linear_num_value_heads": 8},
}


WHOLE = {"granitemoehybrid"}  # heads of its state spaces share a norm


@pytest.mark.parametrize("family", [family for family in IN_ENGINE if family not in WHOLE])
@two
def test_every_family_gives_the_logits_of_one_process(
    family: str, ranks: LastingRanks, tiny_model: Callable[..., Path]
) -> None:
    check_family(family, 2, tiny_model)


# Families whose parts are divided in all ways: fewer KV heads than ranks, norms over heads,
# experts, states, sums of both halves of a block, a head with padding.
@pytest.mark.parametrize("family", ["falcon", "gemma4", "gpt_oss", "opt", "qwen3_next"])
@pytest.mark.parametrize("ranks", [4], indirect=True)
def test_four_ranks_give_the_logits_of_one_process(
    family: str, ranks: LastingRanks, tiny_model: Callable[..., Path]
) -> None:
    check_family(family, 4, tiny_model)


def check_family(family: str, size: int, tiny_model: Callable[..., Path]) -> None:
    variant = VARIANTS[family, IN_ENGINE[family]] | CHANGES.get(family, {})
    assert_equal(tiny_model(family, **variant), size)


@pytest.mark.parametrize("family", sorted(WHOLE))
def test_families_that_cannot_be_divided_say_so(
    family: str, tiny_model: Callable[..., Path]
) -> None:
    spec = load_spec(tiny_model(family, **VARIANTS[family, IN_ENGINE[family]]))
    with pytest.raises(ConfigError, match=r"Mamba-2 layers of Granite\w+; use one of 1$"):
        sharded(spec, 2)


# -- formats and caches ---------------------------------------------------------------------------

SIZES = {"hidden_size": 256, "intermediate_size": 512}  # a rank's inputs are whole blocks of 128
FORMATS = [kind for kind in KINDS if kind != "gptq permuted"]


@pytest.mark.parametrize("kind", FORMATS)
@two
def test_quantised_checkpoints_are_divided_between_groups(
    kind: str, ranks: LastingRanks, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    packed, _ = save_quantized(tiny_model("llama", num_hidden_layers=1, **SIZES), tmp_path, kind)
    assert_equal(packed, 2)


@pytest.mark.parametrize("method", ["fp8", "fp8_block", "int8", "int4"])
@two
def test_quantising_while_loading_gives_the_codes_of_one_process(
    method: str, ranks: LastingRanks, tiny_model: Callable[..., Path]
) -> None:
    assert_equal(tiny_model("llama", num_hidden_layers=1, **SIZES), 2, quantization=method)


@two
def test_quantised_experts_and_states(
    ranks: LastingRanks, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    sizes = DELTA_NET | EXPERTS | SHARED | {"moe_intermediate_size": 64}
    sizes |= {"shared_expert_intermediate_size": 64}
    config = {"ignore": ["lm_head", "*.gate", "*.shared_expert_gate"]}
    packed, _ = save_quantized(tiny_model("qwen3_5_moe", **sizes), tmp_path, "int8", **config)
    assert_equal(packed, 2)


@pytest.mark.parametrize("mixture", ["Q8_0", "Q4_K", "Q6_K"])
@two
def test_gguf_stays_packed(
    mixture: str, ranks: LastingRanks, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 512, "vocab_size": 288}
    folder = tiny_model("llama", num_hidden_layers=1, **sizes)
    write_quantized(tmp_path / "x.gguf", load_reference(folder), lambda _: mixture)
    convert_gguf(tmp_path / "x.gguf", tmp_path / "out", keep_packed=True)
    assert_equal(tmp_path / "out", 2)


@two
def test_an_fp8_cache_has_the_scales_of_one_process(
    ranks: LastingRanks, tiny_model: Callable[..., Path]
) -> None:
    model = tiny_model("llama", head_dim=32)
    expected, actual = (run(model, size, kv_cache_dtype="fp8") for size in (1, 2))
    np.testing.assert_allclose(logits_of(actual), logits_of(expected), atol=0.2)
    assert tokens_of(actual) == tokens_of(expected)


# -- requests -------------------------------------------------------------------------------------

REQUESTS: dict[str, dict[str, Any]] = {
    "seeds": {"temperature": 1.0, "seed": 7, "top_p": 0.9, "top_k": 20},
    "penalties": {"temperature": 1.0, "seed": 3, "repetition_penalty": 1.3},
    "rules": {"temperature": 0, "logit_bias": {5: 3.0}, "min_tokens": 4, "bad_words": []},
    "logprobs": {"temperature": 0, "logprobs": 5, "logprob_token_ids": [7, 9]},
    "processors": {
        "temperature": 0,
        "logits_processors": [
            lambda ids, x: x.index_fill_(0, torch.tensor(ids[-2:], dtype=torch.int64), -1e9)
        ],
    },
}


@pytest.mark.parametrize("options", [{}, {"async_scheduling": True}])
@pytest.mark.parametrize("name", REQUESTS)
@two
def test_every_rank_draws_the_same_tokens(
    name: str, options: dict[str, Any], ranks: LastingRanks, tiny_model: Callable[..., Path]
) -> None:
    params = SamplingParams(max_tokens=12, ignore_eos=True, **REQUESTS[name])
    expected, actual = (run(tiny_model("llama"), size, params, **options) for size in (1, 2))
    assert tokens_of(actual) == tokens_of(expected)
    if params.logprobs:
        found = [output.outputs[0].logprobs for output in (*actual, *expected)]
        for one, other in zip(found[:3], found[3:], strict=True):
            assert [position.keys() for position in one] == [p.keys() for p in other]


@two
def test_grammars_are_known_to_the_first_rank_alone(
    ranks: LastingRanks, tiny_chat_model: Path
) -> None:
    form = StructuredOutputsParams(choice=["yes", "no, never"])
    params = SamplingParams(temperature=0, max_tokens=20, structured_outputs=form)
    actual = run(tiny_chat_model, 2, params, skip_tokenizer_init=False)
    assert {output.outputs[0].text for output in actual} <= {"yes", "no, never"}


@pytest.mark.parametrize("family", ["llama", "qwen3_next"])
@two
def test_preempted_requests_and_prefix_hits(
    family: str, ranks: LastingRanks, tiny_model: Callable[..., Path]
) -> None:
    model = tiny_model(family, **VARIANTS[family, IN_ENGINE[family]])
    params = SamplingParams(**GREEDY | {"max_tokens": 24})
    found = []
    for size in (1, 2):
        engine = Engine(model, **FIXED | {"tensor_parallel_size": size, "num_kv_blocks": 11})
        first = engine.generate(PROMPTS * 2, params, use_tqdm=False)
        again = engine.generate(PROMPTS, params, use_tqdm=False)
        assert engine.core.scheduler.num_preemptions > 0
        found.append((tokens_of(first), tokens_of(again), again[2].num_cached_tokens))
    assert found[0] == found[1]
    assert found[0][2] or family != "llama"


class Recorded(Exception):
    """The compiler has got a graph, which is all that a test wants."""


@pytest.mark.parametrize(("family", "num_sums"), [("llama", 2), ("cohere", 1), ("opt", 2)])
def test_the_compiler_sees_one_opaque_sum_for_each_half_of_a_block(
    family: str,
    num_sums: int,
    tiny_model: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpoint = tiny_model(family, **VARIANTS[family, IN_ENGINE[family]])
    model = Decoder(sharded(load_spec(checkpoint), 2), make_backend("torch"), rank=1)
    load_weights(model, checkpoint)
    graphs: list[torch.fx.GraphModule] = []

    def record(graph: torch.fx.GraphModule, _inputs: object) -> None:
        graphs.append(graph)
        raise Recorded

    def embed(model: Decoder, ids: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(ids), model.spec.embedding_width)

    monkeypatch.setattr(Decoder, "_embed_over_ranks", embed)
    model.block_forward = torch.compile(DecoderBlock.forward, fullgraph=True, backend=record)
    with pytest.raises(BackendCompilerFailed, match="Recorded"):
        logits_in_chunks(model, [5, 6, 7], [3])
    sums = [node for node in graphs[0].graph.nodes if "all_reduce" in str(node.target)]
    assert len(sums) == num_sums


@pytest.mark.parametrize(
    ("family", "defers"),
    [("llama", True), ("qwen3_moe", True), ("gemma", True), ("qwen3_next", True)]
    + [(family, False) for family in ("gemma2", "cohere", "granite", "opt", "gemma4")],
)
def test_sums_wait_for_the_next_norm_where_only_an_addition_comes_first(
    family: str, defers: bool, tiny_model: Callable[..., Path]
) -> None:
    variant = VARIANTS[family, IN_ENGINE[family]] | CHANGES.get(family, {})
    spec = load_spec(tiny_model(family, **variant))
    assert not spec.defers_sums
    part = sharded(spec, 2)
    assert {layer.defers_sum for layer in part.layers} == {defers}


@two
def test_the_least_room_of_a_rank_counts(
    ranks: LastingRanks, tiny_model: Callable[..., Path]
) -> None:
    model, options = tiny_model("llama"), FIXED | {"num_kv_blocks": None}
    whole = Engine(model, **options, kv_cache_memory_bytes=2**20).core.worker
    part = Engine(model, **options, kv_cache_memory_bytes=2**20, tensor_parallel_size=2).core.worker
    assert part.num_kv_blocks + 1 == 2 * (whole.num_kv_blocks + 1)
    assert part.spec.whole == whole.spec
    assert part.spec.num_parameters < 0.6 * whole.spec.num_parameters


def test_info_tells_what_each_gpu_holds(
    tiny_model: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    found = []
    for size in (1, 4):
        options = ["--device", "cpu", "--json", "--tensor-parallel-size", str(size)]
        assert main(["info", str(tiny_model("llama")), *options]) == 0
        found.append(json.loads(capsys.readouterr().out))
    whole, part = found
    assert part["parameters"] == whole["parameters"] and part["kv_heads"] == 2
    assert part["attention_heads_of_a_gpu"] == 1
    assert part["kv_heads_of_a_gpu"] == "1, each by 2 GPUs"
    assert part["parameters_of_a_gpu"] < 0.4 * whole["parameters"]
    assert part["weight_bytes"] < 0.4 * whole["weight_bytes"]
    assert part["kv_bytes_per_token"] == whole["kv_bytes_per_token"] // 2
    assert main(["info", str(tiny_model("llama")), "--tensor-parallel-size", "3"]) != 0
    assert "use one of 1, 2, 4" in capsys.readouterr().err


# -- what cannot be divided -----------------------------------------------------------------------

REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {"tensor_parallel_size": 3}, r"does not divide 4 \(attention heads\) .* one of 1, 2, 4"),
    (
        {"num_attention_heads": 12, "num_key_value_heads": 4, "hidden_size": 192},
        {"tensor_parallel_size": 3},
        r"does not divide 4 \(KV heads\) .* one of 1, 2, 4$",
    ),
    ({"intermediate_size": 114}, {"tensor_parallel_size": 4}, "114 .intermediate size.*1, 2$"),
    ({}, {"tensor_parallel_size": 0}, "tensor_parallel_size must be an integer >= 1, got 0"),
    ({}, {"tensor_parallel_size": 2, "deterministic": True}, "deterministic=True is not supported"),
    ({}, {"tensor_parallel_size": 2, "device": "cuda:1"}, "names one GPU"),
    (
        {},
        {"tensor_parallel_size": 2, "distributed_executor_backend": "uni"},
        "'uni' is one process",
    ),
    (
        {},
        {"tensor_parallel_size": 2, "model_impl": "transformers"},
        "as transformers runs it; use 1",
    ),
]


@pytest.mark.parametrize(("config", "options", "message"), REFUSED)
def test_sizes_that_do_not_fit_are_refused_with_those_that_do(
    config: dict[str, Any],
    options: dict[str, Any],
    message: str,
    tiny_model: Callable[..., Path],
) -> None:
    with pytest.raises(ConfigError, match=message):
        Engine(tiny_model("llama", **config), **FIXED | options)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("fp8 blocks", "256 inputs of attn.out in groups of 128 .* one of 1, 2$"),
        ("gptq permuted", "reordered groups .desc_act. of .* one of 1$"),
    ],
)
def test_groups_that_would_be_torn_are_refused(
    kind: str, message: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    packed, _ = save_quantized(tiny_model("llama", num_hidden_layers=1, **SIZES), tmp_path, kind)
    with pytest.raises(ConfigError, match=message):
        Engine(packed, **FIXED, tensor_parallel_size=4)
