"""A rank of a served model is killed: its engine ends and starts again, each request ends once."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from compiledllm import AsyncEngine, RequestOutput, SamplingParams
from compiledllm.remote.errors import EngineError
from compiledllm.sampling_params import RequestOutputKind

LONG = SamplingParams(temperature=0, max_tokens=300, ignore_eos=True)
WHOLE = SamplingParams(
    temperature=0, max_tokens=60, ignore_eos=True, output_kind=RequestOutputKind.FINAL_ONLY
)


def rank_of(engine_pid: int) -> int:
    """The process of the other rank, which is a child of the engine's process."""
    (pid,) = (
        int(pid)
        for pid in Path(f"/proc/{engine_pid}/task/{engine_pid}/children").read_text().split()
        if b"rank_process" in Path(f"/proc/{pid}/cmdline").read_bytes()
    )
    return pid


def test_a_killed_rank_ends_the_engine_which_starts_again(
    tiny_chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMPILEDLLM_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    engine = AsyncEngine(
        tiny_chat_model,
        device="cpu",
        dtype="float32",
        skip_tokenizer_init=True,
        enforce_eager=True,
        kv_cache_memory_bytes=2**26,
        tensor_parallel_size=2,
    )

    async def whole(prompt: list[int]) -> list[RequestOutput]:
        return [output async for output in engine.generate({"prompt_token_ids": prompt}, WHOLE)]

    async def play() -> None:
        async with engine:
            expected = (await whole([5, 6, 7]))[-1].outputs[0].token_ids
            shown = engine.generate({"prompt_token_ids": [5, 6, 7]}, LONG)
            await anext(shown)
            waiting = asyncio.create_task(whole([5, 6, 7]))
            await asyncio.sleep(0)
            child = engine._client._child
            assert child is not None
            os.kill(rank_of(child.process.pid), signal.SIGKILL)
            with pytest.raises(EngineError, match="rank 1"):
                async for _ in shown:
                    pass
            (again,) = await waiting
            assert again.finished and again.outputs[0].token_ids == expected
            assert engine._client.num_restarts == 1
            assert rank_of(engine._client._child.process.pid)  # type: ignore[union-attr]

    asyncio.run(asyncio.wait_for(play(), 240))
