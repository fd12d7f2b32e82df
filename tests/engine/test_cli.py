"""The command line: answers, exit codes, and errors without tracebacks."""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from compiledllm import cli
from compiledllm.arguments import count
from compiledllm.config import all_options
from compiledllm.engine.plan_views import size
from compiledllm.log import log
from compiledllm.sampling_options import sampling_params_of
from compiledllm.sampling_params import SamplingParams
from compiledllm.structured_outputs import StructuredOutputsParams


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from compiledllm import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), 'heavy import'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_every_engine_option_is_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["generate", "--help"])
    shown = capsys.readouterr().out
    assert all("--" + field.name.replace("_", "-") in shown for _, field in all_options())


def test_env_says_what_a_report_needs_and_no_secret(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("COMPILEDLLM_API_KEY", "hf_secret")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert cli.main(["env", "--json"]) == 0
    shown = capsys.readouterr().out
    found = json.loads(shown)
    assert {"compiledllm", "python", "system", "cpu", "torch", "engine's device"} <= set(found)
    assert found["$HF_TOKEN"] == found["$COMPILEDLLM_API_KEY"] == "(set)"
    assert found["$CUDA_VISIBLE_DEVICES"] == "7" and "hf_secret" not in shown
    assert cli.main(["env"]) == 0
    assert "torch  " in capsys.readouterr().out


def test_info_prints_what_fits_without_weights(
    tiny_llama: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_bytes((tiny_llama() / "config.json").read_bytes())
    assert cli.main(["info", str(tmp_path), "--json", "--dtype", "float32"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["architecture"] == "LlamaForCausalLM" and facts["layers"] == 3
    assert facts["kv_bytes_per_token"] == 3 * 2 * 2 * 16 * 4
    assert facts["weight_bytes"] == facts["parameters"] * 4
    assert facts["kv_tokens_that_fit"] > 0
    assert facts["kv_bytes_of_a_full_context"] == facts["kv_bytes_per_token"] * facts["context"]
    assert facts["kv_groups"] == "1 group of 3 layers"


def test_info_counts_no_kv_that_a_window_gives_back(
    tiny_model: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    window = {"head_dim": 16, "sliding_window": 20, "layer_types": kinds}
    model = tiny_model("ministral", **window)
    assert cli.main(["info", str(model), "--json", "--dtype", "float32"]) == 0
    facts = json.loads(capsys.readouterr().out)
    per_layer = 2 * 2 * 16 * 4
    assert facts["kv_groups"] == "3 groups of 1 layer, 2 within 20 tokens"
    assert facts["kv_bytes_per_token"] == 3 * per_layer
    assert facts["kv_bytes_per_token_past_windows"] == per_layer
    blocks = 512 // 16 + 2 * 3  # 20 tokens may lie in three blocks of 16
    assert facts["kv_bytes_of_a_full_context"] == blocks * 16 * per_layer


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "x", "--model", "/no/such/dir"], "model path does not exist"),
        (["generate", "x", "--temperature", "nan"], "temperature must be in [0, 2], got nan"),
        (["generate", "x", "--top-p", "1.5"], "top_p must be in (0, 1], got 1.5"),
        (["generate", "x", "--block-size", "24"], "multiple of 16, got 24"),
        (["info", "/no/such/dir"], "model path does not exist"),
        (["chat", "/no/such/dir"], "model path does not exist"),
        (["generate", "x", "--json-schema", "/none"], "--json-schema /none cannot be read"),
        (["generate", "x", "--chat-template", "/none"], "is neither a Jinja template nor a file"),
    ],
)
def test_bad_argument_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    shown = capsys.readouterr().err
    assert message in shown and "Traceback" not in shown


def test_info_is_readable(
    tiny_llama: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["info", str(tiny_llama()), "--dtype", "float32"]) == 0
    lines = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines() if line)
    assert lines["parameters"].endswith(" M") and lines["weights"].endswith(" KiB")
    assert [size(n) for n in (5, 2048, 3 * 2**20, 2**34)] == ["5 bytes", "2 KiB", "3 MiB", "16 GiB"]


@pytest.mark.parametrize(
    ("words", "model", "prompt"),
    [
        (["a prompt"], None, "a prompt"),
        (["org/m", "a prompt", "--top-k", "3"], "org/m", "a prompt"),
        (["a prompt", "--model", "org/m"], "org/m", "a prompt"),
        (["org/m", "a prompt", "--model", "other"], "org/m", "a prompt"),
    ],
)
def test_a_model_may_stand_before_the_prompt(
    words: list[str], model: str | None, prompt: str
) -> None:
    found = cli._with_model(cli._parser().parse_args(["generate", *words]))
    assert (getattr(found, "model", None), found.prompt) == (model, prompt)


def test_sampling_flags_are_sampling_parameters(tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text('{"type": "integer"}')
    words = "--min-p 0.1 --presence-penalty 1 --frequency-penalty -1 --repetition-penalty 1.1"
    words += (
        f" --seed 7 --stop x --stop-token-ids 5 6 --bad-words no --json-schema {tmp_path}/s.json"
    )
    found = sampling_params_of(cli._parser().parse_args(["chat", *words.split()]), None)
    assert found == SamplingParams(
        temperature=0.7, min_p=0.1, presence_penalty=1, frequency_penalty=-1,
        repetition_penalty=1.1, seed=7, stop=["x"], stop_token_ids=[5, 6], bad_words=["no"],
        structured_outputs=StructuredOutputsParams(json='{"type": "integer"}'),
    )  # fmt: skip


@pytest.mark.real_model
def test_a_quiet_answer_is_the_answer_alone(
    tiny_chat_model: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    words = ["generate", str(tiny_chat_model), "Hello", "--system", "Say a colour.", "-q"]
    level = log.level
    try:
        assert cli.main([*words, "--choice", "red", "blue", "--enforce-eager"]) == 0
    finally:
        log.setLevel(level)
    shown = capsys.readouterr()
    assert shown.out in ("red\n", "blue\n") and shown.err == "" and not caplog.records


def test_counts_may_be_written_short() -> None:
    assert count(str(2**62 + 1)) == 2**62 + 1
    written = ("12", "8k", "8K", "25.6k", "2M", "3g", "-1")
    assert [count(text) for text in written] == [12, 8000, 8192, 25600, 2**21, 3 * 10**9, -1]
    for wrong in ("1.5", "k", "2x", "", "0.0001k", "1e3"):
        with pytest.raises(argparse.ArgumentTypeError, match="must be an integer such as 4096"):
            count(wrong)


@pytest.mark.real_model
def test_generate_streams_real_text(
    default_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generate", "The capital of France is", "--temperature", "0", "--max-tokens", "8"]
    assert cli.main([*arguments, "--enforce-eager"]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("The capital of France is Paris")
    assert "8 generated (length)" in shown.err


@pytest.mark.real_model
def test_chat_keeps_history_and_ctrl_c_stops_only_the_answer(
    default_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C comes in the middle of the second answer; the third still knows the first question."""
    from compiledllm.engine.engine import Engine

    seen: list[list[dict[str, str]]] = []
    stream_chat = Engine.stream_chat

    def recording(self: Engine, messages: list[dict[str, str]], params: object) -> object:
        seen.append([dict(message) for message in messages])
        outputs = stream_chat(self, messages, params)  # type: ignore[arg-type]
        for index, output in enumerate(outputs):
            yield output
            if len(seen) == 2 and index == 3:
                raise KeyboardInterrupt

    lines = ["My name is Ann.", "Count to twenty.", "What is my name?", "/nonsense", "/exit"]
    monkeypatch.setattr(Engine, "stream_chat", recording)
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    assert cli.main(["chat", "--temperature", "0", "--max-tokens", "24", "--enforce-eager"]) == 0
    assert "(stopped)" in capsys.readouterr().out
    assert [message["role"] for message in seen[2]] == ["user", "assistant"] * 2 + ["user"]
    assert seen[2][0]["content"] == "My name is Ann." and seen[2][3]["content"]
