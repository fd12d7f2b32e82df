"""Texts of tokens in log probabilities add up to the text, for tokenizers of every kind."""

from __future__ import annotations

import random
import re
from collections.abc import Callable

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from compiledllm.engine.detokenizer import Detokenizer
from compiledllm.engine.logprobs import LogprobList
from compiledllm.engine.pieces import Pieces
from compiledllm.engine.tokenizer import Tokenizer
from compiledllm.outputs import CompletionOutput, Logprob
from compiledllm.sampling_params import SamplingParams
from compiledllm.server.openai.logprobs import chat_logprobs, text_logprobs
from tests.support.tokenizers import (
    SPACE,
    SPECIAL,
    WORDS,
    byte_level,
    metaspace,
    sentencepiece,
    word_ends,
    wordpiece,
)


def fast(make: Callable[[], Backend]) -> Tokenizer:
    backend = make()
    backend.add_special_tokens(SPECIAL)
    return around(transformers_tokenizer(backend, eos_token="</s>"))


def transformers_tokenizer(backend: Backend, **tokens: str) -> object:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=backend, **tokens)


def without_backend() -> Tokenizer:
    from transformers import ByT5Tokenizer

    return around(ByT5Tokenizer())


def around(hf: object) -> Tokenizer:
    tokenizer = Tokenizer.__new__(Tokenizer)
    tokenizer.inner, tokenizer.pieces = hf, Pieces(hf)
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte level": lambda: fast(byte_level),
    "Llama 2": lambda: fast(lambda: sentencepiece(True)),
    "Gemma": lambda: fast(lambda: sentencepiece(False)),
    "Metaspace": lambda: fast(metaspace),
    "WordPiece": lambda: fast(wordpiece),
    "word ends": lambda: fast(word_ends),
    "without a backend": without_backend,
}


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return KINDS[request.param]()


def texts_as_words(rng: random.Random, count: int) -> str:
    return "".join(rng.choice(["", " "]) + rng.choice(WORDS) for _ in range(count))


def entries(token_ids: list[int]) -> list[dict[int, Logprob]]:
    return [{i: Logprob(-1.0, 1)} for i in token_ids]


def unescaped(token: str) -> bytes:
    """The bytes of a token's text; "bytes:" and escapes stand for others than valid UTF-8."""
    if not token.startswith("bytes:"):
        return token.encode()
    found = re.sub(r"\\x(..)", lambda match: chr(int(match[1], 16)), token.removeprefix("bytes:"))
    return found.encode("latin-1")


def streamed(
    tokenizer: Tokenizer, prompt: list[int], token_ids: list[int], stops: list[str] | None = None
) -> Detokenizer:
    params = SamplingParams(logprobs=0, stop=stops)
    detokenizer = Detokenizer(tokenizer.stream(prompt, True), params)
    for token_id in token_ids:
        if detokenizer.push(token_id):
            break
    return detokenizer


@pytest.mark.parametrize("prompt", ["", "hello"])
def test_tokens_put_together_are_the_text(tokenizer: Tokenizer, prompt: str) -> None:
    rng = random.Random(1)
    for count in (1, 2, 5, 30):
        before = tokenizer.hf.encode(prompt, add_special_tokens=False)
        found = tokenizer.hf.encode(texts_as_words(rng, count), add_special_tokens=False)
        token_ids = [i for i in found if i > 1]  # without those for what the vocabulary lacks
        stream = streamed(tokenizer, before, token_ids)
        assert stream.starts is not None
        shown = text_logprobs(
            token_ids, entries(token_ids), 0, tokenizer, stream.text, stream.starts
        )
        assert b"".join(map(unescaped, shown["tokens"])).decode() == stream.text
        for token, start in zip(shown["tokens"], shown["text_offset"], strict=True):
            if not token.startswith("bytes:"):
                assert stream.text[start:].startswith(token), (token, start)


def test_every_token_of_a_vocabulary_is_told_from_all_others(tokenizer: Tokenizer) -> None:
    token_ids = list(range(min(len(tokenizer.hf), 400)))
    found = {i: Logprob(-float(i), rank) for rank, i in enumerate(token_ids, 1)}
    own = token_ids[-1]
    shown = text_logprobs([own], [found], len(found), tokenizer, "", [0])
    top = shown["top_logprobs"][0]
    assert len(top) == len(found) and sorted(top.values()) == sorted(-float(i) for i in token_ids)
    assert top[shown["tokens"][0]] == -float(own)


@pytest.mark.parametrize("name", ["byte level", "Llama 2", "Gemma", "without a backend"])
def test_bytes_of_a_character_in_pieces_are_exact(name: str) -> None:
    tokenizer = KINDS[name]()
    for byte in range(1, 256):
        names = {"byte level": None, "without a backend": chr(byte)}
        spelt = names.get(name, f"<0x{byte:02X}>")
        if spelt is None:
            spelt = next(
                letter
                for letter in pre_tokenizers.ByteLevel.alphabet()
                if tokenizer.pieces.bytes_of(tokenizer.hf.convert_tokens_to_ids(letter))
                == bytes([byte])
            )
        token_id = tokenizer.hf.convert_tokens_to_ids(spelt)
        assert tokenizer.token_bytes(token_id) == bytes([byte])
        text = tokenizer.token_text(token_id)
        assert text == (chr(byte) if byte < 0x80 else f"bytes:\\x{byte:02x}")


def test_special_tokens_are_themselves_and_unknown_ids_nothing(tokenizer: Tokenizer) -> None:
    for token_id in tokenizer.hf.all_special_ids[:2]:
        name = tokenizer.hf.convert_ids_to_tokens(token_id)
        assert tokenizer.token_text(token_id) == name
    assert tokenizer.token_bytes(10**6) == b""


def test_offsets_are_told_of_a_prompt_as_it_was_written(tokenizer: Tokenizer) -> None:
    text = "hello world. 你好 hello"
    token_ids = tokenizer.hf.encode(text, add_special_tokens=False)
    special = tokenizer.hf.all_special_ids[0]
    starts = tokenizer.pieces.offsets([special, *token_ids, special], text)
    assert starts[0] == 0 and starts == sorted(starts) and starts[-1] <= len(text)
    for token_id, start in zip(token_ids, starts[1:-1], strict=True):
        piece = tokenizer.token_text(token_id)
        assert piece.startswith("bytes:") or text[start:].strip(" ").startswith(piece.strip(" "))


def test_offsets_recover_behind_what_the_vocabulary_lacks() -> None:
    tokenizer = KINDS["Metaspace"]()
    text = "hello ÿÿ world"
    token_ids = tokenizer.hf.encode(text, add_special_tokens=False)
    assert tokenizer.pieces.offsets(token_ids, text)[-1] == text.index(" world")


def test_offsets_end_where_a_stop_string_cut_the_text() -> None:
    tokenizer = KINDS["byte level"]()
    token_ids = tokenizer.hf.encode("hello world. hello", add_special_tokens=False)
    found = streamed(tokenizer, [], token_ids, stops=["rld"])
    assert found.text == "hello wo" and found.starts is not None
    assert found.starts == [0, 5, 6]  # the token that completed it has its beginning in the text


def test_a_token_is_visible_once_its_whole_text_is() -> None:
    tokenizer = KINDS["byte level"]()
    token_ids = tokenizer.hf.encode("hello world.a", add_special_tokens=False)
    found = streamed(tokenizer, [], token_ids[:3], stops=["ld. hello"])
    visible = found.visible_text(finished=False)
    assert (visible, found.num_visible_tokens(len(visible))) == ("hello wor", 2)
    for token_id in token_ids[3:]:
        found.push(token_id)
    visible = found.visible_text(finished=False)
    assert found.num_visible_tokens(len(visible)) == len(token_ids)


def test_chat_entries_put_together_are_the_text_too() -> None:
    """Behind a prompt that shows nothing, the first word has no space in front."""
    tokenizer = KINDS["Llama 2"]()
    token_ids = [tokenizer.hf.convert_tokens_to_ids(SPACE + word) for word in ("hello", "world")]
    found = streamed(tokenizer, [0], token_ids)
    positions = [((i, i), (-1.0, -1.0), 1, 1) for i in token_ids]
    completion = CompletionOutput(
        0, found.text, token_ids, logprobs=LogprobList(positions, None), text_offsets=found.starts
    )
    shown = chat_logprobs(completion, 1, tokenizer)
    assert shown is not None
    assert [entry["token"] for entry in shown["content"]] == ["hello", " world"]
    assert b"".join(bytes(entry["bytes"]) for entry in shown["content"]).decode() == found.text
    assert shown["content"][0]["top_logprobs"][0]["token"] == " hello"  # the vocabulary's own


def test_a_tokenizer_without_words_still_has_pieces() -> None:
    backend = Backend(models.WordLevel({"<s>": 0, "1": 1, "!": 2}, unk_token="<s>"))
    tokenizer = around(transformers_tokenizer(backend))
    assert [tokenizer.token_text(i) for i in (1, 2)] == ["1", "!"]
