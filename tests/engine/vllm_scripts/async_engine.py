import asyncio

from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.engine.async_llm_engine import AsyncLLMEngine
from vllm.sampling_params import RequestOutputKind


async def stream_response(engine, prompt: str, request_id: str) -> int:
    sampling_params = SamplingParams(
        max_tokens=8, temperature=0.8, seed=42, output_kind=RequestOutputKind.DELTA
    )
    count = 0
    async for output in engine.generate(
        request_id=request_id, prompt=prompt, sampling_params=sampling_params
    ):
        for completion in output.outputs:
            count += len(completion.token_ids)
        if output.finished:
            break
    return count


async def main():
    engine_args = AsyncEngineArgs(
        model="meta-llama/Llama-3.2-1B-Instruct",
        enforce_eager=True,
        enable_log_requests=False,
        disable_log_stats=True,
        distributed_executor_backend="mp",
    )
    engine = AsyncLLMEngine.from_engine_args(engine_args)
    try:
        tasks = [stream_response(engine, f"Prompt {i}", f"stream-{i}") for i in range(3)]
        print(await asyncio.gather(*tasks))
        print(await engine.reset_prefix_cache())
        await engine.check_health()
    finally:
        engine.shutdown()


if __name__ == "__main__":
    asyncio.run(main())
