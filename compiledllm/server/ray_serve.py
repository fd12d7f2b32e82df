"""The server as a Ray Serve application: all routes of `compiledllm serve`, in replicas of Serve's.

    serve run compiledllm.server.ray_serve:app model=Qwen/Qwen3-0.6B num_replicas=2

Serve's proxy listens and chooses a replica; a replica has an engine in a process of its own, as
`compiledllm serve` does, and is ready once the engine is. Needs `compiledllm[server,ray]`.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import AsyncIterator, Mapping
from importlib import import_module
from typing import Any, NoReturn

from fastapi import FastAPI

from compiledllm.arguments import CommandParser, add_engine_options, engine_options
from compiledllm.config import ConfigError, EngineConfig
from compiledllm.engine.ray_ranks import has_gpus
from compiledllm.remote.replicas import ServedEngine
from compiledllm.server.app import create_app
from compiledllm.server.app_options import api_keys_of, app_options_of
from compiledllm.server.launch import make_engine
from compiledllm.server.options import add_server_options
from compiledllm.server.process import spare_collector

# Limit of Serve's on the requests of a replica. The engine itself queues requests, and refuses
# requests beyond its own limits; Serve's lower default would leave steps half empty.
MAX_ONGOING_REQUESTS = 100_000
_SWITCHES = {"true": True, "false": False}
# Options of Serve's proxy: see `http_options` and `graceful_shutdown_wait_loop_s` of Serve.
_OF_THE_PROXY = (
    *("host", "port", "uds", "root_path", "client_timeout", "keep_alive_timeout"),
    *("max_connections", "shutdown_timeout", "config", "api_server_count"),
)


def app(options: Mapping[str, Any]) -> Any:
    """The Serve application.

    options: options of `compiledllm serve` by name, and `num_replicas`. Values are strings, as on a
    command line, or YAML's values. Raises ConfigError for wrong options.
    """
    options = dict(options)
    num_replicas = int(options.pop("num_replicas", 1))
    arguments = parse(options)

    def build() -> FastAPI:
        return build_app(arguments)

    serve: Any = import_module("ray.serve")
    deployment = serve.deployment(
        name="compiledllm",
        num_replicas=num_replicas,
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        ray_actor_options={"num_gpus": _num_gpus(arguments)},
    )(serve.ingress(build)(Replica))
    return deployment.bind()


class Replica:
    """The methods of a replica that Serve calls, besides the routes."""

    app: FastAPI  # set by Serve

    async def check_health(self) -> None:
        """Raise an error if the engine is lost, so that Serve replaces this replica."""
        if reason := self.app.state.engine.why_unhealthy():
            raise RuntimeError(reason)


def parse(options: Mapping[str, Any]) -> argparse.Namespace:
    """Options by name as the arguments of `compiledllm serve`. Raises ConfigError."""
    parser = _Parser(prog="compiledllm.server.ray_serve", add_help=False)
    add_server_options(parser.add_argument_group("server"))
    add_engine_options(parser.add_argument_group("engine"))
    names = {name.replace("-", "_"): name for name in options}
    for name in names:
        if name in _OF_THE_PROXY or name.startswith("ssl_"):
            raise ConfigError(f"{names[name]} is for Ray Serve to decide; set it in its own config")
    given = {
        names[name]: _SWITCHES.get(value, value) if isinstance(value, str) else value
        for name, value in ((name, options[names[name]]) for name in names)
    }
    arguments: argparse.Namespace = parser.parse_args(parser.words_of(given))
    EngineConfig.from_options(**engine_options(arguments))
    return arguments


class _Parser(CommandParser):
    takes_vllm_options = True

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def build_app(arguments: argparse.Namespace) -> FastAPI:
    """The routes, and an engine that starts and ends with them."""
    engine = make_engine(engine_options(arguments), arguments)
    engine.on_loaded = spare_collector
    made = create_app(engine, app_options_of(arguments, api_keys_of(arguments), False))
    made.state.engine = engine

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await _start(engine)
        try:
            yield
        finally:
            await engine.stop()

    made.router.lifespan_context = lifespan
    return made


async def _start(engine: ServedEngine) -> None:
    """Wait until the engine takes requests. Raises ConfigError or RuntimeError if it never will."""
    engine.start()
    await engine.wait_until_settled()
    if engine.failure is not None:
        error = ConfigError if engine.failure.is_config else RuntimeError
        raise error(engine.failure.error)


def _num_gpus(arguments: argparse.Namespace) -> int:
    """GPUs of a replica: none on a cluster without any, or if the options ask for a CPU."""
    options = engine_options(arguments)
    if not has_gpus(import_module("ray"), options.get("device", "auto")):
        return 0
    ranks = int(options.get("tensor_parallel_size") or 1)
    return ranks * int(arguments.data_parallel_size)
