"""Limits what may be built from one body, however its bytes are spread over its fields."""

from __future__ import annotations

from compiledllm.server.openai.errors import ApiError

MAX_BODY_BYTES = 32 * 2**20
MAX_FREE_BYTES = 2**19  # bytes of all free-form objects (schemas, arguments) of a body together
MAX_OBJECTS = 2**15  # messages, content parts, tools and calls of a body
MAX_NUMBERS = 2**21  # token ids of a body


class Budget:
    """How many bytes, objects and numbers may still be built from a body."""

    __slots__ = ("free_bytes", "numbers", "objects")

    def __init__(self) -> None:
        self.free_bytes, self.objects, self.numbers = MAX_FREE_BYTES, MAX_OBJECTS, MAX_NUMBERS

    def take(self, where: str, free_bytes: int = 0, objects: int = 0, numbers: int = 0) -> None:
        self.free_bytes -= free_bytes
        self.objects -= objects
        self.numbers -= numbers
        if self.free_bytes < 0:
            what = f"{MAX_FREE_BYTES} bytes of schemas, arguments and other objects"
        elif self.objects < 0:
            what = f"{MAX_OBJECTS} messages, content parts, tools and tool calls"
        elif self.numbers < 0:
            what = f"{MAX_NUMBERS} token ids"
        else:
            return
        raise ApiError(400, f"{where} is too large: a body may have at most {what}", where)
