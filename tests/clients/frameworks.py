"""LangChain, LlamaIndex, pydantic-ai, instructor: answers with a tool, in each API they speak."""

from __future__ import annotations

import sys
from typing import Any

import instructor
from anthropic import AsyncAnthropic
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from openai import OpenAI
from pydantic import BaseModel
from pydantic_ai import Agent
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider

QUESTION, ANSWER = "What is the weather in Paris?", "It is sunny."


class Place(BaseModel):
    city: str


def get_weather(city: str) -> str:
    """The weather in a city."""
    return f"sunny in {city}"


def langchain(url: str, **options: Any) -> None:
    model = ChatOpenAI(model="tiny", base_url=f"{url}/v1", api_key="none", **options)
    bound = model.bind_tools([tool(get_weather)])
    messages: list[Any] = [HumanMessage(QUESTION)]
    said = bound.invoke(messages)
    (call,) = said.tool_calls
    assert (call["name"], call["args"]) == ("get_weather", {"city": "Paris"}), call
    messages += [said, ToolMessage("sunny in Paris", tool_call_id=call["id"])]
    assert bound.invoke(messages).text == ANSWER
    assert "".join(chunk.text for chunk in bound.stream(messages)) == ANSWER


def llama_index(url: str) -> None:
    model = OpenAILike(
        model="tiny",
        api_base=f"{url}/v1",
        api_key="none",
        is_chat_model=True,
        is_function_calling_model=True,
    )
    given = FunctionTool.from_defaults(get_weather)
    (call,) = model.get_tool_calls_from_response(
        model.chat_with_tools([given], user_msg=QUESTION), error_on_no_tool_call=True
    )
    assert (call.tool_name, call.tool_kwargs) == ("get_weather", {"city": "Paris"}), call


def pydantic_ai(url: str) -> None:
    ours = OpenAIProvider(base_url=f"{url}/v1", api_key="none")
    theirs = AnthropicProvider(anthropic_client=AsyncAnthropic(base_url=url, api_key="none"))
    for model in (
        OpenAIChatModel("tiny", provider=ours),
        OpenAIResponsesModel("tiny", provider=ours),
        AnthropicModel("tiny", provider=theirs),
    ):
        agent = Agent(model, tools=[get_weather])
        assert agent.run_sync(QUESTION).output == ANSWER, model
        streamed = agent.run_stream_sync(QUESTION)
        assert streamed.get_output() == ANSWER, model


def instructor_modes(url: str) -> None:
    """The tool is named after the kind of answer, as the scripted model names it."""
    kind = type("get_weather", (Place,), {"__doc__": "The weather."})
    plain = OpenAI(base_url=f"{url}/v1", api_key="none")
    for mode in (instructor.Mode.TOOLS, instructor.Mode.RESPONSES_TOOLS):
        client = instructor.from_openai(plain, mode=mode)
        question: Any = [{"role": "user", "content": QUESTION}]
        made = client.create(model="tiny", response_model=kind, messages=question, max_retries=1)
        assert made.city == "Paris", (mode, made)


server_url = sys.argv[1]
langchain(server_url)
langchain(server_url, use_responses_api=True)
llama_index(server_url)
pydantic_ai(server_url)
instructor_modes(server_url)
