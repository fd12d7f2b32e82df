"""`compiledllm completion SHELL`: a script that completes commands, options and their values.

The script is made from the parser itself, so it has all commands and options that --help shows.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The script for a shell. bash and zsh: `eval "$(compiledllm completion bash)"`."""
    commands = dict(_commands(parser))
    return _fish(commands) if shell == "fish" else _bash(commands, is_zsh=shell == "zsh")


def _commands(
    parser: argparse.ArgumentParser, path: str = ""
) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Every command by its words: "", "serve", "bench", "bench latency"."""
    yield path, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, child in action.choices.items():
                yield from _commands(child, f"{path} {name}".strip())


def _words(parser: argparse.ArgumentParser) -> list[str]:
    """The words that may follow a command: its sub-commands, choices and options."""
    found: list[str] = []
    for action in _shown(parser):
        if isinstance(action, argparse._SubParsersAction):
            found += action.choices
        elif not action.option_strings and action.choices:
            found += map(str, action.choices)
        found += [flag for flag in action.option_strings if flag.startswith("--")]
    return found


def _values(parser: argparse.ArgumentParser) -> dict[str, list[str]]:
    """Option -> the values that it takes, for options with a list of them."""
    return {
        flag: [str(choice) for choice in action.choices]
        for action in _shown(parser)
        if action.choices and not isinstance(action, argparse._SubParsersAction)
        for flag in action.option_strings
    }


def _shown(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return [action for action in parser._actions if action.help != argparse.SUPPRESS]


# -- shells ----------------------------------------------------------------------------------------


def _bash(commands: dict[str, argparse.ArgumentParser], is_zsh: bool) -> str:
    """A function for bash, which zsh runs through bashcompinit.

    It finds the longest command among the words before the cursor, and completes files where it
    knows nothing better.
    """
    cases = "\n".join(
        f"    {shlex.quote(path)}) words={shlex.quote(' '.join(_words(parser)))} ;;"
        for path, parser in commands.items()
    )
    values = "\n".join(
        f"    {shlex.quote(f'{path} {flag}'.strip())}) values={shlex.quote(' '.join(known))} ;;"
        for path, parser in commands.items()
        for flag, known in _values(parser).items()
    )
    names = shlex.quote("|".join(["", *filter(None, commands), ""]))
    start = "autoload -U +X bashcompinit && bashcompinit\n" if is_zsh else ""
    return f"""{start}_compiledllm() {{
  local current=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}}
  local command="" next word words="" values="" names={names}
  for word in "${{COMP_WORDS[@]:1:$((COMP_CWORD - 1))}}"; do
    next="${{command:+$command }}$word"
    case "$names" in *"|$next|"*) command="$next" ;; esac
  done
  case "$command $before" in
{values}
  esac
  case "$command" in
{cases}
  esac
  if [ -n "$values" ]; then words="$values"; fi
  COMPREPLY=( $(compgen -W "$words" -- "$current") )
  if [ ${{#COMPREPLY[@]}} -eq 0 ]; then COMPREPLY=( $(compgen -f -- "$current") ); fi
}}
complete -F _compiledllm compiledllm
"""


def _fish(commands: dict[str, argparse.ArgumentParser]) -> str:
    paths = " ".join(shlex.quote(path) for path in commands if path)
    start = f"""function __compiledllm_at
    set -l found
    for word in (commandline -opc)[2..]
        contains -- (string join -- ' ' $found $word) {paths}; and set -a found $word
    end
    set -l command (string join -- ' ' $found)
    test "$command" = "$argv"
end
"""
    lines = [_fish_line(path, a) for path, parser in commands.items() for a in _shown(parser)]
    return start + "\n".join(filter(None, lines)) + "\n"


def _fish_line(path: str, action: argparse.Action) -> str:
    start = f"complete -c compiledllm -n '__compiledllm_at {path}'"
    if isinstance(action, argparse._SubParsersAction):
        return f"{start} -f -a {shlex.quote(' '.join(action.choices))}"
    flags = [flag[2:] for flag in action.option_strings if flag.startswith("--")]
    if not flags:
        names = " ".join(map(str, action.choices or []))
        return f"{start} -f -a {shlex.quote(names)}" if names else ""
    text = " ".join(f"-l {flag}" for flag in flags)
    if action.choices:
        text += f" -x -a {shlex.quote(' '.join(map(str, action.choices)))}"
    elif action.nargs != 0:
        text += " -r"
    return f"{start} {text} -d {shlex.quote(str(action.help).partition(':')[0][:60])}"
