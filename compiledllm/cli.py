"""The `compiledllm` command. Engine options come from the fields of `compiledllm.config`.

Heavy modules are imported only when a sub-command runs, so that --help answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compiledllm import bytecode
from compiledllm.arguments import (
    CommandParser,
    Parser,
    add_engine_options,
    engine_options,
)
from compiledllm.benchmarks.cli import add_bench_command, positive
from compiledllm.config import ConfigError, EngineConfig
from compiledllm.engine_options import DTYPES, KV_CACHE_DTYPES, MODEL_IMPLS, QUANTIZATIONS
from compiledllm.outputs import RequestOutput
from compiledllm.sampling_options import add_sampling_options, sampling_params_of
from compiledllm.server.options import add_batch_options, add_server_options
from compiledllm.terminal_chat import SHORT_HELP, Chat, speed
from compiledllm.version import __version__
from compiledllm.vllm_options import same_value

if TYPE_CHECKING:
    from compiledllm.engine.engine import Engine

DEFAULT_MAX_TOKENS = 256
SHELLS = ("bash", "zsh", "fish")  # that `completion` knows


def main(argv: list[str] | None = None) -> int:
    """Entry point. Exit status: 0; 2: bad argument; 130: Ctrl-C; 141: nobody reads the output."""
    arguments = _parser().parse_args(argv)
    try:
        status: int = arguments.run(arguments)
        return status
    except ValueError as error:  # a ConfigError, too
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of stdout has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


# -- generate --------------------------------------------------------------------------------------


def _generate(arguments: argparse.Namespace) -> int:
    params = sampling_params_of(arguments, max_tokens=DEFAULT_MAX_TOKENS)
    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    engine = _make_engine(arguments)
    if arguments.chat or arguments.system:
        system = [{"role": "system", "content": arguments.system}] if arguments.system else []
        outputs = engine.stream_chat([*system, {"role": "user", "content": prompt}], params)
    else:
        outputs = engine.stream(prompt, params)
        if not arguments.json and not arguments.quiet:
            print(prompt, end="", flush=True)
    if arguments.json:
        last = list(outputs)[-1]
        print(json.dumps(_as_json(last), ensure_ascii=False))
        return 0
    last = _print_stream(outputs)
    if not arguments.quiet:
        print(speed(last), file=sys.stderr)
    return 0


def _print_stream(outputs: Iterable[RequestOutput]) -> RequestOutput:
    """Print text as it becomes final; returns the last output."""
    shown = 0
    last: RequestOutput | None = None
    for last in outputs:
        text = last.outputs[0].text
        print(text[shown:], end="", flush=True)
        shown = len(text)
    print(flush=True)
    assert last is not None
    return last


def _as_json(output: RequestOutput) -> dict[str, Any]:
    completion = output.outputs[0]
    return {
        "prompt": output.prompt,
        "text": completion.text,
        "prompt_tokens": len(output.prompt_token_ids),
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
    }


# -- chat ------------------------------------------------------------------------------------------


def _chat(arguments: argparse.Namespace) -> int:
    params = sampling_params_of(arguments, max_tokens=None)
    engine = _make_engine(arguments)
    if not arguments.quiet:
        print(f"compiledllm {__version__}, {engine.model_path.name}. {SHORT_HELP}")
    Chat(engine, params, arguments.system, shows_speed=not arguments.quiet).run()
    return 0


# -- serve, run-batch ------------------------------------------------------------------------------


def _serve(arguments: argparse.Namespace) -> int:
    with bytecode.kept(getattr(arguments, "artifact_dir", None)):
        with _server_packages():
            from compiledllm.server.launch import serve
        return serve(_with_model(arguments))


def _run_batch(arguments: argparse.Namespace) -> int:
    with bytecode.kept(getattr(arguments, "artifact_dir", None)):
        with _server_packages():
            from compiledllm.server.run_batch import run_batch
        return run_batch(_with_model(arguments))


@contextlib.contextmanager
def _server_packages() -> Iterator[None]:
    """For imports that need the extra `server`. Raises ConfigError if a package is missing."""
    try:
        yield
    except ImportError as error:
        raise ConfigError(
            f"the server needs more packages ({error}): pip install 'compiledllm[server]'"
        ) from None


# -- info ------------------------------------------------------------------------------------------


@bytecode.kept()
def _info(arguments: argparse.Namespace) -> int:
    from compiledllm.engine.plan_views import facts, readable
    from compiledllm.engine.startup import plan

    names = (
        "model revision dtype model_impl quantization kv_cache_dtype device tensor_parallel_size "
        "persistent_decode"
    )
    options = {name: getattr(arguments, name) for name in names.split()}
    if arguments.kernels is not None:
        return _info_kernels(arguments, options)
    # With random weights, no weight files are needed.
    found = facts(plan(EngineConfig.from_options(**options, load_format="dummy")))
    if arguments.json:
        print(json.dumps(found))
        return 0
    for name, value in readable(found).items():
        print(f"{name:28} {value}")
    return 0


def _info_kernels(arguments: argparse.Namespace, options: dict[str, Any]) -> int:
    from compiledllm.benchmarks.kernels import lines_of, measure_kernels

    if arguments.tensor_parallel_size != 1:
        raise ConfigError(
            f"--kernels measures a model on one GPU, and --tensor-parallel-size "
            f"{arguments.tensor_parallel_size} divides it; leave one of them out"
        )
    rows = arguments.kernels or [1, 8, 32]
    steps = measure_kernels(options, rows, arguments.context_len)
    if arguments.json:
        print(json.dumps([step.facts() for step in steps]))
        return 0
    for step in steps:
        print("\n".join(lines_of(step)))
    return 0


# -- build, cache ----------------------------------------------------------------------------------


@bytecode.kept()
def _build(arguments: argparse.Namespace) -> int:
    from compiledllm.engine.build import build

    print(build(engine_options(_with_model(arguments)), arguments.out))
    return 0


def _cache(arguments: argparse.Namespace) -> int:
    from compiledllm.engine import build

    if arguments.action == "list":
        for line in build.lines_of_list(arguments.artifact_dir):
            print(line)
    elif arguments.action == "clear":
        print(build.clear())
    else:
        print(build.explanation(engine_options(_with_model(arguments))))
    return 0


# -- env, completion -------------------------------------------------------------------------------


def _env(arguments: argparse.Namespace) -> int:
    from compiledllm.environment import facts

    found = facts()
    if arguments.json:
        print(json.dumps(found))
        return 0
    for name, value in found.items():
        print(f"{name:20} {value}")
    return 0


def _completion(arguments: argparse.Namespace) -> int:
    from compiledllm.shell_completion import script

    print(script(_parser(), arguments.shell), end="")
    return 0


# -- options ---------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="compiledllm", description="A compiler-driven LLM inference engine.")
    parser.add_argument("--version", action="version", version=f"compiledllm {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=CommandParser)

    generate = commands.add_parser("generate", help="complete a prompt, streaming")
    _add_model(generate)
    generate.add_argument("prompt", help="the prompt; '-' reads it from standard input")
    generate.add_argument("--chat", action="store_true", help="apply the chat template")
    generate.add_argument("--json", action="store_true", help="print one JSON object at the end")
    generate.set_defaults(run=_generate)

    chat = commands.add_parser("chat", help="talk to a model in the terminal")
    _add_model(chat)
    chat.set_defaults(run=_chat)

    for command in (generate, chat):
        command.add_argument("--system", metavar="TEXT", help="the system prompt of the chat")
        command.add_argument("-q", "--quiet", action="store_true", help="print answers alone")
        add_sampling_options(command.add_argument_group("sampling"))
        add_engine_options(command.add_argument_group("engine"))
        command.takes_vllm_options = True

    serve = commands.add_parser("serve", help="an OpenAI-compatible server")
    add_server_options(serve.add_argument_group("server"))
    serve.set_defaults(run=_serve)

    batch = commands.add_parser("run-batch", help="answer a file of OpenAI's batch requests")
    add_batch_options(batch.add_argument_group("batch"))
    batch.set_defaults(run=_run_batch)

    for command in (serve, batch):
        _add_model(command)
        add_engine_options(command.add_argument_group("engine"))
        command.takes_vllm_options = True
        hidden: dict[str, Any] = {"default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
        command.add_argument("-q", dest="quantization", type=_quantization, **hidden)  # vLLM's

    _add_info(commands)
    add_bench_command(commands)
    _add_build(commands)

    env = commands.add_parser("env", help="versions and devices, for a bug report")
    env.add_argument("--json", action="store_true", help="print one JSON object")
    env.set_defaults(run=_env)

    completion = commands.add_parser(
        "completion", help='complete in a shell: eval "$(compiledllm completion bash)"'
    )
    completion.add_argument("shell", choices=SHELLS, metavar="SHELL", help=", ".join(SHELLS))
    completion.set_defaults(run=_completion)
    return parser


def _add_info(commands: Any) -> None:
    info = commands.add_parser("info", help="what a model is and what fits on this machine")
    info.add_argument("model", nargs="?", help="local directory, .gguf file or Hugging Face id")
    info.add_argument("--revision", help="branch, tag or commit on the hub")
    info.add_argument("--dtype", default="auto", choices=DTYPES, help="dtype of the weights")
    info.add_argument("--model-impl", default="auto", choices=MODEL_IMPLS, help="implementation")
    info.add_argument("--quantization", choices=QUANTIZATIONS, help="quantise while loading")
    info.add_argument(
        "--kv-cache-dtype", default="auto", choices=KV_CACHE_DTYPES, help="dtype of the KV cache"
    )
    info.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    info.add_argument(
        "--tensor-parallel-size", "-tp", type=int, default=1, help="what each of N GPUs holds"
    )
    info.add_argument(
        "--persistent-decode",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="with --kernels: all layers of a small step in one kernel, where that is faster",
    )
    info.add_argument(
        "--kernels",
        type=positive,
        nargs="*",
        metavar="N",
        help="run decode steps of N requests with random weights (1 8 32), and print the times of "
        "their kernels (on a CPU, operators) beside what the hardware allows",
    )
    info.add_argument(
        "--context-len", type=positive, default=1024, metavar="N",
        help="tokens of each of these requests (1024)",
    )  # fmt: skip
    info.add_argument("--json", action="store_true", help="print one JSON object")
    info.set_defaults(run=_info)


def _add_build(commands: Any) -> None:
    """Add `build` and `cache`, which make and show the files that starts keep."""
    build = commands.add_parser("build", help="compile a model now, so that starts need not")
    _add_model(build)
    build.add_argument(
        "--out", type=Path, metavar="DIR", help="where the artifact goes (the cache)"
    )
    add_engine_options(build.add_argument_group("engine"))
    build.takes_vllm_options = True
    build.set_defaults(run=_build)

    cache = commands.add_parser("cache", help="files that starts keep, and why a start uses none")
    actions = cache.add_subparsers(required=True, metavar="ACTION", parser_class=CommandParser)
    kept = actions.add_parser("list", help="the kept artifacts and tokenizers")
    kept.add_argument("--artifact-dir", metavar="DIR", help="also this folder of `build --out`")
    explain = actions.add_parser("explain", help="whether a start would compile, and why")
    _add_model(explain)
    add_engine_options(explain.add_argument_group("engine"))
    explain.takes_vllm_options = True
    clear = actions.add_parser("clear", help="remove all compiled code from the cache")
    for name, action in (("list", kept), ("explain", explain), ("clear", clear)):
        action.set_defaults(run=_cache, action=name)


def _quantization(text: str) -> str:
    name: str = same_value("quantization", text)
    if name not in QUANTIZATIONS:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(QUANTIZATIONS)}, got '{text}'")
    return name


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument("model_name", nargs="?", metavar="MODEL", help="the same as --model")


def _with_model(arguments: argparse.Namespace) -> argparse.Namespace:
    """The arguments, in which a positional MODEL takes precedence over --model."""
    if arguments.model_name is not None:
        arguments.model = arguments.model_name
    return arguments


def _make_engine(arguments: argparse.Namespace) -> Engine:
    import logging

    from compiledllm.engine.engine import Engine

    if arguments.quiet:
        logging.getLogger("compiledllm").setLevel(logging.WARNING)
    return Engine(**engine_options(_with_model(arguments)))


if __name__ == "__main__":
    sys.exit(main())
