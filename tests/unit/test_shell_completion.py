"""What shells complete, asked of the shells themselves where they are installed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from compiledllm import cli
from compiledllm.shell_completion import script

ASK = {
    "bash": 'COMP_WORDS=({words} ""); COMP_CWORD={last}; _compiledllm; echo "${{COMPREPLY[@]}}"',
    "zsh": "emulate -L sh; setopt kshglob noshglob braceexpand ksharrays\n"
    'COMP_WORDS=({words} ""); COMP_CWORD={last}; _compiledllm; echo "${{COMPREPLY[@]}}"',
    "fish": 'complete -C "{words} "',
}
COMPLETED = {
    "compiledllm": {"serve", "bench", "generate", "env", "completion"},
    "compiledllm bench": {"latency", "throughput", "serve", "startup", "compare"},
    "compiledllm serve --dtype": {"auto", "float32", "float16", "bfloat16"},
    "compiledllm completion": {"bash", "zsh", "fish"},
    "compiledllm bench latency --port 9 --engine": {"compiledllm", "vllm", "transformers"},
}


@pytest.mark.parametrize("shell", cli.SHELLS)
def test_the_shell_completes_commands_and_values(shell: str, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    source = tmp_path / "script"
    source.write_text(script(cli._parser(), shell))
    for words, expected in COMPLETED.items():
        text = ASK[shell].format(words=words, last=len(words.split()))
        start = "autoload -U +X compinit && compinit -u; " if shell == "zsh" else ""
        flags = ["-f"] if shell == "zsh" else []
        command = [shell, *flags, "-c", f"{start}source {source}\n{text}"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert not done.stderr
        assert expected <= {word.partition("\t")[0] for word in done.stdout.split()}, words


def test_options_that_help_does_not_show_are_not_completed() -> None:
    text = script(cli._parser(), "bash")
    assert "--max-model-len" in text and "--enable-lora" not in text
