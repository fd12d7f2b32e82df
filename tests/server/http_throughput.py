"""What a streamed token costs each process of a server, and how many a second the server writes.

`python -m tests.server.http_throughput --processes 1 2 --streams 256 --step-ms 20` starts servers
before an engine without a model (`paced_engine`), reads chats as fast as they come, and prints
tokens and events a second, and CPU time per token in microseconds. `--step-ms 0` asks for all that
the server can write.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from compiledllm.models.source import resolve_checkpoint
from tests.clients.scripted_engine import TEMPLATE
from tests.clients.scripted_server import MODULE
from tests.support.server import Server, command_of, parent_of
from tests.support.tiny import copy_tokenizer

ENGINE = "tests.server.paced_engine"
TICKS = os.sysconf("SC_CLK_TCK")


def measure(num_processes: int, streams: int, tokens: int, step_s: float) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as name:
        model = Path(name) / "model"
        model.mkdir()
        source = resolve_checkpoint(None)
        copy_tokenizer(source, model)
        (model / "config.json").write_bytes((source / "config.json").read_bytes())
        (model / "chat_template.jinja").write_text(TEMPLATE)
        options = ["--api-server-count", str(num_processes), "--max-num-seqs", str(streams)]
        paced = {"SCRIPTED_ENGINE": ENGINE, "PACED_STEP_S": str(step_s)}
        server = Server(model, Path(name), *options, module=MODULE, **paced)
        try:
            server.wait_until_ready(240)
            time.sleep(2)  # for the other processes' own set-up
            run_clients(server.port, streams, 5)
            own = "HTTP" if num_processes == 1 else "owner"
            before = cpu_seconds(server.process.pid, own)
            num_events, seconds = run_clients(server.port, streams, tokens)
            after = cpu_seconds(server.process.pid, own)
        finally:
            server.stop()
    found = {"tokens/s": streams * tokens / seconds, "events/s": num_events / seconds}
    for kind, spent in after.items():
        found[f"{kind} us/token"] = 1e6 * (spent - before.get(kind, 0.0)) / (streams * tokens)
    return found


def run_clients(port: int, streams: int, tokens: int) -> tuple[int, float]:
    """Read so many chats at once, in a process of its own; returns events and seconds."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_run_clients, (port, streams, tokens))


def _run_clients(port: int, streams: int, tokens: int) -> tuple[int, float]:
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "Go."}], "stream": True}
    raw = json.dumps(body | {"max_tokens": tokens, "ignore_eos": True}).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    head += f"connection: close\r\ncontent-length: {len(raw)}\r\n\r\n"

    async def chat() -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head.encode() + raw)
        count = 0
        first = b""
        while piece := await reader.read(2**16):
            first = first or piece
            count += piece.count(b"data: ")
        writer.close()
        assert b" 200 " in first[:20], first.decode()
        return count

    async def chats() -> list[int]:
        return await asyncio.gather(*(chat() for _ in range(streams)))

    started = time.monotonic()
    counts = asyncio.run(chats())
    return sum(counts), time.monotonic() - started


def cpu_seconds(server: int, own_kind: str) -> dict[str, float]:
    """CPU time of the server's process, which is of this kind, and of its children, by kind."""
    found = {own_kind: seconds_of(server)}
    for path in Path("/proc").iterdir():
        if not path.name.isdigit() or parent_of(path) != server:
            continue
        pid = int(path.name)
        kind = "engine" if ENGINE.encode() in command_of(pid) else "HTTP"
        found[kind] = found.get(kind, 0.0) + seconds_of(pid)
    return found


def seconds_of(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--step-ms", type=float, default=40.0)
    given = parser.parse_args()
    for count in given.processes:
        found = measure(count, given.streams, given.tokens, given.step_ms / 1e3)
        print(count, {name: round(value, 1) for name, value in found.items()}, flush=True)


if __name__ == "__main__":
    main()
