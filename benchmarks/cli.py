"""Options of `compiledllm bench`. Names are those of `vllm bench` where they mean the same.

Imports nothing heavy: the work is in `compiledllm.benchmarks.run`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compiledllm.arguments import CommandParser, add_engine_options, count

ENGINES = ("compiledllm", "vllm", "transformers")
DATASETS = ("random", "sharegpt-like", "file")
SAMPLING = ("greedy", "temperature", "filtered", "one-penalised", "logprobs")
GOODPUT = ("ttft", "tpot", "e2el")
# Keys of `quantized_tilings.FORMATS`.
QUANTIZED_FORMATS = (
    *("fp8", "fp8_block", "int8", "int4", "mxfp4", "nvfp4"),
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"),
)


def add_bench_command(commands: Any) -> None:
    """Add the `bench` command and its sub-commands to `commands`."""
    bench = commands.add_parser("bench", help="measure, beside what the hardware allows")
    kinds = bench.add_subparsers(required=True, metavar="BENCHMARK")
    _add_latency(kinds)
    _add_throughput(kinds)
    _add_serve(kinds)
    _add_startup(kinds)
    _add_tilings(kinds)
    _add_compare(kinds)


def _add_latency(kinds: Any) -> None:
    parser = kinds.add_parser("latency", help="TTFT, TPOT and ITL of a batch that starts together")
    parser.set_defaults(run=_runner("latency"))
    add = parser.add_argument
    add("--batch-size", type=positive, nargs="+", default=[1, 8], metavar="N", help="(1 8)")
    add("--input-len", type=positive, nargs="+", default=[128], metavar="N", help="tokens (128)")
    add("--output-len", type=positive, default=129, metavar="N", help="tokens (129)")
    add(
        "--sampling", nargs="+", choices=SAMPLING, default=["greedy"],
        help="kinds of sampling; several take turns in one engine (greedy)",
    )  # fmt: skip
    _add_repeats(parser)
    _add_other(parser)
    _add_engines(parser)


def _add_throughput(kinds: Any) -> None:
    parser = kinds.add_parser("throughput", help="of requests that all start together, offline")
    parser.set_defaults(run=_runner("throughput"))
    _add_dataset(parser, "sharegpt-like")
    parser.add_argument(
        "--num-turns", type=positive, default=1, metavar="N",
        help="turns of each request: a further turn is all before and --turn-len new tokens; with "
        "more than one (1), engines have a prefix cache",
    )  # fmt: skip
    parser.add_argument(
        "--turn-len", type=positive, default=64, metavar="N", help="new tokens of a turn (64)"
    )
    _add_repeats(parser, warmups=False)
    _add_other(parser)
    _add_engines(parser)


def _add_serve(kinds: Any) -> None:
    parser = kinds.add_parser("serve", help="a client for any OpenAI-compatible server")
    parser.set_defaults(run=_runner("serve"))
    parser.add_argument("--base-url", default="http://127.0.0.1:8000", help="the server's address")
    parser.add_argument(
        "--endpoint", default="/v1/completions", help="completions or chat/completions"
    )
    parser.add_argument("--model", help="the name to ask for; default: the server's first")
    parser.add_argument(
        "--local-model",
        help="the server's model, if it runs on this machine: token ids of its vocabulary are "
        "sent, and floors are printed",
    )
    parser.add_argument(
        "--request-rate", type=_rate, nargs="+", default=[float("inf")], metavar="RATE",
        help="Poisson arrivals a second; inf: all at once",
    )  # fmt: skip
    parser.add_argument(
        "--burstiness", type=_rate, default=1.0, help="below 1: burstier than Poisson"
    )
    parser.add_argument("--max-concurrency", type=positive, help="max requests in flight")
    parser.add_argument(
        "--num-clients", type=positive, default=1, metavar="N",
        help="processes that share the requests, where one cannot keep up (1)",
    )  # fmt: skip
    parser.add_argument(
        "--goodput", nargs="+", type=_limit, default=[], metavar="METRIC:MS",
        help=f"limits that a good request stays within; metrics: {', '.join(GOODPUT)}",
    )  # fmt: skip
    parser.add_argument("--timeout", type=_rate, default=600.0, help="seconds for one request")
    parser.add_argument("--seed", type=count, help="seed of the requests")
    _add_dataset(parser, "random")
    _add_report(parser)


def _add_startup(kinds: Any) -> None:
    parser = kinds.add_parser("startup", help="process start to first token, phase by phase")
    parser.set_defaults(run=_runner("startup"))
    parser.add_argument("--input-len", type=positive, default=32, metavar="N", help="tokens (32)")
    parser.add_argument(
        "--num-iters-cold", type=_non_negative, default=1, help="starts with empty caches"
    )
    parser.add_argument("--num-iters-warm", type=_non_negative, default=3, help="starts after that")
    parser.add_argument(
        "--num-iters-built",
        type=_non_negative,
        default=0,
        help="starts from `compiledllm build`, with empty caches and no compiler",
    )
    _add_engines(parser)


def _add_compare(kinds: Any) -> None:
    parser = kinds.add_parser("compare", help="ratios between two reports, row by row")
    parser.set_defaults(run=_runner("compare"))
    parser.add_argument("a", type=Path, metavar="A.json")
    parser.add_argument("b", type=Path, metavar="B.json")
    parser.add_argument("--force", action="store_true", help="even if the hardware or work differs")
    _add_plot(parser)


def _add_tilings(kinds: Any) -> None:
    parser = kinds.add_parser(
        "tilings", help="find the fastest tilings of small matmuls and experts"
    )
    parser.set_defaults(run=_runner("tilings"))
    parser.add_argument(
        "models", nargs="+", metavar="MODEL", help="whose matmuls to measure; no weights are read"
    )
    parser.add_argument(
        "--rows", type=few_rows, nargs="+", default=[1, 8, 24], metavar="N",
        help="tokens per matmul: one number for each of 1, 2 to 16 and 17 to 32 (1 8 24); with "
        "quantised matrices, one for each of 1, 2 to 8, 9 to 16, 17 to 32 and 33 to 64; with "
        "experts, a number also serves half to twice as many tokens",
    )  # fmt: skip
    parser.add_argument(
        "--formats", nargs="+", choices=QUANTIZED_FORMATS, default=[], metavar="FORMAT",
        help="quantise the models' matrices in these formats: "
        f"{', '.join(QUANTIZED_FORMATS)} (default: the models' own formats)",
    )  # fmt: skip
    parser.add_argument(
        "--output-json", type=Path, metavar="FILE",
        help="default: where engines on this machine look for it",
    )  # fmt: skip


def _runner(name: str) -> Callable[[argparse.Namespace], int]:
    def run(arguments: argparse.Namespace) -> int:
        from compiledllm.benchmarks import run as runs

        function: Callable[[argparse.Namespace], int] = getattr(runs, f"run_{name}")
        return function(arguments)

    return run


# -- groups of options -----------------------------------------------------------------------------


def _add_engines(parser: CommandParser) -> None:
    parser.takes_vllm_options = True
    parser.add_argument(
        "--engine", nargs="+", choices=ENGINES, default=["compiledllm"],
        help="several take turns on the same work; ratios are the first one's to the others'",
    )  # fmt: skip
    parser.add_argument(
        "--hf-max-batch-size", type=positive, default=16, help="of transformers' generate (16)"
    )
    _add_report(parser)
    add_engine_options(parser.add_argument_group("engine"))


def _add_other(parser: CommandParser) -> None:
    parser.add_argument(
        "--other", nargs="+", action="extend", type=_other, default=[], metavar="LABEL=PYTHON",
        help="engines of other Python environments take turns, too: vLLM if the label begins with "
        "vllm, otherwise another version of compiledllm",
    )  # fmt: skip
    parser.add_argument(
        "--lock", type=Path, metavar="FILE",
        help="benchmarks that are started with the same FILE load their engines together and then "
        "measure one after another; on a GPU with --kv-cache-memory-bytes",
    )  # fmt: skip


def _other(text: str) -> tuple[str, str]:
    label, _, python = text.partition("=")
    if not label or not python:
        raise argparse.ArgumentTypeError(f"'{text}' is not LABEL=PYTHON: 0.1=/env/bin/python")
    return label, python


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output-json", type=Path, metavar="FILE", help="default: standard output")
    _add_plot(parser)


def _add_plot(parser: argparse.ArgumentParser) -> None:
    plot = "a picture of the report; SVG unless FILE has another suffix"
    parser.add_argument("--plot", type=Path, metavar="FILE", help=plot)


def _add_repeats(parser: argparse.ArgumentParser, warmups: bool = True) -> None:
    parser.add_argument("--num-iters", type=positive, default=3, help="measurements of each row")
    if warmups:
        parser.add_argument(
            "--num-iters-warmup", type=_non_negative, default=1, help="rounds before measuring"
        )


def _add_dataset(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--dataset-name", choices=DATASETS, default=default,
        help=f"random: fixed lengths; sharegpt-like: long-tailed lengths (default: {default})",
    )  # fmt: skip
    parser.add_argument(
        "--dataset-path", type=Path, metavar="FILE",
        help='JSON lines with "prompt" or "prompt_token_ids", or a ShareGPT array',
    )  # fmt: skip
    parser.add_argument(
        "--num-prompts", type=positive, help="default: 512, or the whole file", metavar="N"
    )
    parser.add_argument(
        "--input-len", type=positive, default=1024, metavar="N", help="tokens of random prompts"
    )
    parser.add_argument(
        "--output-len", type=positive, default=128, metavar="N",
        help="output tokens of a request, unless the dataset says",
    )  # fmt: skip


# -- values ----------------------------------------------------------------------------------------


def positive(text: str) -> int:
    return _at_least(1, text)


def _non_negative(text: str) -> int:
    return _at_least(0, text)


def _at_least(minimum: int, text: str) -> int:
    value = count(text)
    if value < minimum:
        raise argparse.ArgumentTypeError(f"must be at least {minimum}, got {value}")
    return value


def few_rows(text: str) -> int:
    value = positive(text)
    if value > 64:
        raise argparse.ArgumentTypeError(f"must be at most 64, got {value}; libraries compute more")
    return value


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got '{text}'")
    return value


def _limit(text: str) -> tuple[str, float]:
    """Parse one --goodput limit, METRIC:MILLISECONDS."""
    metric, _, value = text.partition(":")
    if metric not in GOODPUT:
        raise argparse.ArgumentTypeError(
            f"must be METRIC:MS with METRIC one of {', '.join(GOODPUT)}, got '{text}'"
        )
    return metric, _rate(value)
