from vllm import LLM, SamplingParams

llm = LLM(model="facebook/opt-125m", scheduling_policy="priority", max_num_seqs=2)
params = [SamplingParams(max_tokens=count, ignore_eos=True) for count in (3, 4, 5)]
outputs = llm.generate(["one", "two", "three"], params, priority=[2, 0, 1])
print([len(output.outputs[0].token_ids) for output in outputs])
