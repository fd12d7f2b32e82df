"""Measures the gaps between the tokens of streams while one long prompt is computed beside them.

    python -m compiledllm.benchmarks.gaps MODEL --target-itl-ms 30 --output-json FILE

MODEL and all engine options are those of `compiledllm generate`. Two engines, one after the other:
one without a target of the inter-token latency (ITL) and one with `--target-itl-ms`, 30 if it is
not given. Each decodes `--num-streams` requests with a context of `--stream-len` tokens, and
computes a prompt of `--prompt-len` tokens beside them, `--num-iters` times after a first time that
does not count. A gap is the time between two tokens of one stream, seen from Python.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from compiledllm import Engine, SamplingParams
from compiledllm.arguments import CommandParser, add_engine_options, engine_options
from compiledllm.benchmarks.report import (
    Row,
    percentiles,
    run_script,
    script_facts,
    spread,
    write_facts,
)
from compiledllm.benchmarks.workload import random_requests
from compiledllm.config import ConfigError
from compiledllm.platform import Platform

_DEFAULT_TARGET_MS = 30.0


@dataclass(slots=True)
class Gaps:
    """Milliseconds between tokens, of all streams together, and seconds of the long prompts."""

    beside_ms: list[float] = field(default_factory=list)
    alone_ms: list[float] = field(default_factory=list)  # without a prompt beside them
    prompt_s: list[float] = field(default_factory=list)

    def row(self, target_ms: float | None, bound_ms: float, slowdown: float | None) -> Row:
        """A row of the report. bound_ms: the row has the share of gaps that are longer.

        slowdown: the factor that the scheduler's ITL target has learnt; None without a target.
        """
        beside, alone = percentiles(self.beside_ms), percentiles(self.alone_ms)
        longer = sum(gap > bound_ms for gap in self.beside_ms)
        return {
            "target_itl_ms": target_ms,
            "gaps": len(self.beside_ms),
            "gap_ms": beside | {"max": max(self.beside_ms)},
            "p99_by_p50": round(beside["p99"] / beside["p50"], 3),
            "percent_longer": {"than_ms": bound_ms, "is": 100 * longer / len(self.beside_ms)},
            "gap_alone_ms": alone,
            "prompt_s": spread(self.prompt_s),
            "slowdown": slowdown,
        }


class Streams:
    """Requests that decode until they are stopped, and the times of their tokens."""

    def __init__(self, engine: Engine, options: Namespace, seed: int) -> None:
        self._engine, self._seed = engine, seed
        self._vocab_size = engine.core.spec.vocab_size
        self._last: dict[str, float] = {}
        count, length = options.num_streams, options.stream_len
        limits = engine.config.limits
        limit = limits.max_model_len
        assert limit is not None
        expect_at_most("--num-streams", count, "max_num_seqs", limits.max_num_seqs)
        for name, tokens in (("--stream-len", length), ("--prompt-len", options.prompt_len)):
            expect_at_most(name, tokens, "max_model_len - 1", limit - 1)
        for prompt in self._prompts(count, length, seed):
            self._last[self._add(prompt, limit - length)] = 0.0
        waiting = set(self._last)
        while waiting:
            waiting -= {output.request_id for output in engine.step()}

    def _prompts(self, count: int, length: int, seed: int) -> list[list[int]]:
        found = random_requests(count, length, 1, self._vocab_size, seed)
        return [ids for request in found if isinstance(ids := request.prompt, list)]

    def _add(self, prompt: list[int], max_tokens: int) -> str:
        params = SamplingParams(
            temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False
        )
        return self._engine.add_request(prompt, params)

    def alone(self, num_steps: int, gaps: Gaps) -> None:
        """Run `num_steps` steps without a prompt beside the streams, and add their gaps."""
        steps = iter(range(num_steps - 1))
        self._start_clock()
        gaps.alone_ms += self._gaps_ms(lambda _: next(steps, None) is None)

    def beside_prompt(self, length: int, gaps: Gaps) -> None:
        """Compute a prompt of `length` tokens beside the streams; add the gaps until it is done."""
        (prompt,) = self._prompts(1, length, self._seed + 1)
        started = self._start_clock()
        request_id = self._add(prompt, 1)
        gaps.beside_ms += self._gaps_ms(lambda request_ids: request_id in request_ids)
        gaps.prompt_s.append(time.perf_counter() - started)

    def _start_clock(self) -> float:
        now = time.perf_counter()
        self._last = dict.fromkeys(self._last, now)
        return now

    def _gaps_ms(self, is_over: Callable[[set[str]], bool]) -> Iterator[float]:
        """The gaps until `is_over`, which is called with the ids of the requests of each step."""
        while True:
            request_ids = {output.request_id for output in self._engine.step()}
            now = time.perf_counter()
            for request_id in request_ids & self._last.keys():
                yield (now - self._last[request_id]) * 1e3
                self._last[request_id] = now
            if is_over(request_ids):
                return

    def stop(self) -> None:
        for request_id in self._last:
            self._engine.abort_request(request_id)
        while self._engine.has_unfinished_requests():
            self._engine.step()


def expect_at_most(option: str, value: int, name: str, limit: int | None) -> None:
    """Raise ConfigError for a size that the engine cannot run."""
    if limit is not None and value > limit:
        raise ConfigError(f"{option} {value} is more than {name}, {limit}; ask for less")


def measure(options: Namespace, of_engine: dict[str, Any], target_ms: float | None) -> Row:
    """Measure one engine. of_engine: its options, except that target_ms is its ITL target."""
    fixed = {"skip_tokenizer_init": True, "enable_prefix_caching": False}
    engine = Engine(**(of_engine | fixed | {"target_itl_ms": target_ms}))
    gaps = Gaps()
    for turn in range(options.num_iters + 1):
        found = Gaps() if turn == 0 else gaps
        streams = Streams(engine, options, 10 * turn)
        streams.alone(options.num_steps_alone, found)
        streams.beside_prompt(options.prompt_len, found)
        streams.stop()
    target = engine.core.scheduler.pace.target
    bound_ms = of_engine["target_itl_ms"]
    return gaps.row(target_ms, bound_ms, None if target is None else round(target.slowdown, 3))


def main(arguments: list[str]) -> None:
    parser = CommandParser(prog="python -m compiledllm.benchmarks.gaps", allow_abbrev=False)
    add = parser.add_argument
    add("model")
    sizes = {"num_streams": 32, "stream_len": 1000, "prompt_len": 32000}
    sizes |= {"num_steps_alone": 200, "num_iters": 3}
    for name, size in sizes.items():
        add(f"--{name.replace('_', '-')}", type=int, default=size, help=f"({size})")
    add("--output-json", type=Path, help="default: standard output")
    add_engine_options(parser.add_argument_group("engine"))
    options = parser.parse_args(arguments)
    of_engine = {"target_itl_ms": _DEFAULT_TARGET_MS} | engine_options(options)
    rows = []
    for target_ms in (None, of_engine["target_itl_ms"]):
        rows.append(measure(options, of_engine, target_ms))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        gc.collect()  # the next engine needs the memory of this one
        torch.cuda.empty_cache()
    facts = {"work": {name: getattr(options, name) for name in sizes}, "rows": rows}
    write_facts(script_facts("gaps", Platform.detect()) | facts, options.output_json)


if __name__ == "__main__":
    run_script(main)
