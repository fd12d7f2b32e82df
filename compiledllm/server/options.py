"""The command-line options of the server. This module imports nothing heavy."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
from typing import Any

from compiledllm.arguments import count
from compiledllm.server.openai.reasoning_formats import REASONING
from compiledllm.server.openai.tool_formats import FORMATS

LOG_LEVELS = ("debug", "info", "warning", "error")  # of `logging`


def add_server_options(group: argparse._ArgumentGroup) -> None:
    """Add the options of `serve` that are not engine options."""
    add = group.add_argument
    add("--config", metavar="FILE", help="YAML with these options; the command line wins")
    add("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    add("--port", type=_port, default=8000, help="port to listen on (8000)")
    add("--uds", metavar="PATH", help="listen on this Unix socket instead")
    add(
        "--root-path",
        type=root_path,
        default="",
        help="path below which a proxy serves this server",
    )
    add("--ssl-certfile", metavar="FILE", help="speak TLS: the certificate with its chain, PEM")
    add("--ssl-keyfile", metavar="FILE", help="the certificate's key, if it is in another file")
    add("--ssl-ca-certs", metavar="FILE", help="CA certificates that sign clients' certificates")
    ask = "clients' certificates: 0 not asked for, 1 optional, 2 required (0)"
    add("--ssl-cert-reqs", type=int, choices=(0, 1, 2), default=0, help=ask)
    add("--ssl-ciphers", help="OpenSSL's list of ciphers, for TLS 1.2")
    add("--api-key", action="append", help="a key that requests must have (repeatable)")
    add("--api-key-file", help="a file with keys, one a line; also $COMPILEDLLM_API_KEY")
    words: dict[str, Any] = {"nargs": "+", "action": Words}
    add("--allowed-origins", default=[], help="CORS: none unless given; * for all", **words)
    add("--allowed-methods", default=["*"], help="CORS: for allowed origins (*)", **words)
    add("--allowed-headers", default=["*"], help="CORS: for allowed origins (*)", **words)
    _add_switch(group, "--allow-credentials", False, "CORS: allow cookies and stored passwords")
    _add_switch(
        group, "--access-log", False, "log a line per answer: status, time, tokens, how it ended"
    )
    _add_switch(group, "--disable-fastapi-docs", False, "no /docs and no /openapi.json")
    prefix = "prefix of the metrics' names (compiledllm:); 'vllm:' suits vLLM's dashboards"
    add("--metrics-prefix", default="compiledllm:", help=prefix)
    _add_answer_options(group)
    kept = "keep the last N answers of /v1/responses in memory, for previous_response_id (0)"
    add("--responses-store", type=count, default=0, metavar="N", help=kept)
    replicas = "engines with a copy of the model each, on GPUs of their own (1)"
    add("--data-parallel-size", "-dp", type=positive, default=1, metavar="N", help=replicas)
    processes = "HTTP processes that share the port, in front of the same engines (1)"
    add("--api-server-count", "-asc", type=positive, default=1, metavar="N", help=processes)
    queued = "requests that may wait, besides those that run (1024)"
    add("--max-queued-requests", type=count, default=1024, help=queued)
    queued = "prompt tokens of all requests that wait or run (4000k)"
    add("--max-queued-tokens", type=count, default=4_000_000, help=queued)
    add(
        "--request-timeout",
        type=non_negative_s,
        default=1800.0,
        help="seconds a request may take (1800)",
    )
    add("--shutdown-timeout", type=non_negative_s, default=30.0, help="seconds to drain for (30)")
    idle = (
        "seconds for a client to send its headers, or without progress in its body or answer (15)"
    )
    add("--client-timeout", type=non_negative_s, default=15.0, help=idle)
    idle = "seconds a connection may idle between requests; longer than a load balancer's (15)"
    add("--keep-alive-timeout", type=non_negative_s, default=15.0, help=idle)
    add("--max-connections", type=count, help="default: as many as the limit on open files allows")


def add_batch_options(group: argparse._ArgumentGroup) -> None:
    """Add the options of `run-batch` that are not engine options."""
    add = group.add_argument
    add("--config", metavar="FILE", help="YAML with these options; the command line wins")
    add("-i", "--input-file", metavar="FILE", help="requests, one a line; -: standard input")
    add("-o", "--output-file", metavar="FILE", help="answers, appended to earlier ones; -: stdout")
    _add_switch(group, "--overwrite", False, "start over and discard the answers in the output")
    _add_switch(group, "--enable-metrics", False, "serve /metrics while the batch runs")
    add("--host", "--url", default="127.0.0.1", help="address of /metrics (127.0.0.1)")
    add("--port", type=_port, default=8000, help="port of /metrics (8000)")
    add("--output-tmp-dir", help=argparse.SUPPRESS)  # vLLM's, for uploads
    _add_answer_options(group)


def _add_answer_options(group: argparse._ArgumentGroup) -> None:
    """Add the options about answers and about the engine's process."""
    add = group.add_argument
    add("--served-model-name", nargs="+", help="names in the API; default: the model as given")
    strict = "refuse unknown fields, instead of ignoring and naming them"
    _add_switch(group, "--strict-fields", False, strict)
    _add_switch(group, "--enable-log-requests", False, "log requests' ids and sizes, never prompts")
    levels: dict[str, Any] = {"type": str.lower, "choices": LOG_LEVELS, "default": "info"}
    add("--log-level", help="minimum severity of log lines (info)", **levels)
    details = "show cached_tokens in usage"
    _add_switch(group, "--enable-prompt-tokens-details", True, details)
    parsers = ["auto", "none", *FORMATS]
    auto: dict[str, Any] = {"type": lambda name: name or "auto", "default": "auto"}
    auto["help"] = "auto: the format that the chat template shows"
    add("--tool-call-parser", choices=parsers, **auto)
    parsers = ["auto", "none", *REASONING]
    add("--reasoning-parser", choices=parsers, **auto)
    silence = "seconds of silence until the engine is unhealthy; restarted after twice that (60)"
    add("--stuck-timeout", type=positive_s, default=60.0, help=silence)
    add("--load-timeout", type=positive_s, default=3600.0, help="seconds loading may take (3600)")


def served_names(arguments: argparse.Namespace, options: dict[str, Any]) -> list[str]:
    """The model's names in the API. options: the engine's."""
    return arguments.served_model_name or [str(options.get("model") or "SmolLM2-135M-Instruct")]


def _add_switch(group: argparse._ArgumentGroup, flag: str, default: bool, help: str) -> None:
    group.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=help)


class Words(argparse.Action):
    """Several words, or a single list as JSON, as vLLM has them."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if len(values) == 1 and values[0].startswith("["):
            with contextlib.suppress(ValueError):
                values = [str(word) for word in json.loads(values[0])]
        setattr(namespace, self.dest, values)


def positive(text: str) -> int:
    """Parse a number of at least 1."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got '{text}'")
    return int(text)


def _port(text: str) -> int:
    """Parse the number of a port; 0: any free one."""
    if not text.isascii() or not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"must be an integer from 0 to 65535, got '{text}'")
    return int(text)


def root_path(text: str) -> str:
    """Parse a path prefix: "" or "/llm"; a slash at its end is left out."""
    path = text.rstrip("/")
    if path and (not path.startswith("/") or not path.isascii() or "//" in path):
        raise argparse.ArgumentTypeError(f"must be a path such as /llm, got '{text}'")
    return path


def non_negative_s(text: str) -> float:
    """Parse a number of seconds, at least 0; inf: no limit."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"must be a number of seconds, got '{text}'")
    return value


def positive_s(text: str) -> float:
    """Parse a number of seconds above 0; inf: no limit."""
    value = non_negative_s(text)
    if value == 0:
        raise argparse.ArgumentTypeError("must be more than 0 seconds")
    return value
