"""The documents are true: code and commands run, the table of options is the real one, links lead
somewhere, and every package has an owner's line."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from compiledllm.config import all_options

ROOT = Path(__file__).parents[2]
# Sub-command -> what its output shows if it did what it is for.
SHOWN = {
    "generate": r"\w+ \w+ \w+",
    "chat": r"/help .*\n[\s\S]*\w+",  # an answer behind the greeting
    "info": r"parameters +134\.5 M\n",
    "bench": r'"tpot_ms": {"median": -?[\d.]+',  # noise can make it negative
}
# Less of it, and the most likely words, as a few random ones may be emojis only. The numbers do not
# matter here, and tests/benchmarks starts an engine compiled.
LESS = {
    "generate": "--max-tokens 8 --temperature 0",
    "chat": "--max-tokens 8 --temperature 0",
    "bench": "--num-iters 1 --num-iters-warmup 0 --enforce-eager",
}
# The ceilings that `bench` measures take gigabytes where the last-level cache is large.
CLI = [sys.executable, "-m", "compiledllm.cli"]
CLI_WITH_SMALL_BUFFERS = [
    sys.executable,
    "-c",
    "import sys; from compiledllm.benchmarks import ceilings; from compiledllm.cli import main; "
    "ceilings._buffer_bytes = lambda _platform: 2**24; sys.exit(main(sys.argv[1:]))",
]
README = (ROOT / "README.md").read_text(encoding="utf-8")
OPTIONS = (ROOT / "compiledllm" / "README.md").read_text(encoding="utf-8")
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
DOCUMENTS = [
    path
    for path in sorted(ROOT.rglob("*.md"))
    if not {part for part in path.relative_to(ROOT).parts if part.startswith(".")}
]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[str]:
    return [line for block in blocks("bash") for line in block.splitlines() if line]


def options_table() -> str:
    lines = ["| option | default | |", "|---|---|---|"]
    for _, field in all_options():
        choices = field.metadata["choices"]
        values = f" ({', '.join(choices)})" if choices else ""
        lines.append(f"| `{field.name}` | {field.default} | {field.metadata['help']}{values} |")
    return "\n".join(lines)


def test_table_of_options_is_the_real_one() -> None:
    assert options_table() in OPTIONS, f"put this into compiledllm/README.md:\n{options_table()}"


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = [line.split()[1] for line in commands() if line.startswith("make ")]
    assert targets and all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


@pytest.mark.real_model
@pytest.mark.parametrize("code", blocks("python"))
def test_python_example_runs(code: str, default_model: Path) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "The capital of France is Paris" in done.stdout


@pytest.mark.real_model
@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("compiledllm ")])
def test_command_runs(command: str, default_model: Path) -> None:
    words = shlex.split(command)[1:]
    cli = CLI_WITH_SMALL_BUFFERS if words[0] == "bench" else CLI
    words = [*cli, *words, *LESS.get(words[0], "").split()]
    done = subprocess.run(words, input="Say hi.\n/exit\n", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(SHOWN[words[3]], done.stdout), done.stdout
    assert "capital of France" not in command or "Paris" in done.stdout


def test_readme_stays_readable() -> None:
    assert README.count("\n") <= 200
    assert ARCHITECTURE.count("\n") <= 150


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8"))
    local = [target for target in targets if "://" not in target]
    assert all((path.parent / target).exists() for target in local), local


def test_every_package_has_an_owners_line() -> None:
    packages = {path.parent.relative_to(ROOT) for path in ROOT.glob("*/__init__.py")}
    packages |= {path.parent.relative_to(ROOT) for path in ROOT.glob("compiledllm/*/__init__.py")}
    packages -= {Path("compiledllm"), Path("tests")}
    missing = [str(path) for path in packages if f"| `{path}/` |" not in ARCHITECTURE]
    assert packages and not missing, missing
