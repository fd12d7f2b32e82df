"""Models that transformers runs over our paged cache: greedy tokens are transformers' own."""

from __future__ import annotations

import json
import logging
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compiledllm import Engine, SamplingParams, cli
from compiledllm.benchmarks.floor import decode_cost
from compiledllm.config import ConfigError
from compiledllm.graphs.variants import Variant
from compiledllm.models.registry import load_spec
from compiledllm.models.transformers_model import TransformersModel
from compiledllm.runner import model_runner
from tests.support.greedy import load_reference

SLIDING = {
    "sliding_window": 20,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
# Architectures without a family here.
MODELS: dict[str, dict[str, Any]] = {
    "cwm": {"pad_token_id": 0, "head_dim": 16} | SLIDING,
    "arcee": {},
    "helium": {"head_dim": 16, "pad_token_id": 0},
    "cohere2": {"pad_token_id": 0, "logit_scale": 0.3} | SLIDING,  # scales its logits
    "vaultgemma": {"head_dim": 32, "query_pre_attn_scalar": 24} | SLIDING,  # caps them
    "olmoe": {"num_experts": 6, "num_experts_per_tok": 2, "pad_token_id": 0},
    # GLM-4.7-Flash, whose compressed keys and values are cached as heads of equal sizes.
    "glm4_moe_lite": {"kv_lora_rank": 16, "q_lora_rank": 24, "n_routed_experts": 6}
    | {"qk_nope_head_dim": 24, "qk_rope_head_dim": 8, "v_head_dim": 32, "n_shared_experts": 1}
    | {"num_experts_per_tok": 2, "moe_intermediate_size": 48, "first_k_dense_replace": 1}
    | {"num_key_value_heads": 4, "pad_token_id": 0},
    "gpt_bigcode": {"n_positions": 512, "n_inner": 112},  # one KV head, learned positions
}
LENGTHS, NUM_TOKENS = [1, 5, 17, 40, 100, 170], 8
PROMPTS = [[random.Random(n).randrange(3, 128) for _ in range(n)] for n in LENGTHS]
PROMPTS += [PROMPTS[-1][:120] + [5, 6, 7]]  # a prefix of another
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
STEPS: dict[str, dict[str, Any]] = {
    "chunks": {"max_num_batched_tokens": 48, "num_kv_blocks": 100},
    "compiled": {"compile_when": "start", "num_kv_blocks": 100},
}


Expected = Callable[[Path], list[list[int]]]


def make(checkpoint: Path, **options: Any) -> Engine:
    fixed = {"device": "cpu", "dtype": "float32", "skip_tokenizer_init": True}
    fixed["enforce_eager"] = "compile_when" not in options
    return Engine(checkpoint, **fixed, **options)


def greedy(engine: Engine) -> list[list[int]]:
    outputs = engine.generate(PROMPTS, GREEDY, use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture(scope="module")
def expected(greedy_by_transformers: Callable[..., list[list[int]]]) -> Expected:
    return lambda checkpoint: greedy_by_transformers(checkpoint, PROMPTS, NUM_TOKENS)


@pytest.mark.parametrize("model_type", MODELS)
def test_greedy_tokens_are_those_of_transformers(
    model_type: str, tiny_model: Callable[..., Path], expected: Expected
) -> None:
    checkpoint = tiny_model(model_type, **MODELS[model_type])
    wanted = expected(checkpoint)
    engine = make(checkpoint, **STEPS["chunks"])
    assert isinstance(engine.core.runner.model, TransformersModel)
    assert greedy(engine) == wanted
    assert greedy(engine) == wanted  # now the prompts are in the prefix cache
    assert engine.core.scheduler.num_prefix_hits > 0


def test_decoder_with_the_name_of_an_encoder_runs(
    tiny_model: Callable[..., Path], expected: Expected
) -> None:
    checkpoint = tiny_model("modernbert-decoder", pad_token_id=0, local_attention=32)
    assert greedy(make(checkpoint, **STEPS["chunks"])) == expected(checkpoint)


def test_preempted_requests_get_the_same_tokens(tiny_model: Callable[..., Path]) -> None:
    checkpoint = tiny_model("cwm", **MODELS["cwm"])
    long = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    prompts = [prompt[:20] for prompt in PROMPTS]
    tokens = []
    for num_kv_blocks in (12, 100):
        engine = make(checkpoint, num_kv_blocks=num_kv_blocks)
        outputs = engine.generate(prompts, long, use_tqdm=False)
        tokens.append([output.outputs[0].token_ids for output in outputs])
        assert (engine.core.scheduler.num_preemptions > 0) == (num_kv_blocks == 12)
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("model_type", ["cwm", "vaultgemma"])
def test_compiled_body_gives_the_same_tokens(
    model_type: str,
    tiny_model: Callable[..., Path],
    expected: Expected,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of two layers, which may see unequally far: the compiler unrolls them all.

    For one of the models also for single tokens, which no step here has.
    """
    if model_type != "cwm":
        monkeypatch.setattr(model_runner, "variants_for", lambda *_: [Variant(2, 2**30, 2)])
    changes = MODELS[model_type] | {"num_hidden_layers": 2}
    if kinds := changes.get("layer_types"):
        changes["layer_types"] = kinds[:2]
    checkpoint = tiny_model(model_type, **changes)
    engine = make(checkpoint, **STEPS["compiled"])
    compiler = engine.core.runner.compiler
    assert compiler.is_ready, compiler.error
    assert greedy(engine) == expected(checkpoint)
    assert compiler.num_recompiles == 0


def test_what_does_not_compile_runs_eagerly_and_says_why(
    tiny_model: Callable[..., Path],
    expected: Expected,
    monkeypatch: pytest.MonkeyPatch,
    caplog: Any,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("a graph break")

    monkeypatch.setattr(torch, "compile", fail)
    checkpoint = tiny_model("cwm", **MODELS["cwm"])
    engine = make(checkpoint, **STEPS["compiled"])
    assert "running eagerly (RuntimeError: a graph break)" in caplog.text
    assert greedy(engine) == expected(checkpoint)


@pytest.mark.parametrize("model_type", ["llama", "gpt_oss", "gemma2"])
def test_known_architecture_can_be_forced(
    model_type: str, tiny_model: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    changes = {
        "llama": {},
        "gpt_oss": {"head_dim": 16, "num_local_experts": 6, "num_experts_per_tok": 3} | SLIDING,
        "gemma2": {"head_dim": 32, "attn_logit_softcapping": 5.0} | SLIDING,
    }
    checkpoint = tiny_model(model_type, **changes[model_type])
    with caplog.at_level(logging.WARNING, "compiledllm"):
        engine = make(checkpoint, model_impl="transformers", **STEPS["chunks"])
    assert "transformers runs the model, over our paged attention (as asked)" in caplog.text
    assert isinstance(engine.core.runner.model, TransformersModel)
    assert greedy(engine) == greedy(make(checkpoint, num_kv_blocks=100))
    assert not isinstance(make(checkpoint, num_kv_blocks=9).core.runner.model, TransformersModel)


@pytest.mark.parametrize("model_type", [*MODELS, "llama", "opt"])
def test_spec_tells_what_the_module_has(model_type: str, tiny_model: Callable[..., Path]) -> None:
    checkpoint = tiny_model(model_type, **MODELS.get(model_type, {}))
    spec = load_spec(checkpoint, "transformers")
    model = load_reference(checkpoint)
    assert spec.num_parameters == sum(p.numel() for p in model.parameters())
    assert len(spec.layers) == 3 and spec.max_position == 512 and spec.vocab_size == 128
    heads = {(attn.num_heads, attn.num_kv_heads) for attn in spec.attentions}
    assert heads == {(4, {"gpt_bigcode": 1, "opt": 4, "glm4_moe_lite": 4}.get(model_type, 2))}
    windows = [attn.sliding_window for attn in spec.attentions]
    assert windows == ([20, 0, 20] if "layer_types" in MODELS.get(model_type, {}) else [0, 0, 0])
    used = [layer.weights_used.num_parameters for layer in spec.layers]
    all_of_them = [layer.num_parameters for layer in spec.layers]
    assert used == all_of_them or model_type in ("olmoe", "glm4_moe_lite")
    assert model_type != "olmoe" or max(used) < min(all_of_them)


def test_info_and_floors_know_such_a_model(
    tiny_model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_model("cwm", **MODELS["cwm"]) / "config.json"
    (tmp_path / "config.json").write_bytes(config.read_bytes())
    assert cli.main(["info", str(tmp_path), "--json", "--dtype", "float32"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["run_by"], facts["kv_heads"], facts["head_dim"]) == ("transformers", 2, 16)
    assert facts["intermediate_size"] == 112 and facts["kv_bytes_per_token"] == 3 * 2 * 2 * 16 * 4
    spec = load_spec(tmp_path)
    assert any(attn.sliding_window for attn in spec.attentions)
    assert facts["kv_groups"] == "1 group of 3 layers"  # as the engine has it
    assert facts["kv_bytes_of_a_full_context"] == 512 * facts["kv_bytes_per_token"]
    embedding = 128 * 64
    num_read = spec.weights_read.num_parameters
    assert num_read == spec.num_parameters - embedding  # but one table, untied
    spec = spec.with_dtypes("float32")
    assert decode_cost(spec, batch=1, context=10).kv_bytes == 10 * 3 * 2 * 2 * 16 * 4


def test_dummy_weights_come_from_the_seed(tiny_model: Callable[..., Path]) -> None:
    checkpoint = tiny_model("cwm", **MODELS["cwm"])
    options = {"load_format": "dummy", "num_kv_blocks": 100}
    assert greedy(make(checkpoint, seed=3, **options)) == greedy(
        make(checkpoint, seed=3, **options)
    )


def write_config(path: Path, **config: Any) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    return path


REFUSED = [
    ({"model_type": "bart", "architectures": ["BartForCausalLM"]}, "encoder-decoder"),
    (
        {"model_type": "mamba", "architectures": ["MambaForCausalLM"], "num_hidden_layers": 2},
        "0 of 2 layers attend",
    ),
    ({"model_type": "bloom", "architectures": ["BloomForCausalLM"]}, "0 of 2 layers attend"),
    (
        {"model_type": "gptj", "architectures": ["GPTJForCausalLM"], "n_layer": 2},
        "does not use transformers' attention interface",
    ),
    (
        {
            "model_type": "deepseek_v3",
            "architectures": ["DeepseekV3ForCausalLM"],
            "num_hidden_layers": 2,
            "n_routed_experts": 8,
        },
        "queries, keys and values differ in size",
    ),
    (
        {"model_type": "nemotron", "architectures": ["NemotronForCausalLM"]}
        | {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4},
        "it does not pass keyword arguments on to its attention",
    ),
    (
        {"model_type": "cwm", "architectures": ["CwmForSequenceClassification"]},
        "is CwmForCausalLM",
    ),
    (
        {"model_type": "my_own", "architectures": ["MyForCausalLM"]}
        | {"auto_map": {"AutoConfig": "mine.MyConfig"}},
        "never run",
    ),
    (
        {"model_type": "cwm", "architectures": ["CwmForCausalLM"]}
        | {"quantization_config": {"quant_method": "gptq"}},
        r"quantised weights \(gptq\) are not supported for Cwm",
    ),
]


@pytest.mark.parametrize(("config", "why"), REFUSED, ids=[c["model_type"] for c, _ in REFUSED])
def test_what_cannot_run_is_refused_with_the_reason(
    config: dict[str, Any], why: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=why):
        load_spec(write_config(tmp_path, **config))


def test_a_model_that_mixes_tokens_is_refused(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a convolution over the tokens: the probe sees shapes only."""
    from transformers.models.cwm.modeling_cwm import CwmMLP

    plain = CwmMLP.forward
    shifted = lambda self, x: plain(self, x + 0.5 * x.roll(1, dims=1))  # noqa: E731
    monkeypatch.setattr(CwmMLP, "forward", shifted)
    with pytest.raises(ConfigError, match="something other than attention mixes tokens"):
        make(tiny_model("cwm", **MODELS["cwm"]), num_kv_blocks=9)


def test_weights_that_do_not_fit_are_named(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(tiny_model("cwm", **MODELS["cwm"]), tmp_path / "checkpoint"))
    path, name = checkpoint / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(path)
    extra = tensors.pop(name)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=f"missing keys: {name}"):
        make(checkpoint, num_kv_blocks=9)
    save_file(tensors | {name: extra, "x": extra + 1}, path, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="unexpected keys: x"):
        make(checkpoint, num_kv_blocks=9)
    path.rename(checkpoint / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="no .safetensors files"):
        make(checkpoint, num_kv_blocks=9)


def test_deterministic_is_refused(tiny_model: Callable[..., Path]) -> None:
    from compiledllm.config import EngineConfig
    from compiledllm.engine.core import EngineCore
    from compiledllm.engine.startup import plan

    config = EngineConfig.from_options(
        model=str(tiny_model("cwm", **MODELS["cwm"])), device="cpu", deterministic=True
    )
    with pytest.raises(ConfigError, match="deterministic=True"):
        EngineCore(plan(config))
