"""A tokenizer of the `tokenizers` library, with the facts that transformers knows in addition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Parameters of transformers' `apply_chat_template` that `PlainTokenizer` does not have.
_RARE_OPTIONS = {"padding", "truncation", "max_length", "return_tensors", "return_dict"}
_RARE_OPTIONS |= {"tokenizer_kwargs", "return_assistant_tokens_mask", "sanitize_control_tokens"}


@dataclass(frozen=True, slots=True)
class TokenizerFacts:
    """What transformers knows about a tokenizer and the `tokenizers` library does not.

    special_tokens: as chat templates see them, such as {"eos_token": "</s>"}. special_ids: of these
    and all other special tokens; None for one without an id. chat_template: one, or several by
    name. splits_special_tokens: whether special tokens within a text are ordinary characters.
    """

    eos_token_id: int | None
    special_tokens: dict[str, str]
    special_ids: list[int | None]
    chat_template: str | dict[str, str] | None
    splits_special_tokens: bool


class PlainTokenizer:
    """A tokenizer that gives the tokens, texts and prompts that transformers gives.

    The names and their meaning are those of transformers' tokenizers, for all that the engine uses.
    backend: in the JSON of the `tokenizers` library; it neither truncates nor pads. Raises
    Exception if it cannot be read.
    """

    clean_up_tokenization_spaces = False

    def __init__(self, backend: bytes, facts: TokenizerFacts) -> None:
        from tokenizers import Tokenizer

        self.backend_tokenizer = Tokenizer.from_buffer(backend)
        self.backend_tokenizer.encode_special_tokens = facts.splits_special_tokens
        self.eos_token_id = facts.eos_token_id
        self.special_tokens_map = facts.special_tokens
        self.all_special_ids = facts.special_ids
        self.chat_template = facts.chat_template

    def __len__(self) -> int:
        size: int = self.backend_tokenizer.get_vocab_size(with_added_tokens=True)
        return size

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        # Unlike `encode`, a batch call releases the GIL; its fast variant computes no offsets.
        (encoding,) = self.backend_tokenizer.encode_batch_fast(
            [text], add_special_tokens=add_special_tokens
        )
        ids: list[int] = encoding.ids
        return ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        text: str = self.backend_tokenizer.decode(
            token_ids, skip_special_tokens=skip_special_tokens
        )
        return text

    def convert_ids_to_tokens(self, token_id: int) -> str | None:
        name: str | None = self.backend_tokenizer.id_to_token(token_id)
        return name

    def get_vocab(self) -> dict[str, int]:
        vocab: dict[str, int] = self.backend_tokenizer.get_vocab(with_added_tokens=True)
        return vocab

    def get_added_vocab(self) -> dict[str, int]:
        added = self.backend_tokenizer.get_added_tokens_decoder()
        return {token.content: token_id for token_id, token in sorted(added.items())}

    def get_chat_template(self, chat_template: str | None = None, tools: Any = None) -> str:
        """The template of this name or text, or else the tokenizer's own. Raises ValueError."""
        own = self.chat_template
        if isinstance(own, dict):
            if chat_template is None:
                chat_template = "tool_use" if tools is not None and "tool_use" in own else "default"
                if chat_template not in own:
                    raise ValueError(
                        "the tokenizer has several chat templates and none is the default; name "
                        f"one: {', '.join(sorted(own))}"
                    )
            return own.get(chat_template, chat_template)
        template = own if chat_template is None else chat_template
        if template is None:
            raise ValueError("the tokenizer has no chat template")
        return template

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        chat_template: str | None = None,
        *,
        tokenize: bool,
        tools: Any = None,
        documents: Any = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        **variables: Any,
    ) -> str:
        """A conversation's prompt; see `chat_rendering.render`. tokenize: must be False."""
        from compiledllm.engine.chat_rendering import render  # imports Jinja

        assert not tokenize
        return render(
            self.get_chat_template(chat_template, tools),
            messages,
            {**self.special_tokens_map, **variables},
            tools,
            documents,
            add_generation_prompt,
            continue_final_message,
        )


def needs_transformers(options: Mapping[str, Any]) -> bool:
    """Whether `PlainTokenizer.apply_chat_template` lacks one of these options.

    It lacks options that ask for more than a text, and tools that are Python functions, which
    transformers turns into JSON schemas.
    """
    return bool(_RARE_OPTIONS & options.keys()) or any(map(callable, options.get("tools") or ()))
