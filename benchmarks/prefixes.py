"""Measures what the prefix cache saves, and what it costs where prompts share nothing.

    python -m compiledllm.benchmarks.prefixes MODEL --output-json FILE

MODEL and all engine options are those of `compiledllm generate`. The report has three rows:

- chat: the first turn is a prompt of `--chat-len` tokens and an answer; the second turn's prompt is
  both of these and `--turn-len` more tokens. Measures the second turn's time to first token, with
  the cache and without it.
- shared: the time to first token of a prompt that shares its first `--shared-len` tokens with two
  earlier prompts.
- apart: output tokens per second of `--num-prompts` prompts that share nothing, with the cache and
  without it, taking turns.

Each row also counts the engine's steps and, for models with states, the snapshots that were saved,
restored and kept.
"""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from compiledllm import Engine, SamplingParams
from compiledllm.arguments import CommandParser, add_engine_options, engine_options
from compiledllm.benchmarks.report import (
    Row,
    collected,
    run_script,
    script_facts,
    spread,
    write_facts,
)
from compiledllm.benchmarks.workload import random_requests
from compiledllm.platform import Platform
from compiledllm.types import SchedulerOutput

_MEMORY_PER_ENGINE = 0.45  # fraction of the GPU's memory for each of the two engines


class Counted:
    """An engine whose steps, and the states that they save, restore and keep, are counted."""

    def __init__(self, options: dict[str, Any], caches: bool) -> None:
        fixed = {"skip_tokenizer_init": True, "enable_prefix_caching": caches}
        self.engine = Engine(**(options | fixed))
        self.counts = dict.fromkeys(("steps", "saved", "restored", "kept"), 0)
        schedule = self.engine.core.scheduler.schedule

        def counted() -> SchedulerOutput:
            step = schedule()
            self.counts["steps"] += 1
            for name in ("saved", "restored", "kept"):
                self.counts[name] += len(getattr(step, f"{name}_states"))
            return step

        self.engine.core.scheduler.schedule = counted  # type: ignore[method-assign]

    def generate(self, prompts: Sequence[list[int]], max_tokens: int) -> tuple[float, list[Any]]:
        """Generate greedily from token ids. Returns the duration in seconds, and the outputs."""
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        self.counts.update(dict.fromkeys(self.counts, 0))
        start = time.perf_counter()
        outputs = self.engine.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - start, outputs


def measure(options: Namespace, on: Counted, off: Counted) -> Iterator[Row]:
    """Yield the three rows. on, off: the engines with and without a prefix cache."""
    vocab_size = on.engine.core.spec.vocab_size

    def prompts(count: int, length: int, seed: int) -> list[list[int]]:
        found = random_requests(count, length, 1, vocab_size, seed)
        return [ids for request in found if isinstance(ids := request.prompt, list)]

    for engine in (on, off):  # compile and capture before measuring
        engine.generate(prompts(2, 64, -1), 4)
    yield _chat(options, on, off, prompts)
    (shared,) = prompts(1, options.shared_len, -2)
    ends = prompts(2, 40, -3)
    on.generate([shared + ends[0]], 1)
    on.generate([shared + ends[1]], 1)  # diverges after the shared tokens: takes a snapshot there
    seconds, (output,) = on.generate([shared + ends[0][::-1]], 1)
    yield {"row": "shared", "cached": output.num_cached_tokens, "s": seconds, **on.counts}
    yield _apart(options, on, off, prompts)


def _chat(options: Namespace, on: Counted, off: Counted, prompts: Any) -> Row:
    found: dict[str, list[float]] = {"cold": [], "warm": []}
    for seed in range(options.num_iters):
        (prompt,) = prompts(1, options.chat_len, seed)
        (turn,) = prompts(1, options.turn_len, 1000 + seed)
        _, (output,) = on.generate([prompt], options.answer_len)
        second = prompt + list(output.outputs[0].token_ids) + turn
        seconds, (output,) = on.generate([second], 1)
        found["warm"].append(seconds)
        found["cold"].append(off.generate([second], 1)[0])
    warm, cold = spread(found["warm"]), spread(found["cold"])
    return {
        "row": "chat",
        "tokens": len(second),
        "new": options.turn_len,
        "computed": len(second) - output.num_cached_tokens,
        "warm_s": warm,
        "cold_s": cold,
        "warm_by_cold": round(warm["median"] / cold["median"], 4),
        **on.counts,
    }


def _apart(options: Namespace, on: Counted, off: Counted, prompts: Any) -> Row:
    rates: dict[str, list[float]] = {"on": [], "off": []}
    counts: dict[str, dict[str, int]] = {}
    for seed in range(options.num_iters):
        batch = prompts(options.num_prompts, options.input_len, 5000 + seed)
        for name, engine in (("on", on), ("off", off))[:: 1 if seed % 2 else -1]:
            seconds, _ = engine.generate(batch, options.output_len)
            rates[name].append(options.num_prompts * options.output_len / seconds)
            counts[name] = dict(engine.counts)
    spreads = {name: spread(values) for name, values in rates.items()}
    return {
        "row": "apart",
        "tokens_per_s": spreads,
        "on_by_off": round(spreads["on"]["median"] / spreads["off"]["median"], 4),
        "counts": counts,
    }


def main(arguments: list[str]) -> None:
    parser = CommandParser(prog="python -m compiledllm.benchmarks.prefixes", allow_abbrev=False)
    add = parser.add_argument
    add("model")
    sizes = {"chat-len": 20000, "answer-len": 200, "turn-len": 50, "shared-len": 500}
    sizes |= {"num-prompts": 64, "input-len": 512, "output-len": 128, "num-iters": 3}
    for name, size in sizes.items():
        add(f"--{name}", type=int, default=size, help=f"({size})")
    add("--output-json", type=Path, help="default: standard output")
    add_engine_options(parser.add_argument_group("engine"))
    options = parser.parse_args(arguments)
    platform = Platform.detect()
    of_engine = engine_options(options)
    if platform.is_cuda:
        of_engine = {"gpu_memory_utilization": _MEMORY_PER_ENGINE} | of_engine
    on, off = (Counted(of_engine, caches) for caches in (True, False))
    rows = collected(measure(options, on, off))
    facts = {"state_bytes": on.engine.core.spec.bytes_per_request, "rows": rows}
    write_facts(script_facts("prefixes", platform) | facts, options.output_json)


if __name__ == "__main__":
    run_script(main)
