"""What several replicas pass on beside one, and what a token costs the process before them.

`python -m tests.server.replica_throughput --replicas 1 2 4` starts that many fake engines, reads
`--streams` requests of each at once, without HTTP, and prints tokens a second, their ratio to those
of the first number, and the CPU time of this process per token and per request in microseconds.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import tempfile
import time
from pathlib import Path
from typing import Any

from compiledllm.engine.request_state import RequestState
from compiledllm.remote.engine_client import EngineClient
from compiledllm.remote.limits import Limits
from compiledllm.remote.replicas import Replicas
from compiledllm.sampling_params import SamplingParams
from compiledllm.server.process import loop_factory
from tests.server.test_life import FAKE, OPTIONS

PROMPT_TOKENS = 512


async def measure(num_replicas: int, given: Any, folder: Path) -> dict[str, float]:
    options = OPTIONS | {"max_num_seqs": given.streams}
    variables = {"FAKE_STEP_S": str(given.step_ms / 1e3)}
    clients = [
        EngineClient(options, Limits(10**6, 10**9), folder, FAKE, variables)
        for _ in range(num_replicas)
    ]
    engine = Replicas(clients)
    engine.start()
    try:
        while any(client.state != "ready" for client in clients):
            await asyncio.sleep(0.05)
        await run(engine, "warm", num_replicas * given.streams, 20)
        gc.collect()
        gc.freeze()
        num_requests = num_replicas * given.streams
        wall_s, spent_s, made_s = await run(engine, "run", num_requests, given.tokens)
    finally:
        await engine.stop()
    num_tokens = num_requests * given.tokens
    return {
        "tokens/s": num_tokens / wall_s,
        "CPU us/token": (spent_s - made_s) / num_tokens * 1e6,
        "CPU us/request": made_s / num_requests * 1e6,
    }


async def run(engine: Replicas, name: str, count: int, tokens: int) -> tuple[float, float, float]:
    """Seconds until all have finished, of CPU time meanwhile, and of that to admit them."""
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    factory = engine.require_ready()
    states = [
        factory.make(f"{name}-{i}", {"prompt_token_ids": [3 + i % 500] * PROMPT_TOKENS}, params, 0)
        for i in range(count)
    ]
    start_s, before_s = time.monotonic(), time.process_time()
    live = [engine.admit([state])[0] for state in states]
    admitted_s = time.process_time()

    async def read(state: RequestState, one: Any) -> None:
        with engine.following(one):
            while not state.is_over:
                await one.take()

    await asyncio.gather(*map(read, states, live))
    now_s = time.process_time()
    return time.monotonic() - start_s, now_s - before_s, admitted_s - before_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--step-ms", type=float, default=20.0)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    for _ in range(given.rounds):
        first = None
        for count in given.replicas:
            with (
                tempfile.TemporaryDirectory() as folder,
                asyncio.Runner(loop_factory=loop_factory()) as runner,
            ):
                found = runner.run(measure(count, given, Path(folder)))
            first = first or found["tokens/s"]
            ratio = found["tokens/s"] / first
            shown = "  ".join(f"{name} {value:.1f}" for name, value in found.items())
            print(f"{count} replicas  {shown}  ratio {ratio:.3f}", flush=True)


if __name__ == "__main__":
    main()
