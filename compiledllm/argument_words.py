"""Rewrites the words of a command line for argparse: option names with dashes, the keys of a JSON
option as one value, positional arguments last."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Container, Iterable, Sequence
from typing import Any

from compiledllm.vllm_options import value_of


def with_dashes(arguments: Iterable[str]) -> list[str]:
    """Arguments with dashes for underscores in the names of options, up to a lone "--"."""
    found, is_option = [], True
    for text in arguments:
        is_option = is_option and text != "--"
        if is_option and text.startswith("--"):
            name = re.split(r"[=.]", text, maxsplit=1)[0]
            text = name.replace("_", "-") + text[len(name) :]
        found.append(text)
    return found


def with_joined_keys(arguments: Sequence[str], known: Container[str]) -> list[str]:
    """Arguments with `--option.key value`, which vLLM has for JSON, as `--option={"key": value}`.

    known: the options. Several keys of an option become one dictionary.
    """
    found: list[str] = []
    joined: dict[str, dict[str, Any]] = {}
    words = iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        flag, dot, path = name.partition(".")
        if not dot or flag not in known:
            found.append(word)
            continue
        *outer, last = path.split(".")
        place = joined.setdefault(flag, {})
        for key in outer:
            place = place.setdefault(key, {})
        place[last] = value_of(value if equals else next(words, ""))
    return [f"{flag}={json.dumps(keys)}" for flag, keys in joined.items()] + found


def with_positionals_last(arguments: Sequence[str], parser: argparse.ArgumentParser) -> list[str]:
    """Arguments with all options in front, as argparse misreads positionals between options.

    The arguments of commands with sub-commands stay as they are, since they belong to the
    sub-command.
    """
    if any(action.nargs in (argparse.PARSER, argparse.REMAINDER) for action in parser._actions):
        return list(arguments)
    options: list[str] = []
    positionals: list[str] = []
    num_values = 0.0  # number of words that still belong to the last option
    for index, word in enumerate(arguments):
        if word == "--":
            positionals += arguments[index + 1 :]
            break
        if _is_option(word, parser):
            options.append(word)
            num_values = _num_values(parser._option_string_actions.get(word))
        elif num_values:
            options.append(word)
            num_values -= 1
        else:
            positionals.append(word)
    return [*options, "--", *positionals] if positionals else options


def _is_option(word: str, parser: argparse.ArgumentParser) -> bool:
    """Whether argparse takes a word for an option."""
    if word.partition("=")[0] in parser._option_string_actions:
        return True
    is_number = parser._negative_number_matcher.match(word) is not None
    return word.startswith("-") and word != "-" and " " not in word and not is_number


def _num_values(option: argparse.Action | None) -> float:
    """The maximum number of values that may follow an option."""
    if option is None:  # unknown, or with its value after an equals sign
        return 0
    if isinstance(option.nargs, int):
        return option.nargs
    return {None: 1, "?": 1}.get(option.nargs, math.inf)
