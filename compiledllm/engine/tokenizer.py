"""The door to transformers' tokenizers: encode, chat templates, streaming decode."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compiledllm.config import ConfigError
from compiledllm.engine.conversation import Message, TemplateForms, plain_messages

MAX_TEMPLATES = 64  # whose forms of content are remembered
_ABOUT_THE_END = {"add_generation_prompt", "continue_final_message"}


def warm_up() -> None:
    """Import what the first tokenizer needs, some seconds of work."""
    from transformers import AutoTokenizer  # noqa: F401


class Tokenizer:
    """A Hugging Face tokenizer, loaded from a directory."""

    def __init__(self, directory: Path) -> None:
        from transformers import AutoTokenizer

        self._token_texts: dict[int, str] = {}
        self._template_forms: dict[str, TemplateForms] = {}  # by chat template
        try:
            self.hf = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        except Exception as error:  # transformers raises many kinds for "no tokenizer here"
            cause = str(error).strip().partition("\n")[0]
            raise ConfigError(
                f"no tokenizer could be loaded from '{directory}' ({cause}); name one with "
                "tokenizer=..., or use skip_tokenizer_init=True and token ids"
            ) from error

    @property
    def eos_token_id(self) -> int | None:
        eos: int | None = self.hf.eos_token_id
        return eos

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a prompt, with the special tokens the tokenizer adds by itself."""
        _check_unicode(text)
        ids: list[int] = self.hf.encode(text, add_special_tokens=add_special_tokens)
        return ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        text: str = self.hf.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text

    def token_text(self, token_id: int) -> str:
        """A single token as text; part of a character comes out as U+FFFD."""
        text = self._token_texts.get(token_id)
        if text is None:
            text = self._token_texts[token_id] = self.decode([token_id], False)
        return text

    @property
    def chat_template_text(self) -> str:
        """The chat template, or all of them; "" if there is none."""
        template = self.hf.chat_template or ""
        return "\n".join(template.values()) if isinstance(template, dict) else str(template)

    def token_id(self, text: str) -> int | None:
        """Of a token with exactly this text that was added to the vocabulary; None if none was."""
        token_id: int | None = self.hf.get_added_vocab().get(text)
        return token_id

    def backend_json(self) -> str:
        """The whole tokenizer, in the format of the `tokenizers` library."""
        backend = getattr(self.hf, "backend_tokenizer", None)
        if backend is None:
            raise ValueError("structured_outputs needs a fast tokenizer, and this one is not")
        if backend.padding or backend.truncation:
            backend = copy.copy(backend)
            backend.no_padding()
            backend.no_truncation()
        text: str = backend.to_str()
        return text

    def encode_chat(
        self, messages: Sequence[Message], chat_template: str | None = None, **options: Any
    ) -> tuple[str, list[int]]:
        """A conversation through the chat template: the prompt as text and as token ids.

        Content reaches the template in the form that it shows (`TemplateForms`). Raises ValueError
        for a bad message, for what the template refuses, and where it would drop a user's words.
        """
        if chat_template is None and not self.hf.chat_template:
            raise ValueError(
                "the tokenizer has no chat template; pass chat_template=... or use generate()"
            )
        plain = plain_messages(messages)
        try:
            template: str = self.hf.get_chat_template(chat_template, options.get("tools"))
            forms = self._forms(template, options)
            text = self._render(template, forms.fit(plain), options)
        except Exception as error:  # jinja's own kinds, and whatever a template does
            raise ValueError(f"the chat template failed: {error}") from error
        if forms.of("user").shows_none and any(message["role"] == "user" for message in plain):
            raise ValueError(
                "this chat template drops what the user says, given as a string or as a list of "
                "parts; use another model or another chat template"
            )
        _check_unicode(text)
        ids: list[int] = self.hf.encode(text, add_special_tokens=False)
        return text, ids

    def _render(self, template: str, messages: list[Message], options: dict[str, Any]) -> str:
        text: str = self.hf.apply_chat_template(
            messages, chat_template=template, tokenize=False, **options
        )
        return text

    def _forms(self, template: str, options: dict[str, Any]) -> TemplateForms:
        """Found once for each template, without a request's own options if they are not needed."""
        forms = self._template_forms.get(template)
        if forms is None:
            if len(self._template_forms) == MAX_TEMPLATES:
                self._template_forms.clear()
            forms = TemplateForms(lambda messages: self._render(template, messages, {}))
            self._template_forms[template] = forms
        if not forms.of("user").shows_none:
            return forms
        more = {name: value for name, value in options.items() if name not in _ABOUT_THE_END}
        return TemplateForms(lambda messages: self._render(template, messages, more))

    def stream(self, prompt_token_ids: Sequence[int], skip_special_tokens: bool) -> TokenStream:
        """A streaming decoder that continues after a prompt."""
        return TokenStream(self.hf, prompt_token_ids, skip_special_tokens)


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the prompt is not valid Unicode text: {error}") from None


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
