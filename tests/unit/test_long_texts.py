"""Texts that cannot fit are refused before they are tokenised, and no others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from compiledllm.engine import tokenizer as module
from compiledllm.engine.tokenizer import Tokenizer

PIECE = module.CHARACTERS_PER_PIECE


@pytest.fixture(scope="module")
def dropping(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Words of up to five letters; the normalizer drops every x."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, normalizers, pre_tokenizers

    folder = tmp_path_factory.mktemp("dropping")
    backend = Backend(models.WordLevel({"[UNK]": 0, "hello": 1, "world": 2}, "[UNK]"))
    backend.normalizer = normalizers.Replace("x", "")
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]"}'
    )
    return Tokenizer(folder)


@pytest.fixture
def encoded(dropping: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lengths of the texts that are tokenised."""
    lengths: list[int] = []
    encode = dropping._encode_long

    def noted(text: str, *more: Any) -> list[int]:
        lengths.append(len(text))
        return encode(text, *more)

    monkeypatch.setattr(dropping, "_encode_long", noted)
    return lengths


def test_a_text_is_counted_only_until_it_is_too_long(
    dropping: Tokenizer, encoded: list[int]
) -> None:
    text = "hello " * 160_000
    with pytest.raises(ValueError, match="first 65536 alone are more than the 2047 tokens"):
        dropping.encode(text, True, 2047)
    assert encoded == [PIECE]
    with pytest.raises(ValueError, match="alone are more than the 50000 tokens"):
        dropping.encode(text, True, 50_000)
    assert encoded[1:] == [PIECE] * 5  # some 10,900 tokens each


def test_what_is_longer_than_any_tokens_is_not_tokenised(
    dropping: Tokenizer, encoded: list[int]
) -> None:
    with pytest.raises(ValueError, match="has 2000000 characters, and 2047 tokens"):
        dropping.encode("hello " + "x" * 1_999_994, True, 2047)
    assert encoded == []
    dropping.check_length(5 * 500_000, 500_000)
    with pytest.raises(ValueError, match="have at most 10000000; shorten it"):
        dropping.check_length(20 * 500_000 + 1, 500_000)  # five letters, four of which may go


def test_what_a_normalizer_drops_does_not_count(dropping: Tokenizer) -> None:
    text = "hello " + "x" * 1_000_000 + " world"
    assert dropping.encode(text, True, 2) == [1, 2]


def test_a_text_that_fits_is_tokenised_as_transformers_does(dropping: Tokenizer) -> None:
    text = "hello x world " * 20_000
    assert dropping.encode(text, True, 40_000) == dropping.hf.encode(text)
    assert dropping.encode(text[: PIECE // 2]) == dropping.hf.encode(text[: PIECE // 2])


@pytest.mark.real_model  # its tokenizer
def test_long_token_ids_are_decoded_as_short_ones_are(default_model: Path) -> None:
    tokenizer = Tokenizer(default_model)
    ids = tokenizer.encode("Straße, 日本 \U0001f600 <|im_end|> " * 3000)
    assert len(ids) > module.LONG_TOKEN_IDS
    for skip in (True, False):
        assert tokenizer.decode(ids, skip) == tokenizer.hf.decode(ids, skip_special_tokens=skip)
