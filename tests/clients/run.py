"""Runs real clients against a scripted server; see README.md for what they need.

python -m tests.clients.run --python VENV/bin/python --npm FOLDER [name ...]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compiledllm.models.source import resolve_checkpoint
from tests.clients.scripted_engine import call, step
from tests.clients.scripted_server import scripted_server
from tests.support.server import Server
from tests.support.tiny import CHAT, copy_tokenizer, save_random_model

HERE = Path(__file__).parent
CLIENT_S = 300
WEATHER = [
    step("<think>\nWhere?\n</think>\n" + call("get_weather", city="Paris"), "weather in Paris"),
    step("It is sunny.", "sunny in Paris"),
]

# A task for coding agents: edit, run, see the failure, edit, run, done.
BROKEN = "def add(a, b):\n    return a\n"
HALF = "def add(a, b):\n    return a + b + 1\n"
WHOLE = "def add(a, b):\n    return a + b\n"
CHECK = """from add import add

assert add(2, 3) == 5, f"got {add(2, 3)}"
print("all", "is", "well")
"""
TASK = "Mend add.py, so that check.py passes."
FAILED, PASSED, DONE = "AssertionError: got 6", "all is well", "add.py adds now."


@dataclass(frozen=True)
class Tools:
    """python: with the Python clients. npm: a folder that has node_modules."""

    python: Path
    npm: Path

    def command(self, name: str) -> str:
        return str(self.npm / "node_modules" / ".bin" / name)


def run(command: list[str], folder: Path, **environment: str) -> str:
    """The output of a client that ended well."""
    kept = {name: value for name, value in os.environ.items() if "PROXY" not in name.upper()}
    done = subprocess.run(
        command,
        cwd=folder,
        env=kept | {"HOME": str(folder)} | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=CLIENT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def python_client(name: str) -> Callable[[Tools, Path], None]:
    def client(tools: Tools, folder: Path) -> None:
        with scripted_server(WEATHER) as server:
            run([str(tools.python), str(HERE / name), server.url], folder)
            check_statuses(server)

    return client


def cohere(tools: Tools, folder: Path) -> None:
    """With a real model, since a scripted one has no vectors."""
    model = folder / "model"
    save_random_model(model, "llama", **CHAT)
    copy_tokenizer(resolve_checkpoint(None), model)
    server = Server(model, folder)
    try:
        run(
            [str(tools.python), str(HERE / "cohere_client.py"), server.wait_until_ready().url],
            folder,
        )
    finally:
        server.stop()


def openai_js(tools: Tools, folder: Path) -> None:
    script = tools.npm / "openai_client.mjs"  # finds the packages beside itself
    script.write_text((HERE / "openai_client.mjs").read_text())
    with scripted_server(WEATHER) as server:
        run(["node", str(script), server.url], folder)
        check_statuses(server)


def check_statuses(server: Server) -> None:
    """The client has asked for answers and got them all."""
    lines = [line for line in server.log.splitlines() if line.startswith("answered ")]
    assert lines and all(line.endswith(" 200") for line in lines), server.log


# -- coding agents ---------------------------------------------------------------------------------


def task_in(folder: Path) -> Path:
    work = folder / "work"
    work.mkdir()
    (work / "add.py").write_text(BROKEN)
    (work / "check.py").write_text(CHECK)
    return work


def codex(tools: Tools, folder: Path) -> None:
    """It edits by shell commands, since this model has no tool of its own for patches."""
    work = task_in(folder)

    def write(text: str) -> str:
        return call("exec_command", cmd=f"cat > add.py <<'EOF'\n{text}EOF\npython3 check.py")

    steps = [
        step("<think>\nI look first.\n</think>\n" + call("exec_command", cmd="cat add.py"), TASK),
        step("I mend it.\n" + write(HALF), "return a"),
        step(write(WHOLE), FAILED),
        step(DONE, PASSED),
    ]
    with scripted_server(steps) as server:
        (folder / "config.toml").write_text(
            'model = "tiny"\nmodel_provider = "local"\napproval_policy = "never"\n'
            'sandbox_mode = "danger-full-access"\n[model_providers.local]\nname = "local"\n'
            f'base_url = "{server.url}/v1"\nwire_api = "responses"\n'
        )
        command = [tools.command("codex"), "exec", "--skip-git-repo-check", TASK]
        said = run(command, work, CODEX_HOME=str(folder))
        check_task(work, said)
        check_statuses(server)


def claude(tools: Tools, folder: Path) -> None:
    work = task_in(folder)
    path = str(work / "add.py")

    def edit(old: str, new: str) -> str:
        return call("Edit", file_path=path, old_string=old, new_string=new)

    check = call("Bash", command="python3 check.py", description="Check")
    steps = [
        step("<think>\nI look first.\n</think>\n" + call("Read", file_path=path), TASK, "# Tools"),
        step("I mend it.\n" + edit(BROKEN, HALF), "return a"),
        step(check, "has been updated"),
        step(edit(HALF, WHOLE), FAILED),
        step(check, "has been updated"),
        step(DONE, PASSED),
    ]
    with scripted_server(steps) as server:
        command = [tools.command("claude"), "-p", TASK, "--allowedTools", "Read,Edit,Bash"]
        said = run(
            command,
            work,
            HOME=str(folder),
            ANTHROPIC_BASE_URL=server.url,
            ANTHROPIC_API_KEY="none",
            ANTHROPIC_MODEL="tiny",
            ANTHROPIC_SMALL_FAST_MODEL="tiny",
            CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC="1",
        )
        check_task(work, said)
        check_statuses(server)


def check_task(work: Path, said: str) -> None:
    assert DONE in said, said
    assert (work / "add.py").read_text() == WHOLE, said


CLIENTS: dict[str, Callable[[Tools, Path], None]] = {
    "agents": python_client("agents_sdk.py"),
    "litellm": python_client("litellm_client.py"),
    "frameworks": python_client("frameworks.py"),
    "cohere": cohere,
    "openai-js": openai_js,
    "codex": codex,
    "claude": claude,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", type=Path, default=Path(sys.executable))
    parser.add_argument("--npm", type=Path, default=Path.cwd())
    parser.add_argument(
        "names", nargs="+", choices=CLIENTS, metavar="name", help=", ".join(CLIENTS)
    )
    arguments: Any = parser.parse_args()
    tools = Tools(arguments.python.absolute(), arguments.npm.absolute())
    num_failed = 0
    for name in arguments.names:
        with tempfile.TemporaryDirectory() as folder:
            try:
                CLIENTS[name](tools, Path(folder))
                print(f"{name}: passed", flush=True)
            except (AssertionError, OSError, subprocess.SubprocessError) as error:
                num_failed += 1
                print(f"{name}: failed\n{error}", flush=True)
    return min(num_failed, 1)


if __name__ == "__main__":
    sys.exit(main())
