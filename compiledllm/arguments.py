"""Command-line options made from the fields of `compiledllm.config`, equal in all commands."""

from __future__ import annotations

import argparse
import re
from typing import Any

from compiledllm.config import all_options


def add_engine_options(group: argparse._ArgumentGroup) -> None:
    """Add one option per config field: --block-size for block_size, also --no-... for switches."""
    for _, field in all_options():
        flag, kind = "--" + field.name.replace("_", "-"), str(field.type)
        keywords: dict[str, Any] = {"default": argparse.SUPPRESS, "help": field.metadata["help"]}
        if kind.startswith("bool"):
            keywords["action"] = argparse.BooleanOptionalAction
        else:
            keywords["type"] = (
                count if kind.startswith("int") else float if kind == "float" else str
            )
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
