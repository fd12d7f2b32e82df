"""Stand-ins for parts of the engine that a test is not about."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any


class Letters:
    """A tokenizer whose token ids are characters."""

    def stream(self, prompt_token_ids: list[int], skip_special_tokens: bool) -> Any:
        return SimpleNamespace(push=chr, finish=str)

    def token_text(self, token_id: int) -> str:
        return chr(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        return chr(token_id).encode()
