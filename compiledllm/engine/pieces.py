"""The exact bytes of each token of a vocabulary.

A token decoded by itself loses the space in front of a word, and part of a character becomes
U+FFFD. So a token is decoded after an ordinary word, and the bytes of part of a character are read
from the vocabulary's spelling. Each token is decoded on first use.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

_SPELT_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # a byte as byte fallback spells it
_MAX_SKIPPED = 32  # bytes of unrecognised text that a search for the next token may skip
_CONTINUATION = bytes(range(0x80, 0xC0))  # UTF-8's continuation bytes
_MAX_TRIED_IDS = 20_000  # token ids tried in the search for an ordinary word


def _byte_of_letter() -> dict[str, int]:
    """Byte of each letter in the spelling of a byte-level vocabulary.

    Byte-level BPE spells printable bytes of Latin-1 as themselves and the other bytes as letters
    from U+0100 on. Other byte vocabularies spell every byte as itself.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in range(256)}
    return table | {chr(256 + offset): byte for offset, byte in enumerate(others)}


_BYTE_OF_LETTER = _byte_of_letter()


class Pieces:
    """The bytes and the text of each token id of a Hugging Face tokenizer."""

    def __init__(self, hf: Any) -> None:
        self._hf = hf
        self._backend = getattr(hf, "backend_tokenizer", None)
        self._special = frozenset(hf.all_special_ids)
        self._bytes: dict[int, bytes] = {}
        self._texts: dict[int, str] = {}
        self._anchor: tuple[list[int], str] | None = None  # an ordinary word: ids, text

    def text_of(self, token_id: int) -> str:
        """A token as text, its spaces kept.

        A token that is not valid UTF-8 is spelt as OpenAI does: "bytes:" and escapes.
        """
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = _as_text(self.bytes_of(token_id))
        return text

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes that a token adds to a text; empty for an id without a token."""
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = self._make(token_id)
        return found

    def offsets(self, token_ids: Sequence[int], text: str) -> list[int]:
        """Where each token begins in the text that was tokenised, in characters.

        A token that is not in the text, such as one that the tokenizer added, has no width.
        """
        data, position, starts = text.encode(errors="replace"), 0, []
        for token_id in token_ids:
            piece = self.bytes_of(token_id)
            if position == 0 and piece[:1] == b" " and data[:1] != b" ":
                piece = piece[1:]  # the tokenizer added this space
            start = (
                data.find(piece, position, position + len(piece) + _MAX_SKIPPED) if piece else -1
            )
            starts.append(position if start < 0 else start)
            if start >= 0:
                position = start + len(piece)
        return _in_characters(data, starts)

    def _make(self, token_id: int) -> bytes:
        if self._anchor is None:
            self._anchor = self._find_anchor()
        if token_id in self._special:
            return (self._name(token_id) or "").encode()
        ids, before = self._anchor
        text = self._decode([*ids, token_id])
        if not text.startswith(before):
            before, text = "", self._decode([token_id])
        text = text[len(before) :]
        if text and "\ufffd" not in text:
            return text.encode()
        name = self._name(token_id)
        if name is None:
            return b""
        if match := _SPELT_BYTE.fullmatch(name):
            return bytes.fromhex(match[1])
        letters = [_BYTE_OF_LETTER.get(letter, -1) for letter in name]
        is_spelt = bool(letters) and min(letters) >= 0 and not name.isascii()
        return bytes(letters) if is_spelt else text.encode()

    def _find_anchor(self) -> tuple[list[int], str]:
        """An ordinary word, as ids and text, whose text stays the same when a token follows.

        Empty if there is none.
        """
        for token_id in range(min(len(self._hf), _MAX_TRIED_IDS)):
            name = (self._name(token_id) or "").lstrip("\u2581\u0120")
            if not (name.isascii() and name.isalpha()):
                continue
            text = self._decode([token_id])
            if text and self._decode([token_id] * 2).startswith(text):
                return [token_id], text
        return [], ""

    def _name(self, token_id: int) -> str | None:
        """The vocabulary's spelling of a token; None for an id without a token."""
        try:
            name: str | None = self._hf.convert_ids_to_tokens(token_id)
        except (IndexError, KeyError, TypeError, ValueError):  # not all tokenizers return None
            return None
        return name

    def _decode(self, token_ids: list[int]) -> str:
        if self._backend is not None:
            text: str = self._backend.decode(token_ids, skip_special_tokens=False)
            return text
        try:
            text = self._hf.decode(
                token_ids,
                skip_special_tokens=False,
                clean_up_tokenization_spaces=False,
                spaces_between_special_tokens=False,
            )
        except (IndexError, KeyError, TypeError, ValueError):
            return ""
        return text


def _as_text(piece: bytes) -> str:
    try:
        return piece.decode()
    except UnicodeDecodeError:
        shown = (chr(b) if 0x20 <= b < 0x7F and b != 0x5C else f"\\x{b:02x}" for b in piece)
        return "bytes:" + "".join(shown)


def _in_characters(data: bytes, starts: list[int]) -> list[int]:
    """Ascending byte positions in UTF-8 as character positions, rounded down inside a character."""
    offsets, position, count = [], 0, 0
    for start in starts:
        count += len(data[position:start].translate(None, _CONTINUATION))
        position = start
        is_inside = start < len(data) and data[start] & 0xC0 == 0x80
        offsets.append(count - is_inside)
    return offsets
