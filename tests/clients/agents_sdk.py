"""openai-agents with its default settings, which speak `/v1/responses`: a run with a tool."""

from __future__ import annotations

import asyncio
import sys

from agents import Agent, Runner, function_tool, set_default_openai_client, set_tracing_disabled
from openai import AsyncOpenAI


@function_tool
def get_weather(city: str) -> str:
    """The weather in a city."""
    return f"sunny in {city}"


async def main(url: str) -> None:
    set_tracing_disabled(True)
    set_default_openai_client(AsyncOpenAI(base_url=f"{url}/v1", api_key="none"))
    agent = Agent(name="a", instructions="Be brief.", model="tiny", tools=[get_weather])
    whole = await Runner.run(agent, "What is the weather in Paris?")
    assert whole.final_output == "It is sunny.", whole.final_output
    kinds = [item.type for item in whole.new_items]
    assert kinds == [
        "reasoning_item",
        "tool_call_item",
        "tool_call_output_item",
        "message_output_item",
    ], kinds
    streamed = Runner.run_streamed(agent, "What is the weather in Paris?")
    events = [event.data.type async for event in streamed.stream_events() if hasattr(event, "data")]
    assert streamed.final_output == "It is sunny.", streamed.final_output
    assert "response.output_text.delta" in events and "response.completed" in events


asyncio.run(main(sys.argv[1]))
