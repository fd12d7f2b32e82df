"""Replicas and ranks on two machines of a Ray cluster, one of which is lost under load.

`sudo python -m tests.remote.two_machines MODEL --replicas 2 --ranks 1` makes two machines of this
one: network namespaces joined by a cable, and for the second one processes and a folder of Ray's of
its own. `compiledllm serve` runs on the first. While 12 requests run, the second machine ends, or
its cable is cut (`--cut`); then it comes back. Prints how each request ended, and when all replicas
were ready again. Needs root, iproute2, util-linux and curl on Linux.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES, ADDRESSES = ("cllm-a", "cllm-b"), ("10.77.0.1", "10.77.0.2")
RAY = str(Path(sys.executable).with_name("ray"))
PORT = 8000
HEALTH = f"http://127.0.0.1:{PORT}/health"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


@contextlib.contextmanager
def cable() -> Iterator[None]:
    """Two network namespaces that reach each other and nothing else."""
    try:
        for name in NAMES:
            ip("netns", "add", name)
        ip("link", "add", NAMES[0], "type", "veth", "peer", "name", NAMES[1])
        for name, address in zip(NAMES, ADDRESSES, strict=True):
            ip("link", "set", name, "netns", name)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", name)
            for device in ("lo", name):
                ip("-n", name, "link", "set", device, "up")
        yield
    finally:
        for name in NAMES:
            subprocess.run(["ip", "netns", "del", name], check=False)


def on_first(*words: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(["ip", "netns", "exec", NAMES[0], *words], start_new_session=True)


def second_machine(folder: str, num_cpus: int) -> subprocess.Popen[bytes]:
    start = f"{RAY} start --address {ADDRESSES[0]}:6379 --node-ip-address {ADDRESSES[1]}"
    start += f" --num-cpus {num_cpus} --block"
    own = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    shell = ["sh", "-c", f"mount -t tmpfs none {folder} && exec {start}"]
    return subprocess.Popen(["ip", "netns", "exec", NAMES[1], *own, *shell], start_new_session=True)


def end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def states() -> list[str]:
    asked = ["ip", "netns", "exec", NAMES[0], "curl", "-s", HEALTH]
    raw = subprocess.run(asked, capture_output=True, check=False).stdout
    found = json.loads(raw) if raw else {}
    return list(found.get("replicas", [found.get("engine", "")]))


def wait_until_ready(count: int) -> float:
    start_s = time.monotonic()
    while states() != ["ready"] * count:
        assert time.monotonic() < start_s + 300, states()
        time.sleep(0.5)
    return time.monotonic() - start_s


async def load(lose: Any) -> None:
    """Six whole answers and six streams, in the middle of which `lose` is called."""
    from openai import AsyncOpenAI, OpenAIError

    url = f"http://127.0.0.1:{PORT}/v1"
    client = AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=200)
    model = (await client.models.list()).data[0].id
    rest: dict[str, Any] = {"extra_body": {"ignore_eos": True}, "temperature": 0}

    async def ask(number: int, is_stream: bool) -> str:
        prompt, reasons = [100 + number] * 20, list[str]()
        try:
            answer: Any = await client.completions.create(
                model=model, prompt=prompt, max_tokens=400, stream=is_stream, **rest
            )
            if not is_stream:
                return f"whole: {answer.usage.completion_tokens} tokens"
            async for chunk in answer:
                reasons += filter(None, [chunk.choices[0].finish_reason])
            return f"stream: ended by {reasons}"
        except OpenAIError as error:
            return f"{'stream' if is_stream else 'whole'}: {error}"

    asked = [asyncio.create_task(ask(n, n // 2 % 2 == 1)) for n in range(12)]
    await asyncio.sleep(1.5)
    lose()
    for line in await asyncio.gather(*asked):
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--cut", action="store_true", help="cut the cable instead")
    parser.add_argument("--load-only", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    cut = ["ip", "-n", NAMES[1], "link", "set", NAMES[1], "down"]
    if given.load_only:  # within the first namespace
        pid = int(os.environ["SECOND_MACHINE"])
        lose = (lambda: subprocess.run(cut, check=True)) if given.cut else None
        asyncio.run(load(lose or (lambda: os.killpg(pid, signal.SIGKILL))))
        return
    half = given.replicas * given.ranks // 2
    with tempfile.TemporaryDirectory(dir="/tmp") as folder, cable():
        os.environ |= {"RAY_TMPDIR": folder, "RAY_USAGE_STATS_ENABLED": "0"}
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        os.environ |= {"RAY_ADDRESS": f"{ADDRESSES[0]}:6379", "OMP_NUM_THREADS": "1"}
        os.environ |= {"RAY_health_check_period_ms": "1000", "RAY_worker_niceness": "0"}
        head = f"start --head --node-ip-address {ADDRESSES[0]} --port 6379 --num-cpus {half}"
        first = on_first(RAY, *head.split(), "--include-dashboard=false", "--block")
        time.sleep(10)
        second = second_machine(folder, half)
        time.sleep(10)
        sizes = f"--data-parallel-size {given.replicas} --tensor-parallel-size {given.ranks}"
        fixed = "--device cpu --dtype float32 --enforce-eager --kv-cache-memory-bytes 67108864"
        options = [*sizes.split(), *fixed.split(), "--distributed-executor-backend", "ray"]
        serve = [sys.executable, "-m", "compiledllm.server", "--model", given.model]
        server = on_first(*serve, *options, "--port", str(PORT))
        try:
            print(f"ready after {wait_until_ready(given.replicas):.0f} s", flush=True)
            os.environ["SECOND_MACHINE"] = str(second.pid)
            words = [*sys.argv[1:], "--load-only"]
            on_first(sys.executable, "-m", "tests.remote.two_machines", *words).wait()
            print(f"after the loss: {states()}", flush=True)
            end(second)
            ip("-n", NAMES[1], "link", "set", NAMES[1], "up")
            second = second_machine(folder, half)
            print(f"ready again after {wait_until_ready(given.replicas):.0f} s", flush=True)
        finally:
            server.terminate()
            server.wait(60)
            for process in (second, first):
                end(process)


if __name__ == "__main__":
    main()
