"""litellm speaking to all three APIs: chat completions, responses and messages."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import litellm

FUNCTION = {"name": "get_weather", "description": "Weather.", "parameters": {"type": "object"}}
MESSAGES: list[dict[str, Any]] = [{"role": "user", "content": "What is the weather in Paris?"}]
NAME = "get_weather"


def chat(model: str, **fields: Any) -> None:
    """Chat completions, in OpenAI's or in Anthropic's format on the wire."""
    asked = fields | {"model": model, "messages": MESSAGES, "max_tokens": 200}
    asked["tools"] = [{"type": "function", "function": FUNCTION}]
    (call,) = litellm.completion(**asked).choices[0].message.tool_calls
    assert call.function.name == NAME, call
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny in Paris"}
    said = {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]}
    asked["messages"] = [*MESSAGES, said, result]
    assert litellm.completion(**asked).choices[0].message.content == "It is sunny."
    chunks = list(litellm.completion(**asked, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == "It is sunny.", text


def responses(**fields: Any) -> None:
    asked = fields | {"model": "openai/tiny", "tools": [{"type": "function", **FUNCTION}]}
    answer = litellm.responses(input=MESSAGES, **asked)
    (call,) = [item for item in answer.output if item.type == "function_call"]
    assert call.name == NAME, call
    sent = {name: getattr(call, name) for name in ("type", "call_id", "name", "arguments")}
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny in Paris"}
    asked["input"] = [*MESSAGES, sent, result]
    assert litellm.responses(**asked).output[-1].content[0].text == "It is sunny."
    events = list(litellm.responses(**asked, stream=True))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == "It is sunny.", text


async def messages(**fields: Any) -> None:
    tool = {"name": NAME, "description": "Weather.", "input_schema": {"type": "object"}}
    answer = await litellm.anthropic.messages.acreate(
        model="anthropic/tiny", messages=MESSAGES, max_tokens=200, tools=[tool], **fields
    )
    assert answer["content"][-1]["name"] == NAME, answer


url = sys.argv[1]
chat("openai/tiny", api_base=f"{url}/v1", api_key="none")
chat("anthropic/tiny", api_base=url, api_key="none")
responses(api_base=f"{url}/v1", api_key="none")
asyncio.run(messages(api_base=url, api_key="none"))
