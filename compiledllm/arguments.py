"""Command lines: options made from the fields of `compiledllm.config`, equal in all commands, and a
parser that names the nearest option for a wrong one. vLLM's other options are accepted where they
ask for nothing."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

from compiledllm.argument_words import with_dashes, with_joined_keys, with_positionals_last
from compiledllm.config import all_options
from compiledllm.engine_options import AUTO, KINDS
from compiledllm.vllm_options import (
    SAME_VALUES,
    SHORT_FLAGS,
    check_vllm_option,
    same_value,
    value_of,
    vllm_options,
)

MAX_SHOWN = 80  # characters of a value in an error


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that accepts underscores in option names, but no abbreviations. Its errors
    are one line, with the nearest known option. vLLM's counterpart: FlexibleArgumentParser.
    """

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        keywords.setdefault("allow_abbrev", False)
        super().__init__(*arguments, **keywords)

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        return super().parse_known_args(
            with_dashes(sys.argv[1:] if args is None else args), namespace
        )

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        found, rest = self.parse_known_args(args, namespace)
        self.refuse(rest)
        return found

    def refuse(self, unknown: Sequence[str]) -> None:
        """End with an error about the first unknown argument, if there is one."""
        if unknown:
            wrong = next((text for text in unknown if text.startswith("-")), unknown[0])
            if not wrong.startswith("-"):
                self.error(f"one argument too many: '{wrong[:MAX_SHOWN]}'")
            wrong = wrong.partition("=")[0][:MAX_SHOWN]
            self.error(f"unknown option {wrong}{_nearest(wrong, self.shown_flags())}")

    def shown_flags(self) -> list[str]:
        """The options that --help shows."""
        actions = [action for action in self._actions if action.help != argparse.SUPPRESS]
        return [flag for action in actions for flag in action.option_strings]

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n(see '{self.prog} --help')\n")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        choices = None if action.choices is None else list(map(str, action.choices))
        if choices is None or str(value) in choices:
            return
        shown, near = str(value)[:MAX_SHOWN], _nearest(str(value), choices)
        if isinstance(action, argparse._SubParsersAction):
            name = str(action.metavar).lower()
            self.error(f"there is no {name} '{shown}'{near}; known: {', '.join(choices)}")
        raise argparse.ArgumentError(
            action, f"must be one of {', '.join(choices)}, got '{shown}'{near}"
        )


class CommandParser(Parser):
    """The parser of a sub-command, which reports unknown arguments itself.

    If the command has an option --config, its file sets options that the command line leaves out.
    takes_vllm_options: whether vLLM's other options are accepted, too; they are added when the
    command is parsed.
    """

    takes_vllm_options = False
    _where = ""  # the file that is being read, for errors

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        args = with_dashes(args or [])
        if self.takes_vllm_options:
            add_vllm_options(self)
        args = with_joined_keys(args, self._option_string_actions)
        args = with_positionals_last(args, self)
        if "--config" in self._option_string_actions and (path := _config_file(args)):
            self._where = f"{path}: "
            namespace, _ = super().parse_known_args(self.words_of(self._read(path)), namespace)
            self._where = ""
        found, rest = super().parse_known_args(args, namespace)
        self.refuse(rest)
        return found, rest

    def error(self, message: str) -> NoReturn:
        super().error(self._where + message)

    def words_of(self, options: Mapping[str, Any]) -> list[str]:
        """Options by name, with dashes or underscores, as words of a command line."""
        return [
            word
            for name, value in options.items()
            for word in self._words(str(name).replace("_", "-"), value)
        ]

    def _read(self, path: str) -> dict[str, Any]:
        """The options in a file, by name. YAML, of which JSON is a part."""
        import yaml

        try:
            with open(path, encoding="utf-8") as file:
                found = yaml.safe_load(file) or {}
        except (OSError, ValueError, yaml.YAMLError) as error:
            self.error(f"cannot be read ({' '.join(str(error).split())[:200]})")
        if not isinstance(found, dict):
            self.error("must be options with values, such as 'port: 8000', one a line")
        return found

    def _words(self, name: str, value: Any) -> list[str]:
        """An option of the file as words of a command line."""
        flag = f"--{name}"
        action = self._option_string_actions.get(flag)
        if action is None or name == "config":
            self.error(f"unknown option '{name}'{_nearest(flag, self.shown_flags())}")
        if value is None:
            return []
        if action.nargs == 0:
            if not isinstance(value, bool):
                self.error(f"{name} must be true or false, got '{str(value)[:MAX_SHOWN]}'")
            return [flag] if value else [f"--no-{name}"]
        if isinstance(value, list) and action.nargs == "+":
            return [flag, *map(str, value)]
        if isinstance(value, list) and isinstance(action, argparse._AppendAction):
            return [f"{flag}={item}" for item in value]
        is_json = isinstance(value, (list, dict, bool))
        return [f"{flag}={json.dumps(value) if is_json else value}"]


def _config_file(arguments: Sequence[str]) -> str | None:
    """The file that --config names; the last one counts."""
    found = None
    for word, following in itertools.zip_longest(arguments, arguments[1:]):
        if word == "--":
            break
        if word == "--config":
            found = following
        elif word.startswith("--config="):
            found = word.partition("=")[2]
    return found


def _nearest(wrong: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(wrong, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


# -- options ---------------------------------------------------------------------------------------


def add_engine_options(group: argparse._ArgumentGroup) -> None:
    """Add one option per config field."""
    for _, field in all_options():
        add_option(group, field)


def add_option(group: argparse._ArgumentGroup, field: dataclasses.Field[Any]) -> None:
    """Add --block-size for block_size, and --no-... for switches. Lists and dictionaries: JSON."""
    flags, kind = _OTHER_FLAGS.get(field.name, ()), field.metadata["kind"]
    keywords: dict[str, Any] = {"default": argparse.SUPPRESS, "help": field.metadata["help"]}
    if kind == "bool":
        keywords["action"] = argparse.BooleanOptionalAction
    else:
        keywords["type"] = _translated(field.name, _PARSERS[kind])
        keywords["choices"] = field.metadata["choices"]
    group.add_argument(flag_of(field.name), *flags, **keywords)


def add_vllm_options(parser: argparse.ArgumentParser) -> None:
    """Accept vLLM's other options where they ask for nothing. --help does not show them."""
    taken = parser._option_string_actions
    for name, option in vllm_options().items():
        flags = [flag_of(name), *SHORT_FLAGS.get(name, ())]
        if option.is_switch:
            flags.append(flag_of(f"no_{name}"))
        flags = [flag for flag in flags if flag not in taken]
        if flag_of(name) in flags:
            nargs = 0 if option.is_switch else None
            hidden: dict[str, Any] = {"default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
            parser.add_argument(*flags, dest=name, action=_Neutral, nargs=nargs, **hidden)


class _Neutral(argparse.Action):
    """Checks an option of vLLM's, which sets nothing."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        is_on = not str(option_string).startswith("--no-")
        try:
            check_vllm_option(self.dest, is_on if self.nargs == 0 else value_of(values))
        except ValueError as error:
            parser.error(str(error))


def engine_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The engine options that were given, by name."""
    names = [field.name for _, field in all_options()]
    return {name: getattr(arguments, name) for name in names if name in arguments}


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


# vLLM's other flags of options that both have.
_OTHER_FLAGS = {
    "tensor_parallel_size": ("-tp",),
    "gpu_memory_utilization": ("--device-memory-utilization",),
    "state_dtype": ("--mamba-ssm-cache-dtype",),
}


def count(text: str) -> int:
    """Parse an integer. The suffixes k, m, g, t mean powers of 1000, and K, M, G, T of 1024."""
    match = re.fullmatch(r"(-?\d+(?:\.\d+)?)([kmgtKMGT]?)", text)
    if match is not None:
        from decimal import Decimal

        power = " kmgt".index(match[2].lower() or " ")
        value = Decimal(match[1]) * (1024 if match[2].isupper() else 1000) ** power
        if value == int(value):
            return int(value)
    raise argparse.ArgumentTypeError(f"must be an integer such as 4096, 4k or 4K, got '{text}'")


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


def _length(text: str) -> int | str:
    return AUTO if text in (AUTO, "-1") else count(text)


def _translated(name: str, parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """A parser that also takes vLLM's values of an option."""
    if name not in SAME_VALUES:
        return parse
    return lambda text: same_value(name, parse(text))


_PARSERS: dict[str, Callable[[str], Any]] = {
    "str": str,
    "path": str,
    "int": count,
    "length": _length,
    "float": float,
    "list": _json_parser("list"),
    "dict": _json_parser("dict"),
}


FlexibleArgumentParser = Parser  # vLLM's name
