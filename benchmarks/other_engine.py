"""Runs the engine of another environment, for `other_environment.py`. Must run on Python 3.10.

Arguments: "compiledllm" or "vllm", and the engine's options as JSON. The first line of the output
says that the engine is ready. Each line of the input is the JSON of [prompts (token ids), output
lengths]; it is answered by a line [seconds that all prompts took, generated token ids].

The program uses only what vLLM and all versions of compiledllm have in common.
"""

import json
import os
import sys
import time


def main() -> None:
    kind, options = sys.argv[1], json.loads(sys.argv[2])
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # engines print to stdout, too, which is for the answers
    if kind == "vllm":
        from vllm import LLM as Engine
        from vllm import SamplingParams
    else:
        from compiledllm import Engine, SamplingParams
    engine = Engine(**options)
    answers.write("ready\n")
    for line in sys.stdin:
        prompts, output_lens = json.loads(line)
        inputs = [{"prompt_token_ids": ids} for ids in prompts]
        params = [
            SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False)
            for count in output_lens
        ]
        start = time.perf_counter()
        outputs = engine.generate(inputs, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        token_ids = [list(output.outputs[0].token_ids) for output in outputs]
        answers.write(json.dumps([seconds, token_ids]) + "\n")


if __name__ == "__main__":
    main()
