"""Types of the fields of request bodies, each with the bounds that msgspec enforces."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from compiledllm.sampling_params import MAX_N, MAX_STOP_LENGTH
from compiledllm.server.openai.body_budget import MAX_NUMBERS

MAX_PROMPTS = 256
MAX_MESSAGES = 4096
MAX_PARTS = 4096
MAX_TOP_LOGPROBS = 20
MAX_TOOLS = 128

Int32 = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]
Int64 = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Count = Annotated[int, Meta(ge=0, le=2**31 - 1)]
PositiveCount = Annotated[int, Meta(ge=1, le=2**31 - 1)]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Text = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_LENGTH)]
# Request ids reach logs and headers and are therefore printable ASCII.
Name = Annotated[str, Meta(min_length=1, max_length=256)]
RequestId = Annotated[
    str, Meta(pattern=r"^[ -~]{1,128}(?!\n)$", description="1 to 128 printable ASCII characters")
]
Ids = Annotated[list[int], Meta(min_length=1, max_length=MAX_NUMBERS)]  # token ids of a prompt
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Fraction = Annotated[float, Meta(ge=0, le=1)]
N = Annotated[int, Meta(ge=1, le=MAX_N)]
TopLogprobs = Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)]
PatternSize = Annotated[int, Meta(ge=0, le=1024)]
FunctionName = Annotated[
    str,
    Meta(
        pattern=r"^[a-zA-Z0-9_.-]{1,128}(?!\n)$",
        description="1 to 128 letters, digits, dots, hyphens and underscores",
    ),
]
