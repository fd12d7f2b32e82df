"""The engine against transformers' generate on a CPU: same model, prompts, dtype and threads.

    python benchmarks/cpu_vs_transformers.py [--dtype bfloat16 float32] [--output-json FILE]

Two kinds of work: one request alone (decode tokens per second), and 16 requests at once against the
same 16 one after another through transformers (tokens per second over the whole time, prefill
included). The two engines take turns; the table gives medians and the spread over the repeats.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from compiledllm import Engine, SamplingParams, __version__
from compiledllm.platform import Platform

NUM_CONCURRENT = 16
Prompts = list[list[int]]
Generate = Callable[[Prompts, int], None]


@dataclass(frozen=True)
class Row:
    """Tokens per second of both engines at one kind of work, over the repeats."""

    dtype: str
    work: str
    mode: str
    ours: list[float]
    transformers: list[float]

    @property
    def ratio(self) -> float:
        return statistics.median(self.ours) / statistics.median(self.transformers)


def main() -> None:
    arguments = parse_arguments()
    rows = [row for dtype in arguments.dtype for row in measure(dtype, arguments)]
    print_table(rows)
    result = conditions(arguments) | {"rows": [asdict(row) | {"ratio": row.ratio} for row in rows]}
    if arguments.output_json:
        arguments.output_json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default=None, help="default: SmolLM2-135M-Instruct")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output-json", type=Path, default=None)
    return parser.parse_args()


def measure(dtype: str, arguments: argparse.Namespace) -> list[Row]:
    """Eager and compiled, alone and in a crowd, each interleaved with transformers."""
    engine = Engine(
        arguments.model, device="cpu", dtype=dtype, enforce_eager=True, skip_tokenizer_init=True
    )
    peer = load_transformers(engine.model_path, dtype)
    ours = generate_with(engine)
    rows = measure_mode("eager", dtype, ours, peer, engine.core.spec.vocab_size, arguments)
    engine.core.runner.compiler.compile()
    rows += measure_mode("compiled", dtype, ours, peer, engine.core.spec.vocab_size, arguments)
    return rows


def measure_mode(
    mode: str, dtype: str, ours: Generate, peer: Generate, vocab: int, arguments: argparse.Namespace
) -> list[Row]:
    rng = random.Random(4242)
    rows = []
    for work, count in (("alone", 1), (f"{NUM_CONCURRENT} at once", NUM_CONCURRENT)):
        rates: dict[str, list[float]] = {"ours": [], "peer": []}
        for repeat in range(arguments.repeats + 1):  # the first round warms up
            prompts = make_prompts(rng, count, arguments.input_len, vocab)
            for name, generate in (("ours", ours), ("peer", peer)):
                rate = tokens_per_second(generate, prompts, arguments.output_len, count == 1)
                if repeat:
                    rates[name].append(rate)
        rows.append(Row(dtype, work, mode, rates["ours"], rates["peer"]))
        print(f"{dtype} {mode} {work}: {rows[-1].ratio:.2f}x", flush=True)
    return rows


def make_prompts(rng: random.Random, count: int, length: int, vocab: int) -> Prompts:
    return [[rng.randrange(10, vocab - 10) for _ in range(length)] for _ in range(count)]


def tokens_per_second(generate: Generate, prompts: Prompts, output_len: int, decode: bool) -> float:
    """Of the whole work, or with `decode` of the tokens after the first."""
    first = timed(generate, prompts, 1) if decode else 0.0
    tokens = len(prompts) * (output_len - decode)
    return tokens / (timed(generate, prompts, output_len) - first)


def timed(generate: Generate, prompts: Prompts, output_len: int) -> float:
    start = time.perf_counter()
    generate(prompts, output_len)
    return time.perf_counter() - start


def generate_with(engine: Engine) -> Generate:
    def generate(prompts: Prompts, output_len: int) -> None:
        engine.core.scheduler.block_pool.reset_prefix_cache()
        params = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True)
        outputs = engine.generate(prompts, params, use_tqdm=False)
        assert all(len(output.outputs[0].token_ids) == output_len for output in outputs)

    return generate


def load_transformers(checkpoint: Path, dtype: str) -> Generate:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=getattr(torch, dtype), attn_implementation="sdpa"
    ).eval()

    @torch.inference_mode()
    def generate(prompts: Prompts, output_len: int) -> None:
        config = transformers.GenerationConfig(
            max_new_tokens=output_len,
            min_new_tokens=output_len,
            do_sample=False,
            cache_implementation="static",
            eos_token_id=None,
            pad_token_id=0,
        )
        for prompt in prompts:
            ids = torch.tensor([prompt])
            mask = torch.ones_like(ids)
            out = model.generate(ids, attention_mask=mask, generation_config=config)
            assert out.shape[1] == len(prompt) + output_len

    return generate


def print_table(rows: list[Row]) -> None:
    print(
        f"\n{'dtype':10}{'mode':10}{'work':12}{'ours tok/s':>22}{'transformers tok/s':>22}  ratio"
    )
    for row in rows:
        print(
            f"{row.dtype:10}{row.mode:10}{row.work:12}{shown(row.ours):>22}"
            f"{shown(row.transformers):>22}{row.ratio:6.2f}x"
        )


def shown(rates: list[float]) -> str:
    return f"{statistics.median(rates):.1f} ({min(rates):.1f}-{max(rates):.1f})"


def conditions(arguments: argparse.Namespace) -> dict[str, Any]:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    ).stdout.strip()
    return {
        "hardware": Platform.detect("cpu").name,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "compiledllm": __version__,
        "commit": commit,
        "input_len": arguments.input_len,
        "output_len": arguments.output_len,
        "repeats": arguments.repeats,
    }


if __name__ == "__main__":
    main()
