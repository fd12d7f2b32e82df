"""`python -m tests.clients.scripted_server`: `compiledllm serve` with a scripted model."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from compiledllm.cli import main
from compiledllm.models.source import resolve_checkpoint
from compiledllm.server import app as app_module
from compiledllm.server import launch, launch_processes
from tests.clients.scripted_engine import SCRIPT, TEMPLATE
from tests.support.server import Server
from tests.support.tiny import copy_tokenizer

MODULE = "tests.clients.scripted_server"
ENGINE = "tests.clients.scripted_engine"


@contextlib.contextmanager
def scripted_server(
    steps: list[dict[str, Any]], *options: str, engine: str = ENGINE
) -> Iterator[Server]:
    """A running server whose model follows these steps. Its log is printed if a test fails.

    engine: the module that is the engine's process.
    """
    with tempfile.TemporaryDirectory() as name:
        model = Path(name) / "model"
        model.mkdir()
        source = resolve_checkpoint(None)
        copy_tokenizer(source, model)
        shutil.copy(source / "config.json", model)
        (model / "chat_template.jinja").write_text(TEMPLATE)
        (model / SCRIPT).write_text(json.dumps(steps))
        server = Server(model, Path(name), *options, module=MODULE, SCRIPTED_ENGINE=engine)
        try:
            yield server.wait_until_ready()
        except BaseException:
            print(server.log, file=sys.stderr)
            raise
        finally:
            server.stop()


class StatusLog:
    """Prints the status of every answer to a POST."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def printing(message: Any) -> None:
            if message["type"] == "http.response.start" and scope["method"] == "POST":
                print(f"answered {scope['path']} {message['status']}", flush=True)
            await send(message)

        await self._app(scope, receive, printing)


def create_app(*arguments: Any) -> Any:
    app = app_module.create_app(*arguments)
    app.add_middleware(StatusLog)
    return app


if __name__ == "__main__":
    command = [sys.executable, "-m", os.environ["SCRIPTED_ENGINE"]]
    with_script = functools.partial(launch.EngineClient, command=command)
    launch.EngineClient = with_script  # type: ignore[misc,assignment]
    launch.create_app = create_app
    shared = functools.partial(launch_processes.SharedEngineLife, command=command)
    launch_processes.SharedEngineLife = shared  # type: ignore[misc,assignment]
    sys.exit(main(["serve", *sys.argv[1:]]))
