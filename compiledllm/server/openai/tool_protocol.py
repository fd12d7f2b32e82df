"""The parts of chat bodies about tools: tools, the choice of a tool, and calls of tools."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from msgspec import Meta

from compiledllm.server.openai.bodies import Body
from compiledllm.server.openai.field_types import FunctionName, Name


class Function(Body, kw_only=True):
    keeps_more: ClassVar[bool] = True

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body, kw_only=True):
    keeps_more: ClassVar[bool] = True

    type: Literal["function"] = "function"
    function: Function


class FunctionChoice(Body, kw_only=True):
    name: FunctionName


class NamedTool(Body, kw_only=True):
    type: Literal["function"] = "function"
    function: FunctionChoice


class CalledFunction(Body, kw_only=True):
    keeps_more: ClassVar[bool] = True

    name: Name
    arguments: str | dict[str, Any] | None = None


class ToolCall(Body, kw_only=True):
    keeps_more: ClassVar[bool] = True

    id: Annotated[str, Meta(max_length=256)] | None = None
    type: Literal["function"] = "function"
    function: CalledFunction
