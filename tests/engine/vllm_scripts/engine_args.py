from dataclasses import asdict

from vllm import LLM, EngineArgs, SamplingParams
from vllm.utils.argparse_utils import FlexibleArgumentParser


def create_parser():
    parser = FlexibleArgumentParser()
    EngineArgs.add_cli_args(parser)
    parser.set_defaults(model="meta-llama/Llama-3.2-1B-Instruct")
    sampling_group = parser.add_argument_group("Sampling parameters")
    sampling_group.add_argument("--max-tokens", type=int)
    sampling_group.add_argument("--temperature", type=float)
    return parser


args: dict = vars(create_parser().parse_args())
max_tokens = args.pop("max_tokens")
temperature = args.pop("temperature")
llm = LLM(**args)
sampling_params = llm.get_default_sampling_params()
if max_tokens is not None:
    sampling_params.max_tokens = max_tokens
print(
    [
        len(output.outputs)
        for output in llm.generate(["Hello", "World"], SamplingParams(max_tokens=3))
    ]
)

engine_args = EngineArgs(model="google/gemma-3-4b-it", max_model_len=512, max_num_seqs=2)
llm = LLM(**asdict(engine_args) | {"seed": 0})
cache = llm.llm_engine.vllm_config.cache_config
print(cache.block_size, cache.num_gpu_blocks)
print(llm.llm_engine.model_config.max_model_len, llm.get_tokenizer().eos_token_id)
