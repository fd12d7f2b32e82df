"""Command-line options made from the fields of `compiledllm.config`, equal in all commands."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from collections.abc import Callable
from typing import Any

from compiledllm.config import KINDS, all_options


def add_engine_options(group: argparse._ArgumentGroup) -> None:
    """Add one option per config field."""
    for _, field in all_options():
        add_option(group, field)


def add_option(group: argparse._ArgumentGroup, field: dataclasses.Field[Any]) -> None:
    """Add --block-size for block_size, and --no-... for switches. Lists and dictionaries: JSON."""
    flag, kind = "--" + field.name.replace("_", "-"), field.metadata["kind"]
    keywords: dict[str, Any] = {"default": argparse.SUPPRESS, "help": field.metadata["help"]}
    if kind == "bool":
        keywords["action"] = argparse.BooleanOptionalAction
    else:
        keywords["type"] = _PARSERS[kind]
        keywords["choices"] = field.metadata["choices"]
    group.add_argument(flag, **keywords)


def engine_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The engine options that were given, by name."""
    names = [field.name for _, field in all_options()]
    return {name: getattr(arguments, name) for name in names if name in arguments}


def count(text: str) -> int:
    """Parse an integer, which may be written as 8k (8000) or 8K (8192)."""
    match = re.fullmatch(r"(-?\d+)([kK]?)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"must be an integer such as 4096, 4k or 4K, got '{text}'")
    return int(match[1]) * {"": 1, "k": 1000, "K": 1024}[match[2]]


def _json_parser(kind: str) -> Callable[[str], Any]:
    types, words = KINDS[kind]

    def parse(text: str) -> Any:
        try:
            value = json.loads(text)
        except ValueError:
            value = None
        if not isinstance(value, types):
            raise argparse.ArgumentTypeError(f"must be {words} as JSON, got '{text[:80]}'")
        return value

    return parse


_PARSERS: dict[str, Callable[[str], Any]] = {
    "str": str,
    "path": str,
    "int": count,
    "float": float,
    "list": _json_parser("list"),
    "dict": _json_parser("dict"),
}
