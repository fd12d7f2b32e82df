"""Every family and variant against transformers: float32 logits, however the tokens are fed."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compiledllm import cli
from compiledllm.config import ConfigError, EngineConfig
from compiledllm.engine.startup import plan
from compiledllm.kernels.attention import make_backend
from compiledllm.kernels.backend import AttentionMetadata
from compiledllm.kernels.step_inputs import with_empty_row
from compiledllm.models.decoder import Decoder, SampledTokens
from compiledllm.models.registry import load_spec
from compiledllm.models.weights import load_weights
from compiledllm.runner.kv_cache import allocate_kv_caches
from compiledllm.runner.kv_layout import whole_contexts
from compiledllm.runner.state_caches import StateCaches
from tests.support.families import DEFAULT_ROPE, LONGROPE, VARIANTS, YARN
from tests.support.greedy import load_reference

BLOCK_SIZE = 16
NUM_TOKENS = 100  # past windows of 20, and past 64, where long contexts begin


def load(checkpoint: Path) -> Decoder:
    model = Decoder(load_spec(checkpoint), make_backend("torch"))
    load_weights(model, checkpoint)
    return model


class Caches:
    """KV caches and states of a single request, which owns state 0."""

    def __init__(self, model: Decoder, num_blocks: int) -> None:
        self._layout = whole_contexts(model.spec.with_dtypes("float32").layer_caches)
        device = torch.device("cpu")
        self._kv = allocate_kv_caches(self._layout, num_blocks, BLOCK_SIZE, device)
        self._states = StateCaches(self._layout, 1, device)
        for part in itertools.chain(*self._states.tensors):
            part.fill_(float("nan"))  # as left behind by another request

    def per_layer(self, attn: AttentionMetadata) -> tuple[Any, Any]:
        """The cache and the metadata of each layer."""
        states = self._states.metadata(torch.tensor([0]), attn)
        metadata = self._layout.in_layer_order([attn] * len(self._kv), states)
        return self._layout.in_layer_order(self._kv, self._states.tensors), metadata


@torch.inference_mode()
def logits_in_chunks(model: Decoder, token_ids: list[int], chunks: list[int]) -> torch.Tensor:
    """Logits of every token, fed in chunks of these sizes through scattered KV blocks."""
    num_blocks = -(-len(token_ids) // BLOCK_SIZE)
    block_table = torch.randperm(num_blocks, dtype=torch.int32)[None] + 1
    caches = Caches(model, num_blocks)
    outputs, start = [], 0
    for size in chunks:
        positions = torch.arange(start, start + size)
        slots = block_table[0, positions // BLOCK_SIZE].long() * BLOCK_SIZE
        attn = AttentionMetadata(
            slot_mapping=slots + positions % BLOCK_SIZE,
            block_tables=with_empty_row(block_table),
            seq_lens=torch.tensor([start + size, 0], dtype=torch.int32),
            query_start_loc=torch.tensor([0, size, size], dtype=torch.int32),
        )
        ids = torch.tensor(token_ids[start : start + size])
        outputs.append(model.compute_logits(model(ids, positions, *caches.per_layer(attn))))
        start += size
    return torch.cat(outputs)


@torch.inference_mode()
def logits_of_ends(model: Decoder, token_ids: list[int], indices: list[int]) -> torch.Tensor:
    """Logits of some tokens of a prompt that is fed at once."""
    num_tokens, num_blocks = len(token_ids), -(-len(token_ids) // BLOCK_SIZE)
    caches = Caches(model, num_blocks)
    positions, block_table = torch.arange(num_tokens), torch.arange(1, num_blocks + 1).int()[None]
    attn = AttentionMetadata(
        slot_mapping=positions + BLOCK_SIZE,
        block_tables=with_empty_row(block_table),
        seq_lens=torch.tensor([num_tokens, 0], dtype=torch.int32),
        query_start_loc=torch.tensor([0, num_tokens, num_tokens], dtype=torch.int32),
    )
    at = torch.tensor(indices)
    rows = AttentionMetadata(
        slot_mapping=torch.full_like(at, -1),
        block_tables=block_table.repeat(len(indices), 1),
        seq_lens=(at + 1).int(),
        query_start_loc=torch.arange(len(indices) + 1).int(),
    )
    sampled = SampledTokens(at, [rows] * model.num_sampled_layers)
    hidden = model(torch.tensor(token_ids), positions, *caches.per_layer(attn), sampled)
    return model.compute_logits(hidden)


@pytest.mark.parametrize(("family", "variant"), VARIANTS)
def test_logits_equal_transformers(
    family: str, variant: str, tiny_model: Callable[..., Path]
) -> None:
    checkpoint = tiny_model(family, **VARIANTS[family, variant])
    reference = load_reference(checkpoint)
    token_ids = torch.randint(0, 128, (NUM_TOKENS,)).tolist()
    with torch.inference_mode():
        expected = reference(torch.tensor([token_ids])).logits[0]
    model = load(checkpoint)
    # Single tokens from the first one on, past the window's end, and where long contexts begin.
    singles = [*[1] * 24, 34, *[1] * 12, 30]
    for chunks in ([NUM_TOKENS], singles, [7, 1, 64, 1, 1, 26]):
        actual = logits_in_chunks(model, token_ids, chunks)
        torch.testing.assert_close(actual, expected, atol=2e-4, rtol=1e-4)
    if not model.takes_sampled_tokens:
        return
    ends = [0, 70, NUM_TOKENS - 1]
    actual = logits_of_ends(model, token_ids, ends)
    torch.testing.assert_close(actual, expected[ends], atol=2e-4, rtol=1e-4)


def test_longrope_has_short_factors_where_no_request_is_longer(
    tiny_model: Callable[..., Path],
) -> None:
    checkpoint = tiny_model("phi3", **VARIANTS["phi3", "longrope"])
    options = {"device": "cpu", "dtype": "float32", "skip_tokenizer_init": True}
    token_ids = torch.randint(0, 128, (60,)).tolist()
    with torch.inference_mode():
        expected = load_reference(checkpoint)(torch.tensor([token_ids])).logits[0]
    for max_model_len, is_short in ((64, True), (65, False)):
        config = EngineConfig.from_options(model=checkpoint, max_model_len=max_model_len, **options)
        model = Decoder(plan(config).spec, make_backend("torch"))
        load_weights(model, checkpoint)
        actual = logits_in_chunks(model, token_ids, [60])
        assert torch.allclose(actual, expected, atol=2e-4, rtol=1e-4) == is_short


def test_parameter_count_follows_from_the_spec(tiny_model: Callable[..., Path]) -> None:
    for (family, _), changes in VARIANTS.items():
        model = load(tiny_model(family, **changes))
        assert model.spec.num_parameters == sum(p.numel() for p in model.parameters())
        in_layers = (p for p in model.named_parameters() if p[0].startswith("layers."))
        held = Counter((path.split(".", 2)[2], p.numel()) for path, p in in_layers)
        pairs = zip(model.layers, model.spec.layers, strict=True)
        matrices = [
            matrix
            for layer, spec in pairs
            for matrix in spec.weights.matrices
            # A shared expert that is as large as the others is one more of them.
            if not (getattr(layer.mlp, "joins_experts", False) and _is_of_expert(matrix.name))
        ]
        counted = Counter((f"{m.name}.weight", m.num_parameters) for m in matrices)
        assert counted <= held, "matrices are counted under their modules' paths"
        spec = model.spec.with_dtypes("bfloat16")
        wide = sum(m.num_parameters for m in spec.weights.matrices if m.is_float32)
        assert spec.num_bytes(spec.weights) == 2 * (spec.num_parameters + wide)


def _is_of_expert(path: str) -> bool:
    return path.rpartition(".")[2] in ("gate_up", "down")


def test_info_tells_of_every_variant_without_its_weights(
    tiny_model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for (family, variant), changes in VARIANTS.items():
        config = tiny_model(family, **changes) / "config.json"
        (tmp_path / "config.json").write_bytes(config.read_bytes())
        assert cli.main(["info", str(tmp_path), "--json"]) == 0, (family, variant)
        facts = json.loads(capsys.readouterr().out)
        assert facts["run_by"] == "compiledllm"
        assert facts["layers"] == changes.get("num_hidden_layers", 3)
        assert facts["parameters"] == load_spec(tmp_path).num_parameters
        assert facts["kv_bytes_per_token"] > 0 and facts["kv_tokens_that_fit"] > 0
        spec = load_spec(tmp_path)  # in the dtype of the run
        assert facts["state_bytes_per_request"] == spec.bytes_per_request
        assert facts["max_num_seqs"] > 0


EXPERTS_OF_GEMMA = {
    "enable_moe_block": True,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 48,
}
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"hidden_act": "tanh"}, "hidden_act='tanh'"),
    ("llama", {"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}}, "rope_type"),
    ("llama", {"rope_parameters": DEFAULT_ROPE | {"partial_rotary_factor": 0.5}}, "factor=0.5"),
    ("llama", {"rope_parameters": LONGROPE}, "short_factor has 8 numbers and must have 64"),
    ("llama", {"num_key_value_heads": 5}, "num_key_value_heads=5 must divide"),
    ("llama", {"head_dim": 0}, "head_dim must be a number above 0, got 0"),
    ("llama", {"head_dim": None, "hidden_size": 480}, "heads have 15 dimensions"),
    ("llama", {"head_dim": None, "hidden_size": 480, "rope_parameters": YARN}, "have 15 dim"),
    ("llama", {"max_position_embeddings": 0}, "max_position_embeddings must be in"),
    ("llama", {"rope_parameters": DEFAULT_ROPE | {"rope_theta": -1.0}}, "rope_theta must be in"),
    ("llama", {"hidden_act": None}, "'hidden_act' expected str"),
    ("phi", {"rope_parameters": DEFAULT_ROPE | {"partial_rotary_factor": 1.5}}, r"in \(0, 1\]"),
    ("gemma2", {"query_pre_attn_scalar": -4}, "query_pre_attn_scalar must be a number above 0"),
    ("granite", {"logits_scaling": 0.0}, "logits_scaling must be a number above 0, got 0"),
    ("qwen2_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step must be a number above 0"),
    ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers must list a value for each of"),
    ("mistral", {"sliding_window": -1}, "sliding_window=-1"),
    ("mixtral", {"num_experts_per_tok": 9}, r"per token must be in \[1, 8\]"),
    ("glm4_moe", {"n_group": 5}, "n_group=5 must divide"),
    ("glm4_moe", {"n_group": 8, "topk_group": 9}, r"topk_group must be in \[1, 8\]"),
    ("glm4_moe", {"n_group": 32}, "must be in .1, 4., the experts of topk_group groups, got 8"),
    ("glm4_moe", {"scoring_func": "softmax"}, "scoring_func='softmax'"),
    ("minimax_m2", {"scoring_func": "softmax"}, "scoring_func='softmax'"),
    ("hunyuan_v1_dense", {"use_cla": True}, "use_cla=True"),
    ("cohere", {"logit_scale": None}, "logit_scale must be a number"),
    ("cohere", {"layer_norm_eps": None}, "eps of norms must be a number"),
    ("olmo3", {"sliding_window": None}, "sliding_window is None"),
    ("qwen3_next", {"linear_num_value_heads": 24}, "linear_num_key_heads=16 must divide"),
    ("granitemoehybrid", {"mamba_n_groups": 3}, "mamba_n_groups=3 must divide"),
    ("granitemoehybrid", {"position_embedding_type": "alibi"}, "position_embedding_type='alibi'"),
    ("lfm2", {"conv_L_cache": 1, "layer_types": ["conv"] * 32}, "convolution over 1 tokens"),
    ("gemma3_text", {"rope_parameters": YARN}, "rope_parameters has rope_type='yarn'"),
    (
        "gemma3_text",
        {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 8.0}},
        "type='linear' and rope_type='default'",
    ),
    ("gpt_oss", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ("qwen3_5_text", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ("gemma3_text", {"attn_logit_softcapping": 5.0}, "attn_logit_softcapping=5.0"),
    ("gemma3", {"final_logit_softcapping": 5.0}, "final_logit_softcapping=5.0"),
    ("gemma3", {"is_causal": False}, "is_causal=False"),
    ("gemma4_text", EXPERTS_OF_GEMMA | {"hidden_activation": "relu"}, "hidden_activation='relu'"),
    ("ernie4_5_moe", {"moe_norm_min": 0.5}, "moe_norm_min=0.5"),
    ("ernie4_5_moe", {"moe_k": None}, r"per token must be in \[1, 64\], .*, got None"),
    ("qwen2", {"num_attention_heads": 0}, "num_attention_heads must be a number above 0, got 0"),
    ("falcon", {"alibi": True}, "alibi=True"),
    ("falcon", {"new_decoder_architecture": True}, "new_decoder_architecture=True"),
    ("ernie4_5", {"use_bias": True}, "use_bias=True"),
    ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine=False"),
    ("stablelm", {"hidden_act": "tanh"}, "hidden_act='tanh'"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
]


@pytest.mark.parametrize(("family", "changes", "named"), REFUSED)
def test_unknown_variant_refuses_to_load_and_names_the_field(
    family: str, changes: dict[str, Any], named: str, tmp_path: Path
) -> None:
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    AutoConfig.for_model(family).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    content["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]]
    content.get("text_config", content).update(changes)
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=named) as refusal:
        load_spec(tmp_path)
    assert "\n" not in str(refusal.value)
