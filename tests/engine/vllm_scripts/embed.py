from argparse import Namespace

from vllm import LLM, EngineArgs, PoolingParams
from vllm.utils.argparse_utils import FlexibleArgumentParser


def parse_args() -> Namespace:
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    parser.set_defaults(model="intfloat/e5-mistral-7b-instruct", runner="pooling")
    return parser.parse_args()


llm = LLM(**vars(parse_args()))
prompts = ["Hello, my name is", "The capital of France is"]
outputs = llm.embed(prompts)
for prompt, output in zip(prompts, outputs, strict=True):
    embedding = output.outputs.embedding
    print(f"{prompt!r}: {len(embedding)} {sum(x * x for x in embedding):.3f}")

(short,) = llm.embed(prompts[:1], pooling_params=PoolingParams(dimensions=16))
print(len(short.outputs.embedding))
