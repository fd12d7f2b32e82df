"""Configs of published models, without their weights: each is read, and has its parameters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from compiledllm import cli
from compiledllm.models.registry import FAMILIES
from tests.support.real_configs import MODELS, QUANTIZED


def facts_of(config: dict[str, Any], folder: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    (folder / "config.json").write_text(json.dumps(config))
    code = cli.main(["info", str(folder), "--json"])
    output = capsys.readouterr()
    assert code == 0, output.err
    return json.loads(output.out)


def test_info_reads_published_configs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The number of parameters shows sizes, tied heads, experts and shared keys and values."""
    for name, (billions, config) in MODELS.items():
        facts = facts_of(config, tmp_path, capsys)
        assert facts["run_by"] == "compiledllm", name
        assert facts["parameters"] == pytest.approx(billions * 1e9, rel=0.01), name
        assert facts["dtype"].startswith("bfloat16"), name


def test_info_reads_published_quantization_configs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, (model, quantization, title) in QUANTIZED.items():
        config = MODELS[model][1] | {"quantization_config": quantization}
        facts = facts_of(config, tmp_path, capsys)
        assert title in facts["quantization"], name
        bits = 8 * facts["weight_bytes"] / facts["parameters"]
        assert bits < (9.1 if "FP8" in name or "fp8" in title else 7), name


def test_rows_that_run_have_a_config() -> None:
    """Of the families whose models are downloaded today, one model each."""
    tried = {FAMILIES[config["architectures"][0]] for _, config in MODELS.values()}
    older = {
        "cohere",
        "falcon",
        "gemma",
        "glm4v",
        "gpt2",
        "gpt_neox",
        "granite",
        "llama",
        "mistral",
    }
    older |= {"mixtral", "opt", "phi", "qwen2", "stablelm", "starcoder2"}
    assert set(FAMILIES.values()) - tried <= older | {"wrapper"}
