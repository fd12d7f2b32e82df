from vllm import LLM, SamplingParams

prompts = ["Hello, my name is", "The capital of France is", "The future of AI is"]
sampling_params = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=8)


def main():
    llm = LLM(
        model="facebook/opt-125m",
        tensor_parallel_size=1,
        dtype="auto",
        gpu_memory_utilization=0.9,
        max_model_len=None,
        enable_chunked_prefill=True,
        disable_log_stats=True,
        swap_space=4,
        seed=0,
    )
    outputs = llm.generate(prompts, sampling_params, use_tqdm=False)
    for output in outputs:
        print(f"Prompt: {output.prompt!r}, Generated: {output.outputs[0].text!r}")


if __name__ == "__main__":
    main()
