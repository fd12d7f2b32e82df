import argparse

from vllm import EngineArgs, LLMEngine, RequestOutput, SamplingParams
from vllm.utils.argparse_utils import FlexibleArgumentParser


def process_requests(engine: LLMEngine, test_prompts: list[tuple[str, SamplingParams]]):
    request_id = 0
    while test_prompts or engine.has_unfinished_requests():
        if test_prompts:
            prompt, sampling_params = test_prompts.pop(0)
            engine.add_request(str(request_id), prompt, sampling_params)
            request_id += 1
        request_outputs: list[RequestOutput] = engine.step()
        for request_output in request_outputs:
            if request_output.finished:
                print("finished", request_output.request_id)


def initialize_engine(args: argparse.Namespace) -> LLMEngine:
    engine_args = EngineArgs.from_cli_args(args)
    return LLMEngine.from_engine_args(engine_args)


def main(args: argparse.Namespace):
    engine = initialize_engine(args)
    print(engine.model_config.max_model_len)
    prompts = [
        ("A robot may not injure", SamplingParams(temperature=0.0, logprobs=1, max_tokens=4)),
        ("To be or not to be", SamplingParams(n=2, temperature=0.8, top_k=5, max_tokens=4)),
    ]
    process_requests(engine, prompts)
    engine.abort_request(["none such"])
    print(engine.get_num_unfinished_requests())


if __name__ == "__main__":
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser(description="Demo"))
    parser.set_defaults(model="facebook/opt-125m")
    main(parser.parse_args())
