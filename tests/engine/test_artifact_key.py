"""The key of an artifact: every deciding input changes it, and nothing else does."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from compiledllm.config import EngineConfig
from compiledllm.engine.startup import plan
from compiledllm.graphs.artifact import differences
from compiledllm.models.spec import ModelSpec
from compiledllm.runner import artifact_key
from compiledllm.runner.artifact_key import key_of
from tests.support.families import GEMMA4

PROGRAM = """
import json, sys
from compiledllm.config import EngineConfig
from compiledllm.engine.startup import plan
from compiledllm.runner.artifact_key import key_of
print(json.dumps(key_of(plan(EngineConfig.from_options(model=sys.argv[1], device="cpu")))))
"""


def key(model: Path, **options: Any) -> dict[str, str]:
    options = {"device": "cpu", "load_format": "dummy"} | options
    return key_of(plan(EngineConfig.from_options(model=model, **options)))


@pytest.fixture
def model(tiny_llama: Callable[..., Path]) -> Path:
    return tiny_llama()


def fields_that_differ(one: dict[str, str], other: dict[str, str]) -> set[str]:
    return {line.split(" is ")[0] for line in differences(one, other)}


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"dtype": "bfloat16"}, "dtype"),
        ({"max_num_seqs": 7}, "max_num_seqs"),
        ({"max_num_batched_tokens": 96}, "max_num_batched_tokens"),
        ({"max_model_len": 64}, "max_model_len"),
        ({"block_size": 32}, "block_size"),
        ({"kv_cache_dtype": "fp8"}, "kv_dtype"),
    ],
)
def test_deciding_option_changes_the_key(options: dict[str, Any], field: str, model: Path) -> None:
    assert field in fields_that_differ(key(model), key(model, **options))


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 96},
        {"num_key_value_heads": 1},
        {"intermediate_size": 96},
        {"vocab_size": 160},
        {"rms_norm_eps": 1e-3},
        {"rope_theta": 5e5},
    ],
)
def test_deciding_fact_of_the_model_changes_the_key(
    changes: dict[str, Any], model: Path, tiny_llama: Callable[..., Path]
) -> None:
    found = fields_that_differ(key(model), key(tiny_llama(**changes)))
    assert found & {"layers", "vocab_size", "hidden_size", "final_norm"}


@pytest.mark.parametrize("changes", [{"num_hidden_layers": 2}, {"rms_norm_eps": 1e-3}])
def test_a_fact_of_transformers_module_changes_the_key(
    changes: dict[str, Any], model: Path, tiny_llama: Callable[..., Path]
) -> None:
    """The compiled body has all layers, and constants that the spec lacks."""
    one, other = (key(m, model_impl="transformers") for m in (model, tiny_llama(**changes)))
    assert "config" in fields_that_differ(one, other)


def test_number_of_layers_with_token_inputs_changes_the_key(
    tiny_model: Callable[..., Path],
) -> None:
    """All layers' token inputs come from one compiled function."""
    kinds = ["sliding_attention", "full_attention"]
    sizes = GEMMA4 | {"hidden_size_per_layer_input": 16}
    one, other = (
        key(tiny_model("gemma4_text", **sizes, num_hidden_layers=2 * n, layer_types=kinds * n))
        for n in (1, 2)
    )
    assert fields_that_differ(one, other) == {"num_layers"}


def test_quantisation_changes_the_key(tiny_llama: Callable[..., Path]) -> None:
    model = tiny_llama(hidden_size=128, intermediate_size=256)
    assert fields_that_differ(key(model), key(model, quantization="int8"))


def test_deciding_fact_of_the_machine_changes_the_key(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = key(model)
    changes: list[tuple[str, Callable[[pytest.MonkeyPatch], None]]] = [
        ("torch", lambda patch: patch.setattr(torch, "__version__", "2.99.0")),
        ("threads", lambda patch: patch.setattr(torch, "get_num_threads", lambda: 99)),
        ("cpu", lambda patch: patch.setattr(artifact_key, "_cpu_flags", lambda: "other")),
        ("triton", lambda patch: patch.setattr(artifact_key, "version_of", lambda _: "9.9")),
        ("source", lambda patch: patch.setattr(artifact_key, "source_digest", lambda: "other")),
        ("compilers_variables", lambda patch: patch.setenv("TORCHINDUCTOR_CPP_WRAPPER", "1")),
    ]
    for field, change in changes:
        with monkeypatch.context() as patch:
            change(patch)
            assert fields_that_differ(before, key(model)) == {field}


def test_nothing_else_changes_the_key(
    model: Path, tiny_llama: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = key(model)
    for options in (
        {"num_kv_blocks": 99},
        {"gpu_memory_utilization": 0.5},
        {"enable_prefix_caching": False},
        {"seed": 5},
        {"load_format": "auto"},
        {"compile_when": "start"},
        {"scheduling_policy": "priority"},
        {"skip_tokenizer_init": True},
        {"artifact_dir": "/nowhere"},
    ):
        assert differences(before, key(model, **options)) == [], options
    assert differences(before, key(tiny_llama(num_hidden_layers=5))) == []
    assert differences(before, key(tiny_llama(initializer_range=0.3))) == []
    for variable in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TRITON_HOME", "HOME_X"):
        monkeypatch.setenv(variable, "/elsewhere")
    assert differences(before, key(model)) == []


# Fields of a model's spec that decide neither compiled code nor the size of a step.
NOT_DECIDING = {"architecture", "layers"}  # in the key themselves
NOT_DECIDING |= {"tie_word_embeddings", "max_position", "eos_token_ids", "initializer_range"}
NOT_DECIDING |= {"num_other_parameters", "quantization"}
NOT_DECIDING |= {"num_ranks", "part_of"}  # nothing is kept for several ranks


def test_every_field_of_the_spec_is_known_to_decide_or_not() -> None:
    names = {field.name for field in fields(ModelSpec)}
    assert names == NOT_DECIDING | set(artifact_key._SPEC_FIELDS)


def test_another_process_finds_the_same_key(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hashes of strings and addresses of objects differ between processes."""
    import json

    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    monkeypatch.setenv("PYTHONHASHSEED", "77")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(model)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert differences(key(model, load_format="auto"), json.loads(done.stdout)) == []


def test_key_is_fit_to_be_read(model: Path) -> None:
    found = key(model)
    assert all(len(value) <= 80 and " at 0x" not in value for value in found.values()), found
