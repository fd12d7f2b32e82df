"""vLLM's `EngineArgs`: an engine's options as one object, for scripts that pass them around.

Every option is a field, vLLM's other options too, so `Engine(**asdict(engine_args))` works. Values
that ask for something unsupported are refused when the engine is made.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import MISSING, field, fields, make_dataclass
from typing import Any, Self

from compiledllm.arguments import add_engine_options, add_vllm_options
from compiledllm.checks import strict_fields
from compiledllm.config import all_options
from compiledllm.vllm_options import vllm_options


class _FromCommandLine:
    """The methods of `EngineArgs`."""

    @staticmethod
    def add_cli_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        """Add the engine's options to a parser; returns the parser."""
        add_engine_options(parser.add_argument_group("engine"))
        add_vllm_options(parser)
        return parser

    @classmethod
    def from_cli_args(cls, args: argparse.Namespace) -> Self:
        """The options that a command line gave; other arguments are left out."""
        names = [f.name for f in fields(cls)]  # type: ignore[arg-type]
        return cls(**{name: getattr(args, name) for name in names if hasattr(args, name)})


def _make(name: str) -> Any:
    defaults = {f.name: f.default for _, f in all_options()}
    for other, option in vllm_options().items():
        defaults[other] = option.values[0] if option.values else None
    columns = [(n, Any, _field(default)) for n, default in defaults.items()]
    made = make_dataclass(name, columns, bases=(_FromCommandLine,))
    made.__module__ = __name__
    return strict_fields("engine option")(made)


def _field(default: Any) -> Any:
    is_mutable = getattr(type(default), "__hash__", MISSING) is None
    return field(default_factory=lambda: default) if is_mutable else field(default=default)


EngineArgs = _make("EngineArgs")
AsyncEngineArgs = _make("AsyncEngineArgs")


def options_from(engine_args: Any) -> dict[str, Any]:
    """Options by name, of a mapping or of an object that has them as attributes."""
    return dict(engine_args if isinstance(engine_args, Mapping) else vars(engine_args))
