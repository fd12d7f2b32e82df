"""Texts to tokens and back, and conversations to prompts, by a checkpoint's tokenizer."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from compiledllm.config import ConfigError, EngineConfig
from compiledllm.engine.conversation import Message, TemplateForms, plain_messages
from compiledllm.engine.pieces import Pieces
from compiledllm.engine.plain_tokenizer import PlainTokenizer, needs_transformers
from compiledllm.engine.token_stream import TokenStream
from compiledllm.engine.tokenizer_class import load_tokenizer
from compiledllm.engine.tokenizer_snapshot import open_tokenizer
from compiledllm.engine_options import ModelConfig
from compiledllm.models.source import resolve_checkpoint

MAX_TEMPLATES = 64  # chat templates whose forms of content are cached
_OPTIONS_ABOUT_END = {"add_generation_prompt", "continue_final_message"}  # of the prompt

LONG_TOKEN_IDS = 2**13  # tokens, which take about 10 ms to decode
LONG_TEXT = 2**14  # characters
CHARACTERS_PER_PIECE = 2**16  # size of the pieces in which the tokens of a long text are counted
MIN_REFUSED_CHARACTERS = 2**20  # shorter texts are tokenised, whatever the vocabulary


def load(config: EngineConfig, checkpoint: Path) -> Tokenizer | None:
    """The tokenizer that the options ask for; None with skip_tokenizer_init. Raises ConfigError."""
    model = config.model
    if model.skip_tokenizer_init:
        return None
    return Tokenizer(
        directory_of_tokenizer(model, checkpoint),
        model.chat_template,
        model.default_chat_template_kwargs,
        config.compile.artifact_dir,
    )


def directory_of_tokenizer(model: ModelConfig, checkpoint: Path) -> Path:
    """The checkpoint, or the one that the option `tokenizer` names. Raises ConfigError."""
    return resolve_checkpoint(model.tokenizer, weights=False) if model.tokenizer else checkpoint


class Tokenizer:
    """A Hugging Face tokenizer, loaded from a directory.

    chat_template: a template, or the file that holds one, instead of the directory's own.
    template_defaults: variables of the template, unless `encode_chat` is given them.
    artifact_dir: a folder of `compiledllm build`, where a snapshot of the tokenizer may lie.
    Attributes: `inner`, a `PlainTokenizer`, or transformers' tokenizer where that does more.
    """

    def __init__(
        self,
        directory: Path,
        chat_template: str | None = None,
        template_defaults: Mapping[str, Any] | None = None,
        artifact_dir: str | None = None,
    ) -> None:
        self._directory = directory
        self._template_forms: dict[str, TemplateForms] = {}  # by chat template
        with _loading(directory):
            self.inner = open_tokenizer(directory, artifact_dir)
        if chat_template is not None:
            self.inner.chat_template = read_template(chat_template)
        self._template_defaults = dict(template_defaults or {})
        self.pieces = Pieces(self.inner)

    @cached_property
    def hf(self) -> Any:
        """Transformers' tokenizer, for callers; the first use takes seconds. Raises ConfigError.

        Changes of this object do not change what the engine does.
        """
        if not isinstance(self.inner, PlainTokenizer):
            return self.inner
        with _loading(self._directory):
            loaded = load_tokenizer(self._directory)
        loaded.chat_template = self.inner.chat_template
        return loaded

    @property
    def eos_token_id(self) -> int | None:
        eos: int | None = self.inner.eos_token_id
        return eos

    def encode(
        self, text: str, add_special_tokens: bool = True, max_tokens: int | None = None
    ) -> list[int]:
        """Token ids of a prompt, with the special tokens that the tokenizer adds.

        Tokenising takes up to 2 s and 200 MB per megabyte of text, so a long text with more than
        max_tokens raises ValueError before all of it is tokenised.
        """
        if max_tokens is not None:
            self._refuse_long(text, max_tokens)
        _check_unicode(text)
        if len(text) > LONG_TEXT:
            return self._encode_long(text, add_special_tokens)
        ids: list[int] = self.inner.encode(text, add_special_tokens=add_special_tokens)
        return ids

    def _encode_long(self, text: str, add_special_tokens: bool) -> list[int]:
        """Encode without computing token offsets, which takes half the time.

        Some of transformers' tokenizers have Python code around the backend, which this way would
        skip. They are detected by encoding the text's beginning both ways.
        """

        def encode(part: str) -> list[int]:
            (encoding,) = self.inner.backend_tokenizer.encode_batch_fast(
                [part], add_special_tokens=add_special_tokens
            )
            ids: list[int] = encoding.ids
            return ids

        def encode_slowly(part: str) -> list[int]:
            ids: list[int] = self.inner.encode(part, add_special_tokens=add_special_tokens)
            return ids

        beginning = text[:1000]
        is_fast = getattr(self.inner, "backend_tokenizer", None) is not None
        if is_fast and encode_slowly(beginning) == encode(beginning):
            return encode(text)
        return encode_slowly(text)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        backend = getattr(self.inner, "backend_tokenizer", None)
        if (
            len(token_ids) > LONG_TOKEN_IDS
            and backend is not None
            and not self.inner.clean_up_tokenization_spaces
        ):
            # decode_batch releases the GIL, since a million ids take a second.
            texts: list[str] = backend.decode_batch([list(token_ids)], skip_special_tokens)
            return texts[0]
        text: str = self.inner.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text

    def token_text(self, token_id: int) -> str:
        """A single token as text, its spaces kept; part of a character as "bytes:" and escapes."""
        return self.pieces.text_of(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to a text."""
        return self.pieces.bytes_of(token_id)

    @property
    def chat_template_text(self) -> str:
        """The chat template, or all templates joined; "" if there is none."""
        template = self.inner.chat_template or ""
        return "\n".join(template.values()) if isinstance(template, dict) else str(template)

    def token_id(self, text: str) -> int | None:
        """Id of the token with exactly this text among the added tokens; None if there is none."""
        token_id: int | None = self.inner.get_added_vocab().get(text)
        return token_id

    def backend_json(self) -> str:
        """The whole tokenizer, in the format of the `tokenizers` library."""
        backend = getattr(self.inner, "backend_tokenizer", None)
        if backend is None:
            raise ValueError("structured_outputs needs a fast tokenizer, and this one is not")
        if backend.padding or backend.truncation:
            backend = copy.copy(backend)
            backend.no_padding()
            backend.no_truncation()
        text: str = backend.to_str()
        return text

    def encode_chat(
        self,
        messages: Sequence[Message],
        chat_template: str | None = None,
        max_tokens: int | None = None,
        **options: Any,
    ) -> tuple[str, list[int]]:
        """Render a conversation by the chat template: the prompt as text and as token ids.

        Content reaches the template in a form that it shows (`TemplateForms`). Raises ValueError
        for a bad message, if the template fails, and if it would drop a user's words.
        """
        if chat_template is None and not self.inner.chat_template:
            raise ValueError(
                "the tokenizer has no chat template; pass chat_template=... or use generate()"
            )
        plain = plain_messages(messages)
        options = self._template_defaults | options
        try:
            template: str = self.inner.get_chat_template(chat_template, options.get("tools"))
            forms = self._forms(template, options)
            text = self._render(template, forms.fit(plain), options)
        except Exception as error:  # a template may raise any kind of error
            raise ValueError(f"the chat template failed: {error}") from error
        if forms.of("user").shows_none and any(message["role"] == "user" for message in plain):
            raise ValueError(
                "this chat template drops what the user says, given as a string or as a list of "
                "parts; use another model or another chat template"
            )
        return text, self.encode(text, False, max_tokens)

    def check_length(self, num_characters: int, max_tokens: int) -> None:
        """Raise ValueError for a text so long that it has more than max_tokens in any case.

        A token has at most as many characters as the vocabulary's longest token has bytes. A
        normalizer may shorten the text, we assume by at most four characters to one.
        """
        shrink = 4 if getattr(self.inner, "backend_tokenizer", None) is None else 1
        if shrink == 1 and self.inner.backend_tokenizer.normalizer is not None:
            shrink = 4
        max_characters = max(max_tokens * self._max_token_bytes * shrink, MIN_REFUSED_CHARACTERS)
        if num_characters > max_characters:
            raise ValueError(
                f"the prompt has {num_characters} characters, and {max_tokens} tokens, which is "
                f"what fits, have at most {max_characters}; shorten it"
            )

    def _refuse_long(self, text: str, max_tokens: int) -> None:
        """Raise ValueError if the text has more than max_tokens, counted piece by piece.

        A cut between pieces adds at most as many tokens as the longest token has bytes.
        """
        if len(text) <= max(CHARACTERS_PER_PIECE, 2 * max_tokens):
            return
        self.check_length(len(text), max_tokens)
        count = 0
        for start in range(0, len(text), CHARACTERS_PER_PIECE):
            piece = text[start : start + CHARACTERS_PER_PIECE]
            count += len(self.encode(piece, add_special_tokens=False)) - self._max_token_bytes
            if count > max_tokens:
                raise ValueError(
                    f"the prompt has {len(text)} characters, of which the first "
                    f"{start + len(piece)} alone are more than the {max_tokens} tokens that fit; "
                    "shorten it"
                )

    @cached_property
    def _max_token_bytes(self) -> int:
        """Length of the vocabulary's longest token, in bytes, special tokens included."""
        return max(len(token.encode()) for token in self.inner.get_vocab())

    def _render(self, template: str, messages: list[Message], options: dict[str, Any]) -> str:
        tokenizer = self.hf if needs_transformers(options) else self.inner
        text: str = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, **options
        )
        return text

    def _forms(self, template: str, options: dict[str, Any]) -> TemplateForms:
        """The template's forms of content, found once per template.

        They are found without the request's options, unless the template then shows no form.
        """
        forms = self._template_forms.get(template)
        if forms is None:
            if len(self._template_forms) == MAX_TEMPLATES:
                self._template_forms.clear()
            forms = TemplateForms(lambda messages: self._render(template, messages, {}))
            self._template_forms[template] = forms
        if not forms.of("user").shows_none:
            return forms
        more = {name: value for name, value in options.items() if name not in _OPTIONS_ABOUT_END}
        return TemplateForms(lambda messages: self._render(template, messages, more))

    def stream(self, prompt_token_ids: Sequence[int], skip_special_tokens: bool) -> TokenStream:
        """A streaming decoder that continues after a prompt."""
        return TokenStream(self.inner, prompt_token_ids, skip_special_tokens)


@contextmanager
def _loading(directory: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # transformers raises many kinds for "no tokenizer here"
        cause = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"no tokenizer could be loaded from '{directory}' ({cause}); name one with "
            "tokenizer=..., or use skip_tokenizer_init=True and token ids"
        ) from error


def read_template(template: str) -> str:
    """The text of a chat template that is given as text or as a file. Raises ConfigError."""
    if any(mark in template for mark in ("{{", "{%", "{#", "\n")):
        return template
    path = Path(template).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"chat_template='{template}' is neither a Jinja template nor a file that can be read "
            f"({error}); give a path, or the template's text"
        ) from None


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the prompt is not valid Unicode text: {error}") from None
