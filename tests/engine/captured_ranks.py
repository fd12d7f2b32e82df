"""An engine on two GPUs in a process of its own: `… -m tests.engine.captured_ranks MODEL DTYPE`.

Compiles and captures, and prints a line of JSON. The process must end by itself.
"""

from __future__ import annotations

import json
import random
import sys
from typing import Any

PROMPTS = [[random.Random(n).randrange(3, 128) for _ in range(n)] for n in (1, 17, 100, 300, 64)]
GREEDY = {"temperature": 0, "max_tokens": 32, "ignore_eos": True}
FIXED: dict[str, Any] = {"skip_tokenizer_init": True, "kv_cache_memory_bytes": 2**27}
FIXED |= {"max_num_seqs": 8}


def results_of(model: str, size: int, **options: Any) -> dict[str, Any]:
    """Tokens of each prompt, log probabilities of the prompts' tokens, and how ranks add up."""
    from compiledllm import Engine, SamplingParams

    engine = Engine(model, **FIXED | options, tensor_parallel_size=size)
    params = SamplingParams(**GREEDY, prompt_logprobs=1)
    outputs = engine.generate(PROMPTS, params, use_tqdm=False)
    again = engine.generate(PROMPTS, SamplingParams(**GREEDY), use_tqdm=False)
    return {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "again": [list(output.outputs[0].token_ids) for output in again],
        "logprobs": [
            [position[token].logprob for token, position in zip(prompt[1:], found[1:], strict=True)]
            for prompt, found in zip(PROMPTS, (o.prompt_logprobs for o in outputs), strict=True)
        ],
        "sums_by": engine.core.report["all_reduce"].reason if size > 1 else "",
        "recompiles": engine.core.worker.stats().num_recompiles,
    }


if __name__ == "__main__":
    print(json.dumps(results_of(sys.argv[1], 2, dtype=sys.argv[2])))
