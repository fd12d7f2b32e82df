"""The door to transformers' tokenizers: encode, chat templates, streaming decode."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compiledllm.config import ConfigError

Message = dict[str, Any]


class Tokenizer:
    """A Hugging Face tokenizer, loaded from a directory or hub id."""

    def __init__(self, source: str | Path, revision: str | None = None) -> None:
        from transformers import AutoTokenizer

        try:
            self.hf = AutoTokenizer.from_pretrained(source, revision=revision)
        except Exception as error:  # transformers raises many kinds for "no tokenizer here"
            raise ConfigError(
                f"no tokenizer could be loaded from '{source}' ({type(error).__name__}); name one "
                "with tokenizer=..., or use skip_tokenizer_init=True and token ids"
            ) from error

    @property
    def eos_token_id(self) -> int | None:
        eos: int | None = self.hf.eos_token_id
        return eos

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, with the special tokens the tokenizer adds by itself."""
        ids: list[int] = self.hf.encode(text)
        return ids

    def encode_chat(
        self, messages: Sequence[Message], chat_template: str | None = None, **options: Any
    ) -> list[int]:
        """Token ids of a conversation through the chat template."""
        if chat_template is None and not self.hf.chat_template:
            raise ValueError(
                "the tokenizer has no chat template; pass chat_template=... or use generate()"
            )
        text = self.hf.apply_chat_template(
            list(messages), chat_template=chat_template, tokenize=False, **options
        )
        ids: list[int] = self.hf.encode(text, add_special_tokens=False)
        return ids

    def stream(self, prompt_token_ids: Sequence[int], skip_special_tokens: bool) -> TokenStream:
        """A streaming decoder that continues after a prompt."""
        return TokenStream(self.hf, prompt_token_ids, skip_special_tokens)


class TokenStream:
    """Token by token to text, never half a character.

    A character whose bytes are spread over tokens is held back until it is complete; if the request
    ends first, it is dropped. The end of the prompt is the context of the first token, so that the
    space in front of a word comes out as in a whole decode.
    """

    CONTEXT = 6  # prompt tokens that are looked at, at most

    def __init__(self, hf: Any, prompt_token_ids: Sequence[int], skip_special_tokens: bool) -> None:
        self._hf = hf
        self._skip_special_tokens = skip_special_tokens
        self._backend = getattr(hf, "backend_tokenizer", None)
        self._restart(self._context(prompt_token_ids))

    def push(self, token_id: int) -> str:
        """The text that became final with this token; "" inside a character."""
        if self._backend is None:
            return self._push_slow(token_id)
        try:
            return self._stream.step(self._backend, token_id) or ""
        except Exception as error:
            if "Invalid prefix" not in str(error):
                raise
            # tokenizers gives up on some invalid UTF-8 sequences: start afresh after them.
            self._restart([])
            return self._stream.step(self._backend, token_id) or ""

    def _context(self, prompt_token_ids: Sequence[int]) -> list[int]:
        """The longest end of the prompt that is whole characters; empty if it ends inside one."""
        for count in range(min(self.CONTEXT, len(prompt_token_ids)), 0, -1):
            tail = list(prompt_token_ids[-count:])
            if "\ufffd" not in self._decode(tail):
                return tail
        return []

    def _restart(self, context: list[int]) -> None:
        from tokenizers.decoders import DecodeStream

        self._stream = DecodeStream(context, self._skip_special_tokens)
        self._pending = list(context)  # slow path: tokens since the text before last was final
        self._num_final = len(context)  # of these, how many are in the text already

    def _push_slow(self, token_id: int) -> str:
        """For tokenizers without a Rust backend: the difference between two decodes."""
        self._pending.append(token_id)
        before = self._decode(self._pending[: self._num_final])
        text = self._decode(self._pending)
        if text.endswith("\ufffd") or len(text) <= len(before):
            return ""
        self._pending = self._pending[self._num_final :]
        self._num_final = len(self._pending)
        return text[len(before) :]

    def _decode(self, token_ids: Sequence[int]) -> str:
        text: str = self._hf.decode(token_ids, skip_special_tokens=self._skip_special_tokens)
        return text
