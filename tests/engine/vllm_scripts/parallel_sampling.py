from vllm import LLM, SamplingParams, TokensPrompt

llm = LLM(model="facebook/opt-125m")
base = SamplingParams(n=4, temperature=1.0, top_p=0.9, max_tokens=6, seed=7, extra_args={"tag": 1})
other = base.clone()
other.n, other.extra_args["tag"] = 2, 2
prompts = [TokensPrompt(prompt_token_ids=[11, 12, 13]), "Once upon a time"]
outputs = llm.generate(prompts, [base, other])
print([len(output.outputs) for output in outputs], base.extra_args["tag"])
print(sorted(completion.index for completion in outputs[0].outputs))
