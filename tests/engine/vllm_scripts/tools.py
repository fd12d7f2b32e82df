import json

from vllm import LLM
from vllm.sampling_params import SamplingParams

template = (
    "{% if tools %}tools: {{ tools | tojson }}{% endif %}"
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
)
tools = [
    {
        "type": "function",
        "function": {
            "name": "get_current_weather",
            "description": "Get the current weather in a given location",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "unit": {"enum": ["C", "F"]}},
                "required": ["city", "unit"],
            },
        },
    }
]
messages = [{"role": "user", "content": "What is the temperature in Dallas?"}]
llm = LLM(model="mistralai/Ministral-8B-Instruct-2410", config_format="auto", load_format="auto")
params = SamplingParams(max_tokens=8, temperature=0.0)
outputs = llm.chat(messages, sampling_params=params, tools=tools, chat_template=template)
print("get_current_weather" in outputs[0].prompt)
messages.append({"role": "assistant", "content": outputs[0].outputs[0].text.strip()})
messages.append({"role": "tool", "content": json.dumps({"temperature": 30}), "tool_call_id": "a"})
outputs = llm.chat(messages, params, tools=tools, chat_template=template)
print("temperature" in outputs[0].prompt, len(outputs[0].outputs[0].token_ids))
