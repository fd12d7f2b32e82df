"""Decodes generated tokens as they arrive: text that is final, one token at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

REPLACEMENT = "\ufffd"  # what a decode shows for invalid bytes


class TokenStream:
    """Turns tokens into text one at a time, never splitting a character.

    A character whose bytes are spread over tokens is held back until it is complete; if the request
    ends first, the character is dropped. Invalid bytes become U+FFFD, as if the whole output were
    decoded at once, after at most MAX_HELD tokens. The end of the prompt is the context of the
    first token, so that the space in front of a word appears as if all were decoded at once.
    """

    CONTEXT = 6  # largest number of prompt tokens used as context
    MAX_HELD = 8  # tokens without text; a character takes at most four
    MAX_CHARACTER = 3  # largest number of tokens of an incomplete character

    def __init__(self, hf: Any, prompt_token_ids: Sequence[int], skip_special_tokens: bool) -> None:
        self._hf = hf
        self._skip_special_tokens = skip_special_tokens
        self._backend = getattr(hf, "backend_tokenizer", None)
        self._held: list[int] = []  # tokens whose text is not final yet
        self._context: list[int] = []  # the tokens before `_held`, whose text is final
        self._stream: Any = None  # a DecodeStream of tokenizers, unless it failed
        self._last: int | None = None  # last token for which the stream returned text
        self._is_broken = False  # whether the text shown last was an invalid character
        self._start(self._context_of(prompt_token_ids))

    def push(self, token_id: int) -> str:
        """The text that becomes final with this token; "" inside a character."""
        if self._stream is None:
            return self._push_slow(token_id)
        try:
            text: str | None = self._stream.step(self._backend, token_id)
        except Exception as error:
            if "Invalid prefix" not in str(error):
                raise
            self._leave_stream()  # tokenizers gives up on some invalid UTF-8 sequences
            return self._push_slow(token_id)
        if text:
            self._last = token_id
            if self._held:
                self._held = []
            return text
        self._held.append(token_id)
        if len(self._held) < self.MAX_HELD:
            return ""
        self._leave_stream()  # the stream would decode all held tokens for every new one
        return self._settle()

    def finish(self) -> str:
        """The text of the held tokens, as no token follows; an incomplete character is dropped."""
        self._leave_stream()
        text = self._new_text(self._held)
        self._context, self._held = self._held, []
        return "" if text == REPLACEMENT and not self._is_broken else text

    def _context_of(self, prompt_token_ids: Sequence[int]) -> list[int]:
        """The longest end of the prompt, up to CONTEXT tokens, that is whole characters, or []."""
        for count in range(min(self.CONTEXT, len(prompt_token_ids)), 0, -1):
            tail = list(prompt_token_ids[-count:])
            if REPLACEMENT not in self._decode(tail):
                return tail
        return []

    def _start(self, context: list[int]) -> None:
        """Continue after `context`, tokens of whole characters, by a DecodeStream if possible."""
        from tokenizers.decoders import DecodeStream

        self._context, self._last, self._is_broken = context, None, False
        if self._backend is not None:
            self._stream = DecodeStream(context, self._skip_special_tokens)

    def _leave_stream(self) -> None:
        self._stream = None
        if self._last is not None:
            self._context = [self._last]

    def _push_slow(self, token_id: int) -> str:
        """`push` without a DecodeStream, by the difference between two decodes."""
        self._held.append(token_id)
        text = self._new_text(self._held)
        if not text or text.endswith(REPLACEMENT):
            return self._settle() if len(self._held) >= self.MAX_HELD else ""
        context, self._held = self._held, []
        if REPLACEMENT in text or REPLACEMENT in self._decode(context):
            self._context, self._is_broken = context, False
        else:
            self._start(context)
        return text

    def _settle(self) -> str:
        """The text of the held tokens, without tokens that may be the beginning of a character."""
        text = self._new_text(self._held)
        if not text:  # special tokens
            self._held = []
            return ""
        self._is_broken = True
        for count in range(1, self.MAX_CHARACTER + 1):
            head, tail = self._held[:-count], self._held[-count:]
            shown = self._new_text(head)
            if shown + self._decode(tail) == text:
                self._context, self._held = head, tail
                return shown
        self._context, self._held = self._held, []
        return text

    def _new_text(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens add after the context."""
        before, text = self._decode(self._context), self._decode([*self._context, *token_ids])
        return text[len(before) :]

    def _decode(self, token_ids: Sequence[int]) -> str:
        decode = self._hf.decode if self._backend is None else self._backend.decode
        text: str = decode(token_ids, skip_special_tokens=self._skip_special_tokens)
        return text
