from vllm import LLM, SamplingParams

llm = LLM(model="facebook/opt-125m", logprobs_mode="raw_logprobs", max_logprobs=20)
params = SamplingParams(
    temperature=0, max_tokens=3, logprobs=2, prompt_logprobs=1, flat_logprobs=False, min_tokens=3
)
(output,) = llm.generate([{"prompt_token_ids": [5, 6, 7, 8]}], sampling_params=params)
print([logprobs is None for logprobs in output.prompt_logprobs])
for token_id, position in zip(output.outputs[0].token_ids, output.outputs[0].logprobs, strict=True):
    chosen = position[token_id]
    print(chosen.rank, len(position), isinstance(chosen.decoded_token, str))
print(output.outputs[0].cumulative_logprob < 0)
