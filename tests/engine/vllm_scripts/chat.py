from vllm import LLM

llm = LLM(
    "meta-llama/Llama-3.2-1B-Instruct", tokenizer_mode="auto", limit_mm_per_prompt={"image": 0}
)
sampling_params = llm.get_default_sampling_params()
sampling_params.max_tokens = 8
conversation = [
    {"role": "system", "content": "You are a helpful assistant"},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hello! How can I assist you today?"},
    {"role": "user", "content": "Write an essay about the importance of higher education."},
]
outputs = llm.chat(conversation, sampling_params, use_tqdm=False)
print(f"{len(outputs)} answer, {outputs[0].outputs[0].finish_reason}")
conversations = [conversation for _ in range(10)]
outputs = llm.chat(messages=conversations, sampling_params=sampling_params, use_tqdm=True)
print(f"{len(outputs)} answers")
template = "{% for message in messages %}[{{ message.role }}] {{ message.content }}{% endfor %}"
outputs = llm.chat(
    conversation,
    sampling_params,
    use_tqdm=False,
    chat_template=template,
    lora_request=None,
    chat_template_content_format="auto",
)
print(outputs[0].prompt[:18])
