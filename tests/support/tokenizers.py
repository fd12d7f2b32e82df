"""A small tokenizer of each kind: byte-level BPE, SentencePiece, Metaspace, WordPiece."""

from __future__ import annotations

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers

SPACE = "\u2581"
WORDS = ["he", "hello", "world", "é", "你好", "🙂", ".", "n't", "a"]
SPECIAL = ["<s>", "</s>"]


def bpe(words: list[str], extra: list[str], **options: object) -> models.BPE:
    """A vocabulary whose merges make exactly these words."""
    letters = sorted({letter for word in words for letter in word})
    vocab = {name: i for i, name in enumerate(dict.fromkeys([*SPECIAL, *extra, *letters]))}
    merges = []
    for word in words:
        for end in range(2, len(word) + 1):
            if word[:end] not in vocab:
                vocab[word[:end]] = len(vocab)
                merges.append((word[: end - 1], word[end - 1]))
    return models.BPE(vocab, merges, **options)


def byte_level() -> Backend:
    scheme = pre_tokenizers.ByteLevel(add_prefix_space=False)
    spelt = [
        piece
        for word in WORDS
        for text in (word, " " + word)
        for piece, _ in scheme.pre_tokenize_str(text)
    ]
    backend = Backend(bpe(spelt, sorted(pre_tokenizers.ByteLevel.alphabet())))
    backend.pre_tokenizer, backend.decoder = scheme, decoders.ByteLevel()
    return backend


def sentencepiece(strips: bool) -> Backend:
    """SentencePiece BPE as in Llama 2 or, without `strips`, as in Gemma."""
    spelt = [*WORDS, *(SPACE + word for word in WORDS)]
    spelt_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    backend = Backend(bpe(spelt, [*spelt_bytes, SPACE], byte_fallback=True, unk_token="<s>"))
    front = [normalizers.Prepend(SPACE)] if strips else []
    backend.normalizer = normalizers.Sequence([*front, normalizers.Replace(" ", SPACE)])
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strips else steps)
    return backend


def metaspace() -> Backend:
    names = [*SPECIAL, SPACE, *WORDS, *(SPACE + word for word in WORDS)]
    backend = Backend(models.Unigram([(name, -1.0) for name in names], unk_id=0))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return backend


def wordpiece() -> Backend:
    names = [*SPECIAL, *WORDS, *("##" + word for word in WORDS if word.isalpha())]
    backend = Backend(models.WordPiece({n: i for i, n in enumerate(names)}, unk_token="<s>"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return backend


def word_ends() -> Backend:
    backend = Backend(bpe(WORDS, [word + "</w>" for word in WORDS]))
    backend.decoder = decoders.BPEDecoder()
    return backend
