"""GGUF files whose matrices stay packed: each architecture, with the weights it stands for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from compiledllm import ConfigError, Engine, SamplingParams, cli
from compiledllm.kernels.attention import make_backend
from compiledllm.models.decoder import Decoder
from compiledllm.models.formats.gguf_blocks import KINDS
from compiledllm.models.layers.linear import Linear
from compiledllm.models.registry import load_spec
from compiledllm.models.weights import load_weights
from tests.models.test_families import logits_in_chunks, logits_of_ends
from tests.support.greedy import load_reference

gguf = pytest.importorskip("gguf")
convert = pytest.importorskip("compiledllm.models.gguf.convert")
support = pytest.importorskip("tests.support.gguf_files")

NUM_TOKENS = 40
SIZES = {
    "vocab_size": 288,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "max_position_embeddings": 16384,
    "pad_token_id": None,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + i / 8 for i in range(24)],
    "long_factor": [1.0 + i / 2 for i in range(24)],
    "original_max_position_embeddings": 16,
}


TIED = {"tie_word_embeddings": True}


def yarn(architecture: str) -> Callable[[Any], None]:
    def edit(writer: Any) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(64)

    return edit


def window(writer: Any) -> None:
    writer.add_sliding_window(20)


def phi(writer: Any) -> None:
    window(writer)
    writer.kv_data[0].pop("phi3.rope.dimension_count")
    writer.add_rope_dimension_count(48)
    for name in ("long", "short"):
        factors = np.array(LONGROPE[f"{name}_factor"], dtype=np.float32)
        writer.add_tensor(f"rope_factors_{name}.weight", factors)
    writer.add_rope_scaling_orig_ctx_len(16)


def theta(rope: dict[str, Any]) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 10000.0, **rope}}


Case = tuple[str, dict[str, Any], Callable[[Any], None]]
MODELS: dict[str, Case] = {
    "llama": ("llama", {}, lambda writer: None),
    "llama, biased": ("llama", {"attention_bias": True} | theta(YARN), yarn("llama")),
    "mistral": ("mistral", {"sliding_window": 20}, window),
    "qwen2": ("qwen2", theta(YARN), yarn("qwen2")),
    "qwen2, tied": ("qwen2", TIED, lambda writer: None),
    "qwen3": ("qwen3", {"head_dim": 128}, lambda writer: None),
    "gemma3": (
        "gemma3_text",
        {"head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 20, **TIED},
        window,
    ),
    "phi3": ("phi3", {"sliding_window": 20}, window),
    "phi3, longrope": (
        "phi3",
        {
            "sliding_window": 20,
            "partial_rotary_factor": 0.75,
            "original_max_position_embeddings": 16,
            **theta(LONGROPE),
        },
        phi,
    ),
}
# Of llama.cpp's mixtures: part of a matrix's name -> type; "": all others.
Q4_K_M = {"v_proj": "Q6_K", "qkv_proj": "Q5_K", "lm_head": "Q6_K", "": "Q4_K"}
MIXTURES = {
    "Q4_K_M": {"embed": "Q6_K"} | Q4_K_M,
    "Q5_0": {"embed": "Q8_0", "k_proj": "Q5_1", "down": "Q4_1", "up_proj": "Q4_0", "": "Q5_0"},
}


def kind_of(mixture: str) -> Callable[[str], str]:
    def choose(name: str) -> str:
        return next(kind for part, kind in MIXTURES[mixture].items() if part in name)

    return choose


def load(checkpoint: Path) -> Decoder:
    model = Decoder(load_spec(checkpoint), make_backend("torch"))
    load_weights(model, checkpoint)
    return model


def reference_of(folder: Path, state: dict[str, Tensor]) -> Any:
    """transformers' model in float32."""
    model = load_reference(folder)
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_transformers_on_the_dequantised_weights(
    name: str, mixture: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    family, changes, edit = MODELS[name]
    folder, path = tiny_model(family, **SIZES | changes), tmp_path / "x.gguf"
    state = support.write_quantized(path, load_reference(folder), kind_of(mixture), edit=edit)
    convert.convert_gguf(path, tmp_path / "out", keep_packed=True)
    model = load(tmp_path / "out")
    assert all(len(layer.formats) == 4 for layer in model.spec.layers)
    _assert_bits(model, state, family == "phi3")
    token_ids = torch.randint(0, 264, (NUM_TOKENS,)).tolist()
    with torch.inference_mode():
        expected = reference_of(folder, state)(torch.tensor([token_ids])).logits[0]
    actual = logits_in_chunks(model, token_ids, [NUM_TOKENS - 1, 1])
    torch.testing.assert_close(actual, expected, atol=5e-4, rtol=2e-4)
    ends = [0, 17, NUM_TOKENS - 1]
    actual = logits_of_ends(model, token_ids, ends)
    torch.testing.assert_close(actual, expected[ends], atol=5e-4, rtol=2e-4)


def _assert_bits(model: Decoder, state: dict[str, Tensor], is_fused: bool) -> None:
    """The product with the unit matrix is the matrix, to the bit."""
    for index, layer in enumerate(model.layers):
        attn, mlp = layer.attn, layer.mlp
        qkv = ("qkv_proj",) if is_fused else ("q_proj", "k_proj", "v_proj")
        gate_up = ("gate_up_proj",) if is_fused else ("gate_proj", "up_proj")
        for place, linear, names in (
            ("self_attn", attn.qkv, qkv),
            ("self_attn", attn.out, ("o_proj",)),
            ("mlp", mlp.gate_up, gate_up),
            ("mlp", mlp.down, ("down_proj",)),
        ):
            parts = [state[f"model.layers.{index}.{place}.{name}.weight"] for name in names]
            assert torch.equal(_matrix(linear), torch.cat(parts)), (index, names)
    embedding = state["model.embed_tokens.weight"]
    assert torch.equal(model.embedding(torch.arange(len(embedding))), embedding)
    head = embedding if model.lm_head.is_tied else state["lm_head.weight"]
    assert torch.equal(_matrix(model.lm_head), head)


def _matrix(linear: Linear) -> Tensor:
    unit = torch.eye(linear.in_features)
    return linear.format.product(unit, linear.params, None).T


def test_compiler_traces_the_products_of_a_mixed_matrix_whole(
    some_gguf: tuple[Path, dict[str, Tensor]],
) -> None:
    path, _ = some_gguf
    convert.convert_gguf(path, path.with_suffix(""), keep_packed=True)
    qkv = load(path.with_suffix("")).layers[0].attn.qkv
    compiled = torch.compile(qkv, fullgraph=True, backend="aot_eager", dynamic=True)
    x = torch.randn(3, 256)
    for first_row in (0, 256, 300, 400, 448):
        y = compiled(x, first_row)
        assert torch.equal(y, qkv(x, first_row))
        assert torch.allclose(y, qkv(x)[:, first_row:], atol=1e-4)


def iq4_nl(num_rows: int, num_columns: int) -> np.ndarray:
    """Random blocks of a type that is not kept packed: a float16 scale, then 16 bytes of codes."""
    blocks = np.random.default_rng(0).integers(0, 256, (num_rows, num_columns // 32, 18), "u1")
    blocks[..., :2] = np.full((1,), 0.001, np.float16).view(np.uint8)
    return blocks.reshape(num_rows, -1)


@pytest.fixture(scope="module")
def tiny(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("llama", **SIZES)


@pytest.fixture
def some_gguf(tiny: Path, tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    path = tmp_path / "some.gguf"
    return path, support.write_quantized(path, load_reference(tiny), kind_of("Q4_K_M"))


def test_types_that_cannot_stay_packed_are_dequantised_and_counted(
    tiny: Path, tmp_path: Path
) -> None:
    """One matrix of a fused one, so that a part of 16 bits is beside packed ones."""
    model, path = load_reference(tiny), tmp_path / "x.gguf"
    blocks = iq4_nl(128, 256)

    def edit(writer: Any) -> None:
        kind = gguf.GGMLQuantizationType.IQ4_NL
        writer.add_tensor("blk.1.attn_v.weight", blocks, raw_dtype=kind)

    name = "model.layers.1.self_attn.v_proj.weight"
    state = support.write_quantized(
        path, model, kind_of("Q4_K_M"), edit=edit, left_out=("blk.1.attn_v.weight",)
    )
    values = gguf.dequantize(blocks, gguf.GGMLQuantizationType.IQ4_NL)
    state[name] = torch.from_numpy(values).bfloat16().float()
    convert.convert_gguf(path, tmp_path / "out", keep_packed=True)
    found = load(tmp_path / "out")
    assert found.spec.quantization == (
        "gguf Q4_K x 12, Q6_K x 3; dequantised to 16 bits: IQ4_NL x 1 (0.1 MiB)"
    )
    _assert_bits(found, state, is_fused=False)
    num_bytes = sum(p.numel() * p.itemsize for p in found.parameters())
    spec = found.spec.with_dtypes("float32")
    assert num_bytes == spec.num_bytes(spec.weights)


def test_engine_goes_on_as_transformers_does_with_the_dequantised_weights(
    some_gguf: tuple[Path, dict[str, Tensor]],
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COMPILEDLLM_CACHE_DIR", str(tmp_path))
    path, state = some_gguf
    reference = reference_of(tiny, state)
    options = {"dtype": "float32", "device": "cpu", "enforce_eager": True, "num_kv_blocks": 20}
    engine = Engine(path, **options)
    prompts = [[5, 80, 99, 260, 7], [200, 31, 4, 17]]
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    for output in engine.generate(prompts, params, use_tqdm=False):
        tokens = list(output.outputs[0].token_ids)
        ids = torch.tensor([[*output.prompt_token_ids, *tokens]])
        with torch.inference_mode():
            logits = reference(ids).logits[0, -9:-1]
        assert tokens == logits.argmax(-1).tolist()
    assert cli.main(["info", str(path), "--json", "--device", "cpu"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["quantization"] == "gguf Q4_K x 12, Q6_K x 4"
    assert facts["weight_bytes"] < 0.5 * 2 * facts["parameters"]
    with pytest.raises(ConfigError, match="quantization='int8' quantises 16-bit .*gguf Q4_K x 12"):
        Engine(path, quantization="int8", **options)
    as_16_bits = Engine(path, model_impl="transformers", **options)
    assert as_16_bits.core.worker.spec.implementation == "transformers"


def test_only_dequantised_types_are_no_reason_to_quantise_again(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder, path = tiny_model("llama", **SIZES | {"num_hidden_layers": 1}), tmp_path / "x.gguf"
    tensors = support.gguf_tensors(load_reference(folder))
    kinds = {name: "IQ4_NL" for name, values in tensors.items() if values.ndim == 2}
    blocks = {name: iq4_nl(*tensors[name].shape) for name in kinds}
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_layers": 1, "head_dim": 64}
    support.write_gguf(path, tensors | blocks, kinds=kinds, **sizes)
    convert.convert_gguf(path, tmp_path / "out", keep_packed=True)
    spec = load_spec(tmp_path / "out")
    assert spec.quantization.startswith("gguf without packed matrices; dequantised")
    assert not spec.is_quantized
    with pytest.raises(ConfigError, match="quantised already"):
        load_spec(tmp_path / "out", quantization="fp8")


@pytest.mark.parametrize(
    ("tensor", "kind", "start", "field"),
    [("blk.1.attn_q", "Q4_K", 2, "dmin"), ("output", "Q6_K", 208, "d")],
)
def test_a_scale_that_is_no_number_is_named(
    some_gguf: tuple[Path, dict[str, Tensor]], tensor: str, kind: str, start: int, field: str
) -> None:
    path, _ = some_gguf
    file, content = convert.read_gguf(path), bytearray(path.read_bytes())
    place = file.tensors[f"{tensor}.weight"]
    at = len(content) - len(file.data) + place.offset + 3 * KINDS[kind].num_bytes + start
    content[at : at + 2] = np.array([np.inf], np.float16).tobytes()
    path.write_bytes(content)
    with pytest.raises(
        ConfigError, match=f"tensor '{tensor}.weight': field '{field}' of {kind}"
    ) as e:
        convert.convert_gguf(path, path.with_suffix(""), keep_packed=True)
    assert "\n" not in str(e.value)


def test_unknown_types_and_wrong_blocks_of_a_conversion_are_named(
    some_gguf: tuple[Path, dict[str, Tensor]],
) -> None:
    path, _ = some_gguf
    folder = path.with_suffix("")
    convert.convert_gguf(path, folder, keep_packed=True)
    config = json.loads((folder / "config.json").read_text())
    name = "model.layers.0.mlp.down_proj"
    for kind, match in (
        ("Q9_K", rf"quantization_config.kinds: {name}='Q9_K' is not supported \(supported: Q4_0"),
        ("Q8_0", f"matrix '{name}': data has rows of 288 bytes, expected whole Q8_0 blocks of 34"),
    ):
        config["quantization_config"]["kinds"][name] = kind
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ConfigError, match=match):
            load(folder)


GEMMA4 = {
    "head_dim": 64,
    "global_head_dim": 128,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 20,
    "vocab_size_per_layer_input": 288,
    "hidden_size_per_layer_input": 0,
    "num_global_key_value_heads": 1,
    "final_logit_softcapping": 3.0,
}
GEMMA4_VARIANTS: dict[str, dict[str, Any]] = {
    "keys as values, experts": {
        "attention_k_eq_v": True,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 256,
    },
    "shared": {
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 256,
        "use_double_wide_mlp": True,
    },
}


def gemma4_keys(config: Any) -> Callable[[Any], None]:
    """As llama.cpp's converter writes them."""
    sliding = [kind == "sliding_attention" for kind in config.layer_types]
    first_shared = len(sliding) - config.num_kv_shared_layers

    def edit(writer: Any) -> None:
        for key in ("attention.head_count_kv", "feed_forward_length", "attention.key_length"):
            writer.kv_data[0].pop(f"gemma4.{key}")
        for key in ("attention.value_length", "rope.dimension_count"):
            writer.kv_data[0].pop(f"gemma4.{key}")
        num_kv = 1 if config.attention_k_eq_v else 2
        writer.add_head_count_kv([2 if is_sliding else num_kv for is_sliding in sliding])
        wide = 2 if config.use_double_wide_mlp else 1
        writer.add_feed_forward_length([512 * (wide if i >= first_shared else 1) for i in range(4)])
        writer.add_key_length(128)
        writer.add_value_length(128)
        writer.add_key_length_swa(64)
        writer.add_value_length_swa(64)
        writer.add_rope_dimension_count(128)
        writer.add_rope_dimension_count_swa(64)
        writer.add_sliding_window(20)
        writer.add_sliding_window_pattern(sliding)
        writer.add_shared_kv_layers(config.num_kv_shared_layers)
        writer.add_embedding_length_per_layer_input(config.hidden_size_per_layer_input)
        writer.add_final_logit_softcapping(3.0)
        writer.add_tensor("rope_freqs.weight", np.array([1.0] * 16 + [1e30] * 48, np.float32))
        if config.enable_moe_block:
            writer.add_expert_count(4)
            writer.add_expert_used_count(2)
            writer.add_expert_feed_forward_length(256)
        if first_shared < 4:  # tensors that published checkpoints have, too
            writer.add_tensor("blk.3.attn_k_norm.weight", np.ones(128, np.float32))

    return edit


@pytest.mark.parametrize("variant", GEMMA4_VARIANTS)
def test_gemma4_has_the_logits_of_the_dequantised_weights(
    variant: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    rope = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "proportional", "rope_theta": 10000.0}
        | {"partial_rotary_factor": 0.25},
    }
    changes = SIZES | GEMMA4 | TIED | GEMMA4_VARIANTS[variant] | {"rope_parameters": rope}
    folder, path = tiny_model("gemma4_text", **changes), tmp_path / "x.gguf"
    model = load_reference(folder)
    kinds, edit = kind_of("Q4_K_M"), gemma4_keys(model.config)
    state = support.write_quantized(path, model, kinds, edit=edit, head_dim=64)
    convert.convert_gguf(path, tmp_path / "out", keep_packed=True)
    ours = load(tmp_path / "out")
    token_ids = torch.randint(0, 264, (NUM_TOKENS,)).tolist()
    with torch.inference_mode():
        expected = reference_of(folder, state)(torch.tensor([token_ids])).logits[0]
    actual = logits_in_chunks(ours, token_ids, [NUM_TOKENS - 1, 1])
    torch.testing.assert_close(actual, expected, atol=5e-4, rtol=2e-4)
