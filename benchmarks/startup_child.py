"""The fresh process of `bench startup`: loads an engine, generates a token, prints its phases.

The module imports only what the engine imports, because the time of every import here counts.
"""

import json
import random
import sys
import time
from typing import Any

BEGAN = time.monotonic()
MARK = "compiledllm startup: "  # marks this process's line among the engines' own output


def compiledllm(request: dict[str, Any], prompt: list[int]) -> dict[str, Any]:
    from compiledllm import Engine, SamplingParams

    imported = time.monotonic()
    options = {"skip_tokenizer_init": True, "enable_prefix_caching": False} | request["options"]
    engine = Engine(request["path"], device=request["device"], dtype=request["dtype"], **options)
    phases = engine.core.ledger.close()
    phases["import"] += imported - BEGAN
    ready = time.monotonic()
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    engine.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    phases["first token"] = time.monotonic() - ready
    return {
        "phases_s": phases,
        "compile": str(engine.core.report["compile"]),
        "weight_bytes": engine.core.ledger.weight_bytes,
    }


def peer(request: dict[str, Any], prompt: list[int]) -> dict[str, Any]:
    from pathlib import Path

    from compiledllm.benchmarks.model import Model
    from compiledllm.benchmarks.peers import make_peer
    from compiledllm.benchmarks.workload import SampleRequest
    from compiledllm.platform import Platform

    platform = Platform.detect(request["device"])
    model = Model(
        path=Path(request["path"]),
        spec=None,
        vocab_size=request["vocab_size"],
        platform=platform,
        dtype=request["dtype"],
        options=request["options"],
    )
    engine = make_peer(request["engine"], model)
    ready = time.monotonic()
    engine.generate([SampleRequest(prompt, 1)])
    first_token_s = time.monotonic() - ready
    phases = {"import": engine.startup_s.get("import", 0.0), "first token": first_token_s}
    return {"phases_s": phases, "compile": "", "weight_bytes": 0}


def main() -> None:
    """Arguments: the request as JSON, and the time.monotonic() at which the process was made."""
    request, made = json.loads(sys.argv[1]), float(sys.argv[2])
    draw = random.Random(1)
    prompt = [draw.randrange(request["vocab_size"]) for _ in range(request["input_len"])]
    found = (compiledllm if request["engine"] == "compiledllm" else peer)(request, prompt)
    found["phases_s"]["process"] = BEGAN - made
    found["cpu_s"] = time.process_time()
    heavy = ("torch._dynamo", "torch._inductor", "transformers")
    found["imported"] = [name for name in heavy if name in sys.modules]
    print("\n" + MARK + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
