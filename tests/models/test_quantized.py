"""Quantised checkpoints: logits equal transformers' on the matrices that the files stand for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from compiledllm import ConfigError, cli
from compiledllm.engine_options import STORED
from compiledllm.kernels.attention import make_backend
from compiledllm.models.decoder import Decoder
from compiledllm.models.formats.codes import QuantizedMatrix, dequantize
from compiledllm.models.formats.methods import METHODS
from compiledllm.models.formats.online import quantize
from compiledllm.models.formats.stored import Fields
from compiledllm.models.formats.weight_format import ShardSlot
from compiledllm.models.registry import load_spec
from compiledllm.models.shards import Ranks
from compiledllm.models.weights import fill_with_random_weights, load_weights
from tests.models.test_families import logits_in_chunks, logits_of_ends
from tests.support.families import (
    DELTA_NET,
    GEMMA3N,
    GEMMA4,
    GEMMA4_DENSE,
    GEMMA4_SHARED,
    GLM4_MOE,
    GLM_MROPE,
    LFM2,
    MAMBA2,
    MROPE,
)
from tests.support.greedy import load_reference
from tests.support.quantized import FLOAT, KINDS, edit_config, is_quantized, save_quantized

NUM_TOKENS = 40
# K in whole groups of 32, and rows in whole blocks of 128 for all parts of fused matrices.
EVEN = {"intermediate_size": 128}
BLOCKS = {"hidden_size": 256, "intermediate_size": 384}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 16}
GLM_EXPERTS = {"n_routed_experts": 4, "moe_intermediate_size": 64, "n_shared_experts": 1}
ERNIE_EXPERTS = {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 64}
TOKEN_INPUTS = {"hidden_size_per_layer_input": 32}
HYBRID = {
    "shared_expert_intermediate_size": 64,  # as large as the other experts
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", EVEN),
    "blocks": ("llama", BLOCKS),
    "tied, biased": ("llama", EVEN | {"tie_word_embeddings": True, "attention_bias": True}),
    "fused": ("phi3", EVEN | {"pad_token_id": 0}),
    "experts": ("qwen3_moe", EXPERTS),
    "shared expert": ("qwen2_moe", EXPERTS | {"shared_expert_intermediate_size": 32}),
    "not gated": ("starcoder2", EVEN),
    "hybrid experts": ("qwen3_5_moe", DELTA_NET | EXPERTS | HYBRID),
    "hybrid": ("qwen3_next", DELTA_NET | EVEN | EXPERTS | HYBRID | {"num_experts": 0}),
    "state spaces": (
        "granitemoehybrid",
        MAMBA2
        | {"num_local_experts": 0}
        | {"layer_types": ["linear_attention", "linear_attention", "full_attention"]},
    ),
    "convolutions": ("lfm2", LFM2 | {"layer_types": ["conv", "conv", "full_attention"]}),
    "gemma 4, shared": ("gemma4_text", GEMMA4 | GEMMA4_SHARED | EVEN | TOKEN_INPUTS),
    "gemma 4, keys as values": ("gemma4", GEMMA4 | GEMMA4_DENSE | EVEN),
    "grouped experts": ("glm4_moe", GLM4_MOE | EVEN | GLM_EXPERTS),
    "sigmoid experts": ("minimax_m2", EVEN | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "biased experts": ("ernie4_5_moe", EVEN | ERNIE_EXPERTS),
    "glm": ("glm4v", EVEN | {"rope_parameters": GLM_MROPE}),
    "text of qwen": ("qwen2_5_vl", EVEN | {"rope_parameters": MROPE}),
    "text of mistral": ("mistral3", EVEN | {"model_type": "ministral3", "head_dim": 16}),
    "streams": ("gemma3n_text", GEMMA3N | {"laurel_rank": 32, "intermediate_size": [128] * 6}),
    "xielu": ("apertus", EVEN | {"dtype": "float32"}),
}
# The families of today: each in a few formats, and each format in a few of them.
OF_TODAY = {
    "gemma 4, shared": ("fp8 of channels", "packed 4 bits", "int8"),
    "gemma 4, keys as values": ("fp8 of tensors", "gptq permuted", "awq"),
    "grouped experts": ("fp8 blocks", "packed 4 bits, asymmetric"),
    "sigmoid experts": ("fp8 of channels", "gptq"),
    "biased experts": ("float blocks", "awq"),
    "glm": ("nvfp4", "gptq v2, asymmetric"),
    "text of qwen": ("awq", "modelopt nvfp4"),
    "text of mistral": ("fp8 of tensors", "packed 4 bits"),
    "streams": ("fp8 of channels", "packed 4 bits"),
    "xielu": ("int8",),
}
CASES = [("llama", kind) for kind in KINDS] + [
    ("blocks", "fp8 blocks"),
    ("blocks", "float blocks"),
    ("blocks", "gptq permuted"),
    ("tied, biased", "awq"),
    ("tied, biased", "fp8 of tensors"),
    ("fused", "fp8 of tensors"),
    ("fused", "fp8 blocks"),
    ("fused", "gptq permuted"),
    ("fused", "nvfp4"),
    ("experts", "fp8 of channels"),
    ("experts", "fp8 blocks"),
    ("experts", "gptq"),
    ("experts", "packed 4 bits, asymmetric"),
    ("experts", "awq"),
    ("experts", "modelopt nvfp4"),
    ("shared expert", "int8"),
    ("not gated", "gptq v2, asymmetric"),
    ("hybrid experts", "fp8 blocks"),
    ("hybrid experts", "int8"),
    ("hybrid", "fp8 of channels"),
    ("convolutions", "fp8 of tensors"),
    ("state spaces", "fp8 of channels"),
    *((name, kind) for name, kinds in OF_TODAY.items() for kind in kinds),
]


def load(checkpoint: Path, quantization: str | None = None) -> Decoder:
    model = Decoder(load_spec(checkpoint, "auto", quantization), make_backend("torch"))
    load_weights(model, checkpoint)
    return model


@pytest.fixture
def checkpoints(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> Callable[..., tuple[Path, Path]]:
    """checkpoints(model, kind, **config) -> quantised, dense."""

    def make(model: str, kind: str, **config: Any) -> tuple[Path, Path]:
        family, changes = MODELS[model]
        skipped = {"modules_to_not_convert": ["mlp.gate", "block_sparse_moe.gate"]}
        skipped["modules_to_not_convert"].append("shared_expert_gate")
        if "experts" in model or "expert" in model:
            config = skipped | {"ignore": ["lm_head", "*.gate", "*.shared_expert_gate"]} | config
        return save_quantized(tiny_model(family, **changes), tmp_path, kind, **config)

    return make


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_logits_equal_transformers_on_the_dequantised_weights(
    name: str, kind: str, checkpoints: Callable[..., tuple[Path, Path]]
) -> None:
    packed, dense = checkpoints(name, kind)
    token_ids = torch.randint(0, 128, (NUM_TOKENS,)).tolist()
    with torch.inference_mode():
        expected = load_reference(dense)(torch.tensor([token_ids])).logits[0]
    model = load(packed)
    for chunks in ([NUM_TOKENS], [1] * NUM_TOKENS):
        actual = logits_in_chunks(model, token_ids, chunks)
        torch.testing.assert_close(actual, expected, atol=2e-4, rtol=1e-4)
    ends = [0, 17, NUM_TOKENS - 1]
    actual = logits_of_ends(model, token_ids, ends)
    torch.testing.assert_close(actual, expected[ends], atol=2e-4, rtol=1e-4)


def test_matrices_stay_quantised_in_memory(checkpoints: Callable[..., tuple[Path, Path]]) -> None:
    model = load(checkpoints("llama", "packed 4 bits")[0])
    params = dict(model.layers[0].attn.qkv.named_parameters())
    assert params["weight"].dtype == torch.int32
    assert params["weight"].shape == (128, 16)  # eight codes a word, inputs padded to 128
    assert params["weight_scale"].shape == (128, 128 // 16)
    assert model.lm_head.params[0].dtype == torch.float32
    assert len(model.spec.distinct_layers) == 1


@pytest.mark.parametrize("method", ["fp8", "fp8_block", "int8", "int4"])
@pytest.mark.parametrize("name", ["llama", "fused", "experts", "hybrid experts"])
def test_quantising_while_loading_is_quantising_each_part(
    method: str, name: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    family, changes = MODELS[name]
    source = tiny_model(family, **changes)
    copy = Path(shutil.copytree(source, tmp_path / "copy"))
    tensors = load_file(source / "model.safetensors")
    for key, tensor in tensors.items():
        is_gate = key.endswith(("in_proj_a.weight", "in_proj_b.weight"))
        if is_quantized(key, tensor) and not is_gate:
            parts = tensor.split([64, 32, 32]) if "qkv_proj" in key else [tensor]
            tensors[key] = torch.cat([dequantize(quantize(part, method)) for part in parts])
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    token_ids = torch.randint(0, 128, (NUM_TOKENS,)).tolist()
    expected = logits_in_chunks(load(copy), token_ids, [NUM_TOKENS])
    actual = logits_in_chunks(load(source, method), token_ids, [NUM_TOKENS])
    torch.testing.assert_close(actual, expected, atol=2e-4, rtol=1e-4)
    plain = logits_in_chunks(load(source), token_ids, [NUM_TOKENS])
    assert not torch.allclose(actual, plain, atol=1e-3)


def test_a_module_is_quantised_or_not_by_the_config(
    checkpoints: Callable[..., tuple[Path, Path]], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Mixed layers: the second is not converted, nor is down_proj of the third."""
    skipped = ["model.layers.1", "layers.2.mlp.down_proj", "lm_head"]

    def choose(name: str, tensor: Tensor) -> bool:
        is_matrix = tensor.dim() == 2 and name.startswith("model.layers.")
        return is_matrix and ".layers.1." not in name and "2.mlp.down_proj" not in name

    for kind, fields in (
        ("fp8 of channels", {"modules_to_not_convert": skipped[:1], "ignored_layers": skipped[1:]}),
        ("int8", {"ignore": skipped, "sparsity_config": {"format": "dense"}}),
    ):
        source = tiny_model("llama", **EVEN)
        packed, dense = save_quantized(source, tmp_path / kind, kind, choose, **fields)
        spec = load_spec(packed)
        assert [len(layer.formats) for layer in spec.layers] == [4, 0, 3]
        with torch.inference_mode():
            expected = load_reference(dense)(torch.tensor([[5, 6, 7]])).logits[0]
        actual = logits_in_chunks(load(packed), [5, 6, 7], [3])
        torch.testing.assert_close(actual, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "kind", "plain"),
    [
        ("llama", "fp8 of channels", "k_proj"),  # the kernel with keys and values only starts in it
        ("tied, biased", "packed 4 bits", "v_proj"),
        ("llama", "gptq permuted", "up_proj"),
        ("llama", "fp8 blocks", "v_proj"),  # of q and k, neither is whole blocks
        ("hybrid", "fp8 of channels", "in_proj_ba"),
        ("hybrid", "packed 4 bits", "in_proj_qkvz"),
    ],
)
def test_parts_of_a_fused_matrix_may_be_quantised_or_not(
    name: str, kind: str, plain: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    def choose(name: str, tensor: Tensor) -> bool:
        is_matrix = tensor.dim() == 2 and name.startswith("model.layers.")
        return is_matrix and plain not in name

    skipped = {"modules_to_not_convert": [plain], "ignore": [f"re:.*{plain}", "lm_head"]}
    skipped["dynamic"] = {f"-:.*{plain}": {}}
    family, changes = MODELS[name]
    packed, dense = save_quantized(tiny_model(family, **changes), tmp_path, kind, choose, **skipped)
    token_ids = torch.randint(0, 128, (NUM_TOKENS,)).tolist()
    with torch.inference_mode():
        expected = load_reference(dense)(torch.tensor([token_ids])).logits[0]
    model = load(packed)
    actual = logits_in_chunks(model, token_ids, [NUM_TOKENS])
    torch.testing.assert_close(actual, expected, atol=2e-4, rtol=1e-4)
    ends = [0, 17, NUM_TOKENS - 1]
    actual = logits_of_ends(model, token_ids, ends)
    torch.testing.assert_close(actual, expected[ends], atol=2e-4, rtol=1e-4)
    num_bytes = sum(p.numel() * p.itemsize for p in model.parameters())
    assert num_bytes == model.spec.num_bytes(model.spec.weights)
    fill_with_random_weights(load(packed), seed=0)


def test_a_target_by_name_comes_before_patterns_and_classes(
    checkpoints: Callable[..., tuple[Path, Path]],
) -> None:
    """The groups' scales are of two dtypes, and the group that counts comes last."""
    packed, dense = checkpoints("llama", "packed 4 bits")
    name = "model.layers.1.mlp.down_proj"
    others, write = KINDS["int8"]
    for folder in (packed, dense):
        path = folder / "model.safetensors"
        tensors = {n: t for n, t in load_file(path).items() if not n.startswith(name)}
        torch.manual_seed(1)
        stored, matrix = write(64, 128)
        stored["weight_scale"] = stored["weight_scale"].half()
        found = stored if folder == packed else {"weight": matrix}
        tensors |= {f"{name}.{field}": tensor for field, tensor in found.items()}
        save_file(tensors, path, metadata={"format": "pt"})
    config, _ = KINDS["packed 4 bits"]
    four_bits = config["config_groups"]["group_0"]
    eight_bits = others["config_groups"]["group_0"] | {"format": "int-quantized"}
    groups = [four_bits, four_bits | {"targets": ["re:.*mlp"]}, eight_bits | {"targets": [name]}]
    edit_config(packed, quantization_config=config | {"config_groups": dict(enumerate(groups))})
    with torch.inference_mode():
        expected = load_reference(dense)(torch.tensor([[5, 6, 7]])).logits[0]
    actual = logits_in_chunks(load(packed), [5, 6, 7], [3])
    torch.testing.assert_close(actual, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("num_bits", [4, 9])
def test_integers_of_a_byte_each_may_have_fewer_bits(
    num_bits: int, checkpoints: Callable[..., tuple[Path, Path]]
) -> None:
    """As in files of W4A8."""
    packed, dense = checkpoints("llama", "int8")
    config, _ = KINDS["int8"]
    group = config["config_groups"]["group_0"]
    groups = {"a": group | {"weights": group["weights"] | {"num_bits": num_bits}}}
    edit_config(packed, quantization_config=config | {"config_groups": groups})
    if num_bits > 8:
        with pytest.raises(ConfigError, match=r"groups.a.weights: num_bits=9 .*supported: 1 to 8"):
            load(packed)
        return
    expected = logits_in_chunks(load(dense), [5, 6, 7], [3])
    actual = logits_in_chunks(load(packed), [5, 6, 7], [3])
    torch.testing.assert_close(actual, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("format", [None, "dense"])
def test_a_group_without_weights_quantises_no_matrix(
    format: str | None, checkpoints: Callable[..., tuple[Path, Path]]
) -> None:
    """As of attention, whose queries a tool has quantised; their scales are not needed."""
    packed, dense = checkpoints("llama", "packed 4 bits")
    config, _ = KINDS["packed 4 bits"]
    attention = {"targets": ["LlamaAttention"], "weights": None, "input_activations": FLOAT}
    groups = config["config_groups"] | {"attention": attention | {"format": format}}
    edit_config(packed, quantization_config=config | {"config_groups": groups})
    path = packed / "model.safetensors"
    scales = {f"model.layers.{i}.self_attn.q_scale": torch.ones(1) for i in range(3)}
    save_file(load_file(path) | scales, path, metadata={"format": "pt"})
    expected = logits_in_chunks(load(dense), [5, 6, 7], [3])
    actual = logits_in_chunks(load(packed), [5, 6, 7], [3])
    torch.testing.assert_close(actual, expected, atol=2e-4, rtol=1e-4)


def test_experts_that_differ_are_refused_by_name(
    checkpoints: Callable[..., tuple[Path, Path]],
) -> None:
    packed, _ = checkpoints("experts", "fp8 of channels")
    skipped = ["mlp.gate", "experts.2.up_proj"]
    fields = {"quant_method": "fp8", "modules_to_not_convert": skipped}
    edit_config(packed, quantization_config=fields)
    with pytest.raises(ConfigError, match=r"experts\.0\.gate.*experts\.2\.up_proj.*alike"):
        load_spec(packed)


def test_gptq_overrides_for_some_modules(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    rules = {"-:.*layers\\.0\\..*": {}, "+:.*down_proj": {"group_size": 32}}
    packed, _ = save_quantized(tiny_model("llama", **EVEN), tmp_path, "gptq", dynamic=rules)
    first, second, _ = load_spec(packed).layers
    assert first.formats == () and dict(second.formats)["mlp.down"].group == 32
    assert dict(second.formats)["attn.qkv"].group == 16


def test_info_tells_format_and_bytes_without_weights(
    checkpoints: Callable[..., tuple[Path, Path]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    packed, _ = checkpoints("llama", "gptq")
    (tmp_path / "config.json").write_bytes((packed / "config.json").read_bytes())
    for folder, options, title in (
        (packed, [], "gptq int4 in groups of 16"),
        (tmp_path, [], "gptq int4 in groups of 16"),
        (plain_config(packed, tmp_path), ["--quantization", "fp8"], "fp8, quantised while"),
    ):
        assert cli.main(["info", str(folder), "--json", "--dtype", "float32", *options]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert facts["quantization"].startswith(title)
        assert facts["weight_bytes"] < 0.6 * 4 * facts["parameters"]
    model = load(packed)
    num_bytes = sum(p.numel() * p.itemsize for p in model.parameters())
    assert cli.main(["info", str(packed), "--json", "--dtype", "float32"]) == 0
    assert json.loads(capsys.readouterr().out)["weight_bytes"] == num_bytes


@pytest.mark.parametrize(
    ("kind", "title"),
    [
        ("nvfp4", "compressed-tensors fp4 in groups of 16"),
        ("mxfp4", "compressed-tensors fp4 in groups of 32"),
        ("packed 4 bits, asymmetric", "compressed-tensors int4 in groups of 16, asymmetric"),
        ("float blocks", "compressed-tensors fp8 in blocks of 128x128"),
        ("gptq v2, asymmetric", "gptq int4 in groups of 16, asymmetric"),
        ("awq", "awq int4 in groups of 16, asymmetric"),
    ],
)
def test_titles_tell_formats_of_one_code_apart(kind: str, title: str) -> None:
    config, _ = KINDS[kind]
    assert METHODS[config["quant_method"]](Fields(config), "float32").title == title


def plain_config(packed: Path, tmp_path: Path) -> Path:
    """The config of the same model, not quantised."""
    folder = tmp_path / "plain"
    folder.mkdir(exist_ok=True)
    config = json.loads((packed / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


Q_PROJ = "model.layers.1.self_attn.q_proj"
Edit = Callable[[dict[str, Tensor]], object]
DAMAGED: list[tuple[str, Edit, str]] = [
    (
        "gptq",
        lambda t: t.pop(f"{Q_PROJ}.scales"),
        rf"missing tensors: {Q_PROJ}.scales; the quantization_config asks",
    ),
    ("gptq", lambda t: [t.pop(n) for n in list(t) if Q_PROJ in n], "missing tensors: .*q_proj"),
    (
        "gptq",
        lambda t: t.update({f"{Q_PROJ}.scales": torch.zeros(3, 64).half()}),
        rf"matrix '{Q_PROJ}': scales has shape \[3, 64\]",
    ),
    (
        "gptq",
        lambda t: t.update({f"{Q_PROJ}.qweight": torch.zeros(8, 32, dtype=torch.int32)}),
        rf"matrix '{Q_PROJ}': qzeros has shape",
    ),
    (
        "gptq",
        lambda t: t.update({f"{Q_PROJ}.g_idx": torch.arange(64).flip(0).int() // 16}),
        rf"tensor '{Q_PROJ}.weight': g_idx reorders the inputs",
    ),
    (
        "gptq permuted",
        lambda t: t.update({f"{Q_PROJ}.g_idx": torch.arange(64).flip(0).int() // 16}),
        "g_idx orders the inputs otherwise than in the other parts",
    ),
    (
        "fp8 of channels",
        lambda t: t.update({f"{Q_PROJ}.weight": torch.zeros(64, 64)}),
        rf"matrix '{Q_PROJ}': weight has dtype float32",
    ),
    (
        "fp8 of channels",
        lambda t: t.update({f"{Q_PROJ}.weight_scale": torch.full((64, 1), torch.nan)}),
        rf"matrix '{Q_PROJ}': weight_scale holds an infinity or NaN",
    ),
    (
        "fp8 of channels",
        lambda t: t.update({"lm_head.weight": torch.zeros(128, 64).to(torch.float8_e4m3fn)}),
        "'lm_head.weight' has dtype float8_e4m3fn, expected .* as the config gives it no scales",
    ),
    (
        "packed 4 bits",
        lambda t: t.update({f"{Q_PROJ}.weight_shape": torch.tensor([32, 64])}),
        rf"matrix '{Q_PROJ}': weight_packed has shape",
    ),
    (
        "packed 4 bits",
        lambda t: t.update({f"{Q_PROJ}.weight_scale_2": torch.zeros(1)}),
        rf"unexpected tensors: {Q_PROJ}.weight_scale_2",
    ),
    (
        "awq",
        lambda t: [
            [t.pop(n) for n in list(t) if Q_PROJ in n],
            t.update({f"{Q_PROJ}.weight": torch.zeros(64, 64)}),
        ],
        rf"tensor '{Q_PROJ}.weight': it is not quantised but float32",
    ),
]


@pytest.mark.parametrize(("kind", "edit", "message"), DAMAGED)
def test_inconsistent_tensors_are_one_line_that_names_them(
    kind: str, edit: Edit, message: str, checkpoints: Callable[..., tuple[Path, Path]]
) -> None:
    packed, _ = checkpoints("llama", kind)
    tensors = load_file(packed / "model.safetensors")
    edit(tensors)
    save_file(tensors, packed / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=message) as caught:
        load(packed)
    assert "\n" not in str(caught.value)


def test_experts_with_act_order_load_if_their_inputs_are_in_order(
    checkpoints: Callable[..., tuple[Path, Path]],
) -> None:
    packed, dense = checkpoints("experts", "gptq", desc_act=True)
    with torch.inference_mode():
        expected = load_reference(dense)(torch.tensor([[5, 6, 7]])).logits[0]
    model = load(packed)
    assert not dict(model.spec.layers[0].formats)["mlp.down"].is_permuted
    actual = logits_in_chunks(model, [5, 6, 7], [3])
    torch.testing.assert_close(actual, expected, atol=2e-4, rtol=1e-4)

    name, file = "model.layers.1.mlp.experts.2.down_proj", packed / "model.safetensors"
    tensors = load_file(file)
    order = torch.arange(63, -1, -1)
    tensors[f"{name}.g_idx"] = (order // 16).int()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=rf"tensor '{name}.weight': g_idx reorders .* experts"):
        load(packed)
    codes = torch.ones(64, 64, dtype=torch.uint8)
    matrix = QuantizedMatrix("int4", codes, torch.ones(64, 4), permutation=order)
    slot = model.layers[1].mlp.down.slots_of_expert(2)["weight"]
    of_rank = ShardSlot(slot, Ranks(0, 2).shard(32), 1)
    with pytest.raises(ValueError, match="g_idx reorders the inputs"):
        of_rank.put(matrix)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"quant_method": "quip"}, "quant_method='quip' is not supported .*gptq"),
    ({"quant_method": None}, "quant_method=None"),
    ({"quant_method": "gptq", "bits": 3}, "bits=3 .*supported: 2, 4, 8"),
    ({"quant_method": "gptq"}, "bits=None"),
    ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "checkpoint_format='mar"),
    ({"quant_method": "gptq", "bits": 4, "group_size": "all"}, "group_size='all'"),
    ({"quant_method": "gptq", "bits": 4, "group_size": 2**70}, "group_size=1180.* less than 2"),
    ({"quant_method": "awq", "version": "gemv"}, "version='gemv' .*gemm"),
    ({"quant_method": "awq", "format": "gemv_fast"}, "format='gemv_fast' .*gemm"),
    ({"quant_method": "awq", "bits": 4, "w_bit": 8}, "w_bit=8 .*contradicts bits=4"),
    ({"quant_method": "awq", "q_group_size": 0}, "q_group_size=0 .*positive"),
    ({"quant_method": "awq", "dynamic": {"-:.*": {}}}, "dynamic=.* without overrides"),
    ({"quant_method": "gptq", "bits": 4, "format": "marlin"}, "format='marlin'"),
    ({"quant_method": "gptq", "bits": 4, "is_marlin_format": True}, "is_marlin_format=True"),
    (
        {"quant_method": "gptq", "bits": 4, "modules_in_block_to_quantize": {"a": "b"}},
        "modules_in_block_to_quantize=.*list of names",
    ),
    ({"quant_method": "fp8", "ignored_layers": "q_proj"}, "ignored_layers='q_proj' .*list of"),
    ({"load_in_4bit": True, "quant_method": "bitsandbytes"}, "quant_method='bitsandbytes'"),
    ({"quant_method": "fp8", "weight_block_size": [64, 128]}, r"weight_block_size=\[64, 128\]"),
    ({"quant_method": "fp8", "activation_scheme": "odd"}, "activation_scheme='odd'"),
    ({"quant_method": "fp8", "modules_to_not_convert": "q_proj"}, "must be a list of names"),
    ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "quant_algo='W4A8_AWQ'"),
    ({"quant_method": "compressed-tensors", "sparsity_config": {"a": 1}}, "sparsity_config"),
    ({"quant_method": "compressed-tensors", "transform_config": {"a": 1}}, "transform_config"),
    (
        {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "config_groups": {"g": {"weights": FLOAT | {"strategy": "tensor", "symmetric": False}}},
        },
        "config_groups.g.weights: symmetric=False",
    ),
    (
        {
            "quant_method": "compressed-tensors",
            "config_groups": {"g": {"targets": ["Linear"], "format": "marlin-24"}},
        },
        "config_groups.g: format='marlin-24'",
    ),
    (
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"g": {"targets": ["Linear"], "weights": {"strategy": "token"}}},
        },
        "config_groups.g.weights: strategy='token'",
    ),
]


@pytest.mark.parametrize(("config", "message"), REFUSED)
def test_unknown_variants_are_refused_by_field(
    config: dict[str, Any], message: str, checkpoints: Callable[..., tuple[Path, Path]]
) -> None:
    packed, _ = checkpoints("llama", "fp8 of channels")
    edit_config(packed, quantization_config=config)
    with pytest.raises(ConfigError, match=message) as caught:
        load_spec(packed)
    assert "\n" not in str(caught.value)


def test_tensors_of_a_matrix_may_lie_in_several_files(
    checkpoints: Callable[..., tuple[Path, Path]],
) -> None:
    packed, _ = checkpoints("llama", "gptq v2, asymmetric")
    tensors = load_file(packed / "model.safetensors")
    expected = logits_in_chunks(load(packed), [3, 4, 5], [3])
    (packed / "model.safetensors").unlink()
    scales = {name: tensors.pop(name) for name in list(tensors) if name.endswith(".scales")}
    for number, content in ((1, tensors), (2, scales)):
        path = packed / f"model-0000{number}-of-00002.safetensors"
        save_file(content, path, metadata={"format": "pt"})
    assert torch.equal(logits_in_chunks(load(packed), [3, 4, 5], [3]), expected)


def test_biases_of_zeros_for_layers_without_one_are_let_pass(
    checkpoints: Callable[..., tuple[Path, Path]],
) -> None:
    packed, _ = checkpoints("llama", "gptq")
    tensors = load_file(packed / "model.safetensors")
    for value in (0.0, 0.5):
        tensors[f"{Q_PROJ}.bias"] = torch.full((64,), value)
        save_file(tensors, packed / "model.safetensors", metadata={"format": "pt"})
        if value == 0:
            load(packed)
    with pytest.raises(ConfigError, match=f"unexpected tensors: {Q_PROJ}.bias"):
        load(packed)


def test_modelopt_writes_some_algorithms_in_lower_case(
    checkpoints: Callable[..., tuple[Path, Path]],
) -> None:
    packed, _ = checkpoints("llama", "modelopt fp8")
    edit_config(packed, quantization_config={"quant_method": "modelopt", "quant_algo": "fp8_pb_wo"})
    spec = load_spec(packed)
    assert spec.quantization == "modelopt FP8_PB_WO"
    assert {format.rows for _, format in spec.layers[0].formats} == {128}


def test_modelopt_is_found_in_a_file_of_its_own(
    checkpoints: Callable[..., tuple[Path, Path]],
) -> None:
    packed, _ = checkpoints("llama", "modelopt fp8")
    edit_config(packed, quantization_config=None)
    quantization = {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}
    (packed / "hf_quant_config.json").write_text(json.dumps({"quantization": quantization}))
    assert load(packed).spec.quantization == "modelopt FP8"


def test_files_for_mlx_are_refused_by_name(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_llama(), tmp_path / "copy"))
    edit_config(folder, quantization={"group_size": 64, "bits": 4, "mode": "affine"})
    with pytest.raises(ConfigError, match="quantised for MLX .*'bits': 4.* use the unquantised"):
        load_spec(folder)


def test_quantising_twice_is_refused(checkpoints: Callable[..., tuple[Path, Path]]) -> None:
    packed, _ = checkpoints("llama", "awq")
    with pytest.raises(ConfigError, match=r"quantization='fp8'.*quantised already \(awq int4"):
        load_spec(packed, "auto", "fp8")


def test_every_method_of_a_checkpoint_can_be_named() -> None:
    assert set(STORED) | {"fp8"} == set(METHODS)


def test_the_method_of_a_checkpoint_may_be_named_and_no_other(
    checkpoints: Callable[..., tuple[Path, Path]], tiny_llama: Callable[..., Path]
) -> None:
    packed, _ = checkpoints("llama", "awq")
    assert load_spec(packed, "auto", "awq") == load_spec(packed)
    with pytest.raises(ConfigError, match=r"quantization='gptq'.*quantised already \(awq int4"):
        load_spec(packed, "auto", "gptq")
    with pytest.raises(ConfigError, match="quantization='awq' needs a checkpoint that is stored"):
        load_spec(tiny_llama(), "auto", "awq")


def test_dummy_weights_of_a_quantised_model_are_finite(
    checkpoints: Callable[..., tuple[Path, Path]],
) -> None:
    for kind in ("fp8 of channels", "gptq permuted", "int8", "nvfp4", "mxfp4"):
        packed, _ = checkpoints("llama", kind)
        model = Decoder(load_spec(packed), make_backend("torch"))
        fill_with_random_weights(model, seed=1)
        logits = logits_in_chunks(model, [3, 4, 5], [3])
        assert logits.isfinite().all() and logits.std() > 0
        for folder in packed.parent.iterdir():
            shutil.rmtree(folder)
