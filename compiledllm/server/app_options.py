"""Makes the options of the app and the limits from the command line of `serve`."""

from __future__ import annotations

import argparse
import os

from compiledllm.arguments import engine_options
from compiledllm.remote.limits import Limits
from compiledllm.server.api_keys import read_keys
from compiledllm.server.app import AppOptions
from compiledllm.server.openai.answer import AnswerSettings
from compiledllm.server.openai.response_store import ResponseStore
from compiledllm.server.options import served_names
from compiledllm.server.origins import parse_cors


def api_keys_of(arguments: argparse.Namespace) -> list[str]:
    """The API keys from all sources. Raises ConfigError.

    Call this once, because a source may be a pipe.
    """
    from_environment = os.environ.get("COMPILEDLLM_API_KEY")
    return read_keys(arguments.api_key or [], arguments.api_key_file, from_environment)


def app_options_of(
    arguments: argparse.Namespace, api_keys: list[str], serves_only_local: bool
) -> AppOptions:
    """The options of the routes. Raises ConfigError."""
    return AppOptions(
        model_names=served_names(arguments, engine_options(arguments)),
        api_keys=api_keys,
        cors=parse_cors(
            arguments.allowed_origins,
            arguments.allowed_methods,
            arguments.allowed_headers,
            arguments.allow_credentials,
        ),
        root_path=arguments.root_path,
        has_docs=not arguments.disable_fastapi_docs,
        logs_access=arguments.access_log,
        serves_only_local=serves_only_local,
        strict_fields=arguments.strict_fields,
        logs_requests=arguments.enable_log_requests,
        metrics_prefix=arguments.metrics_prefix,
        answers=AnswerSettings(
            arguments.tool_call_parser,
            arguments.reasoning_parser,
            shows_cached_tokens=arguments.enable_prompt_tokens_details,
            response_store=ResponseStore(arguments.responses_store),
        ),
    )


def limits_of(arguments: argparse.Namespace) -> Limits:
    return Limits(
        queued_requests=arguments.max_queued_requests,
        queued_tokens=arguments.max_queued_tokens,
        request_s=arguments.request_timeout,
        stuck_s=arguments.stuck_timeout,
        load_s=arguments.load_timeout,
    )
