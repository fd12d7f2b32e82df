"""A running server, asked with OpenAI's client (pip install openai): openai_client.py [URL]"""

import json
import sys

from openai import OpenAI

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
client = OpenAI(base_url=f"{url}/v1", api_key="none")
model = client.models.list().data[0].id

stream = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": "Why is the sky blue?"}],
    max_completion_tokens=64,
    seed=1,
    stream=True,
    extra_body={"top_k": 40, "min_p": 0.05},  # what OpenAI does not have goes here
)
for chunk in stream:
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()

schema = {
    "type": "object",
    "properties": {"capital": {"type": "string", "maxLength": 30}},
    "required": ["capital"],
    "additionalProperties": False,
}
formed = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": "What is the capital of France?"}],
    response_format={"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}},
    temperature=0,
)
print(json.loads(formed.choices[0].message.content or ""))

scored = client.completions.create(
    model=model, prompt="The capital of France is Paris", max_tokens=0, echo=True, logprobs=1
)
found = scored.choices[0].logprobs
assert found is not None
print(list(zip(found.tokens or [], found.token_logprobs or [], strict=True)))
