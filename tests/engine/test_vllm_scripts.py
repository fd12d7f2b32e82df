"""vLLM's usual scripts run with nothing changed but the imports.

They share one tiny engine; what they ask of it is checked as if each made its own.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import compiledllm
from compiledllm import Engine
from compiledllm.config import EngineConfig
from compiledllm.engine_args import options_from

FOLDER = Path(__file__).with_name("vllm_scripts")
# Script -> what it prints, as a pattern.
PRINTED = {
    "basic": r"(Prompt: '.+', Generated: '.*'\n){3}",
    "chat": r"1 answer, (length|stop)\n10 answers\n\[system\] You are a\n",
    "tools": r"True\nTrue [1-8]\n",
    "structured": r"(Positive|Negative)\n\w+@\w+\.com\n\{ true\n",
    "beam": r"(3 True\n){2}",
    "priority": r"\[3, 4, 5\]\n",
    "logprobs": r"\[True, False, False, False\]\n(1 [23] True\n){3}True\n",
    "parallel_sampling": r"\[4, 2\] 1\n\[0, 1, 2, 3\]\n",
    "llm_engine": r"2048\n(finished [01]\n){2}0\n",
    "engine_args": r"\[1, 1\]\n16 512\n2048 2\n",
    "prefix_caching": r"0 True\nTrue\n0\nvllm:num_requests_running \(gauge\) = 0.0\n"
    r"vllm:prefix_cache_hits \(counter\) > 0: True\n",
    "embed": r"('.+': 64 1\.000\n){2}16\n",
    "score": r"False False\nTrue True\n1\.00\n",
    "async_engine": r"\[[1-8], [1-8], [1-8]\]\nTrue\n",
}


@pytest.fixture(scope="module")
def engine(tiny_chat_model: Path) -> Iterator[Engine]:
    made = Engine(
        tiny_chat_model,
        enforce_eager=True,
        num_kv_blocks=512,
        max_num_seqs=8,
        scheduling_policy="priority",
    )
    yield made
    made.shutdown()
    with pytest.raises(ValueError, match="the engine was shut down; make a new one"):
        made.generate("too late")


def test_there_is_a_script_for_each_pattern() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} == set(PRINTED)


@pytest.mark.parametrize("name", PRINTED)
def test_script_runs_with_the_import_changed(
    name: str,
    engine: Engine,
    tiny_chat_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def shared(model: object = None, **options: Any) -> Engine:
        EngineConfig.from_options(model=model, **options)
        return engine

    def start_async(made: compiledllm.AsyncEngine, **options: Any) -> None:
        EngineConfig.from_options(**options)
        own = {
            "model": str(tiny_chat_model),
            "enforce_eager": True,
            "num_kv_blocks": 64,
            "max_num_seqs": 4,
        }
        init_async(made, **own)

    init_async = compiledllm.AsyncEngine.__init__
    monkeypatch.setattr(compiledllm, "LLM", shared, raising=False)
    monkeypatch.setattr(Engine, "from_engine_args", lambda args: shared(**options_from(args)))
    monkeypatch.setattr(compiledllm.AsyncEngine, "__init__", start_async)
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    source = (FOLDER / f"{name}.py").read_text()
    changed = source.replace("vllm.v1.metrics.reader", "compiledllm.outputs")
    changed = re.sub(r"^from vllm[.\w]* import", "from compiledllm import", changed, flags=re.M)
    exec(compile(changed, name, "exec", dont_inherit=True), {"__name__": "__main__"})
    assert re.fullmatch(PRINTED[name], capsys.readouterr().out)


def test_a_batch_file_is_answered_with_the_command_changed(
    tiny_chat_model: Path, tmp_path: Path
) -> None:
    """Every endpoint answers in a batch as over HTTP."""
    script = (FOLDER / "batch_file.sh").read_text()
    name = "HuggingFaceTB/SmolLM2-135M-Instruct"
    script = script.replace(
        f"--model {name}", f"--model {tiny_chat_model} --served-model-name {name}"
    )
    script = script.replace("vllm run-batch", f"{sys.executable} -m compiledllm.cli run-batch")
    environment = os.environ | {"COMPILEDLLM_CACHE_DIR": str(tmp_path / "cache")}
    command = ["sh", "-c", script.rstrip() + " --num-kv-blocks 512"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 3, done.stderr  # one line asks for a stream
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    found = {record["custom_id"]: record["response"] for record in map(json.loads, lines)}
    assert len(lines) == len(found) == 8
    refused = found.pop("request-2")
    assert refused["status_code"] == 400
    assert refused["body"]["error"]["param"] == "stream"
    bodies = {name: response["body"] for name, response in sorted(found.items())}
    assert {response["status_code"] for response in found.values()} == {200}, bodies
    chat, text, vector, score, ranked, response, message = bodies.values()
    assert chat["usage"]["completion_tokens"] <= 10 and chat["choices"][0]["message"]["content"]
    assert [choice["index"] for choice in text["choices"]] == [0, 1]
    assert len(vector["data"][0]["embedding"]) == 64
    assert score["data"][1]["score"] == pytest.approx(1, abs=1e-3)
    assert ranked["results"][0]["index"] == 1
    assert response["output"][0]["content"][0]["text"]
    assert message["content"][0]["text"] and message["role"] == "assistant"
