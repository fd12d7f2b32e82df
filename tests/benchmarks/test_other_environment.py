"""Engines of other Python environments, which take turns with this one."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from compiledllm import cli
from compiledllm.benchmarks.model import Model
from compiledllm.benchmarks.other_environment import OtherEnvironment
from compiledllm.benchmarks.peers import _sharing, _vllm_options, make_other_peer
from compiledllm.benchmarks.report import load_report
from compiledllm.benchmarks.workload import SampleRequest
from compiledllm.config import ConfigError
from compiledllm.platform import Platform

# A package in the place of compiledllm or vLLM, which also prints.
PACKAGE = """
import os, sys
from types import SimpleNamespace
print("engines print")

class SamplingParams(SimpleNamespace):
    pass

class Engine:
    def __init__(self, **options):
        print(sorted(options.items()), file=open(os.environ["SEEN"], "w"))
        if options["model"] == "broken":
            sys.exit(3)

    def generate(self, prompts, params, use_tqdm):
        assert [len(p["prompt_token_ids"]) for p in prompts] == [3, 1]
        is_short = prompts[0]["prompt_token_ids"][0] == 9
        counts = [1 if is_short else p.max_tokens for p in params]
        answers = [SimpleNamespace(token_ids=[0] * count) for count in counts]
        return [SimpleNamespace(outputs=[answer]) for answer in answers]

LLM = Engine
"""
REQUESTS = [SampleRequest([1, 2, 3], 4), SampleRequest([5], 2)]


@pytest.fixture(params=["compiledllm", "vllm"])
def environment(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, str, Path]:
    """The kind of engine, an interpreter that imports the package, and what the engine has seen."""
    packages, seen = tmp_path / "packages", tmp_path / "seen"
    (packages / request.param).mkdir(parents=True)
    (packages / request.param / "__init__.py").write_text(PACKAGE)
    python = tmp_path / "python"
    variables = f'PYTHONPATH="{packages}" SEEN="{seen}"'
    python.write_text(f'#!/bin/sh\n{variables} exec {sys.executable} "$@"\n')
    python.chmod(0o700)
    return request.param, str(python), seen


def test_the_work_is_done_by_the_other_environment(environment: tuple[str, str, Path]) -> None:
    kind, python, seen = environment
    peer = OtherEnvironment("other", kind, python, {"model": "m", "seed": 3})
    peer.wait_until_ready()
    assert seen.read_text() == "[('model', 'm'), ('seed', 3)]\n"
    assert peer.generate(REQUESTS).seconds > 0
    with pytest.raises(RuntimeError, match="generated 1 tokens instead of 4"):
        peer.generate([SampleRequest([9, 2, 3], 4), SampleRequest([5], 2)])
    process = peer._process
    del peer
    gc.collect()
    assert process.returncode == 0


def test_an_engine_that_ends_is_named(environment: tuple[str, str, Path]) -> None:
    kind, python, _ = environment
    with pytest.raises(ConfigError, match="engine 'old' has ended with status 3"):
        OtherEnvironment("old", kind, python, {"model": "broken"}).wait_until_ready()
    peer = OtherEnvironment("old", kind, python, {"model": "m"})
    for _ in range(2):
        with pytest.raises(ConfigError, match="engine 'old' has ended with status 1"):
            peer.generate(REQUESTS[:1])


def test_an_interpreter_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match="engine 'old': /no/python cannot be started"):
        OtherEnvironment("old", "compiledllm", "/no/python", {})


def test_engines_that_need_not_measure_memory_start_at_the_same_time(
    tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    release, python = tmp_path / "release", tmp_path / "python"
    wait = f'while [ ! -e "{release}" ]; do sleep 0.05; done'
    python.write_text(f'#!/bin/sh\n{wait}; exec {sys.executable} "$@"\n')
    python.chmod(0o700)
    options = {"model": str(tiny_llama()), "enforce_eager": True, "device": "cpu"}
    model = Model.from_options({**options, "kv_cache_memory_bytes": 2**22}, ("compiledllm",))
    first, second = (make_other_peer(name, str(python), model, 2) for name in ("a", "b"))
    release.touch()
    for peer in (first, second):
        peer.wait_until_ready()
        assert peer.generate(REQUESTS).seconds > 0


@pytest.mark.parametrize(
    ("options", "raw", "expected"),
    [
        ({"quantization": "fp8_block"}, {}, {"quantization": "fp8_per_block"}),
        ({"quantization": "int4"}, {"quantization_config": {}}, {}),
        ({"quantization": "awq"}, {}, {}),
        ({"kv_cache_dtype": "fp8", "num_kv_blocks": 9}, {}, {"kv_cache_dtype": "fp8"}),
        ({"tensor_parallel_size": 2}, {"text_config": {}}, {"tensor_parallel_size": 2}),
        ({"enable_prefix_caching": True}, {}, {"enable_prefix_caching": True}),
    ],
)
def test_vllm_is_asked_for_the_same_work(
    options: dict[str, Any], raw: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    asked = _vllm_options(a_model(tmp_path, options, raw))
    assert asked.get("language_model_only", False) == ("text_config" in raw)
    assert asked["enable_prefix_caching"] == options.get("enable_prefix_caching", False)
    assert {name: asked[name] for name in asked if name in options} == expected


SIZED = {"kv_cache_memory_bytes": 2**30}


@pytest.mark.parametrize(
    ("options", "shared_by", "expected"),
    [
        ({}, 1, None),
        ({}, 2, 0.47),
        ({"gpu_memory_utilization": 0.3}, 2, 0.3),
        (SIZED, 1, 0.05),
        (SIZED, 2, 0.05),
        (SIZED | {"gpu_memory_utilization": 0.3}, 2, 0.3),
    ],
)
def test_vllm_asks_for_no_free_memory_where_its_cache_is_sized(
    options: dict[str, Any], shared_by: int, expected: float | None, tmp_path: Path
) -> None:
    gpu = Platform(torch.device("cuda"), "pretended", 2**37)
    model = replace(a_model(tmp_path, options, {}), platform=gpu)
    asked = _vllm_options(_sharing(model, shared_by))
    assert asked.get("gpu_memory_utilization") == expected
    assert asked.get("kv_cache_memory_bytes") == options.get("kv_cache_memory_bytes")


def test_work_that_vllm_cannot_do_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="vLLM has no quantization='int4' of 16-bit checkpoints"):
        _vllm_options(a_model(tmp_path, {"quantization": "int4"}, {}))


def a_model(path: Path, options: dict[str, Any], raw: dict[str, Any]) -> Model:
    (path / "config.json").write_text(json.dumps(raw))
    return Model(path, None, 8, Platform.detect("cpu"), "bfloat16", options)


def test_versions_take_turns_in_one_report(
    tiny_llama: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    options = ["--model", str(tiny_llama()), "--enforce-eager", "--device", "cpu"]
    lengths = ["--batch-size", "2", "--input-len", "3", "--output-len", "3", "--num-iters", "1"]
    command = ["bench", "latency", *options, *lengths, "--output-json", str(out)]
    assert cli.main([*command, "--other", f"today={sys.executable}"]) == 0
    report = load_report(out)
    assert [row["engine"] for row in report.rows] == ["compiledllm", "today"]
    assert all(row["ttft_ms"]["median"] > 0 for row in report.rows)
    assert len(report.ratios) == 1
    assert report.flags["other"] == [["today", Path(sys.executable).name]]
    for others in (["compiledllm=python"], ["a=python", "--other", "a=python3"]):
        assert cli.main([*command, "--other", *others]) == 2
        assert "another engine of this name is measured, too" in capsys.readouterr().err
    for wrong in ("today", "=python", "today="):
        with pytest.raises(SystemExit):
            cli.main([*command, "--other", wrong])
        assert "is not LABEL=PYTHON" in capsys.readouterr().err
