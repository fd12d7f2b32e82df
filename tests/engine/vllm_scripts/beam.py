from vllm import LLM
from vllm.inputs import TextPrompt, TokensPrompt
from vllm.sampling_params import BeamSearchParams

llm = LLM(model="facebook/opt-125m", max_logprobs=20)
params = BeamSearchParams(beam_width=3, max_tokens=5, temperature=0.0, ignore_eos=True)
prompts = [TextPrompt(prompt="The capital is"), TokensPrompt(prompt_token_ids=[5, 6, 7])]
outputs = llm.beam_search(prompts, params, lora_request=None, use_tqdm=False)
for output in outputs:
    scores = [beam.cum_logprob for beam in output.sequences]
    print(len(output.sequences), scores == sorted(scores, reverse=True))
