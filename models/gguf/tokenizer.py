"""Builds the tokenizer of a GGUF file from its metadata: byte-level BPE or SentencePiece BPE.

transformers' own conversion is not used, because it ignores the pre-tokenizer
(`tokenizer.ggml.pre`) and so encodes digits and spaces differently. The module knows no
architecture; of the weights it reads only the number of embeddings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors
from tokenizers import pre_tokenizers as pre

from compiledllm.models.gguf.file import GgufFile

_CONTROL, _USER_DEFINED, _BYTE = 3, 4, 6  # values of tokenizer.ggml.token_type
_SPACE = "▁"  # stands for a space in SentencePiece tokens
# Phi-3's special tokens absorb the spaces after them, except for these tokens.
_PHI3_UNSTRIPPED = ("<unk>", "<s>", "<|endoftext|>")
# Regular expressions that split a text into words, as in the models' tokenizer.json.
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASES = (  # words in which upper case comes before lower case
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*",
)
_SIGNS, _SPACES = r" ?[^\s\p{L}\p{N}]+[\r\n]*", r"\s*[\r\n]+|\s+(?!\S)|\s+"
_SIGNS_WITH_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_GPT4 = "|".join((_ENDINGS, _WORDS, r"\p{N}{1,3}", _SIGNS, _SPACES))
_QWEN = "|".join((_ENDINGS, _WORDS, r"\p{N}", _SIGNS, _SPACES))
_GPT4O = "|".join(
    (*(f"{word}{_ENDINGS}?" for word in _CASES), r"\p{N}{1,3}", _SIGNS_WITH_SLASH, _SPACES)
)
_TEKKEN = "|".join((*_CASES, r"\p{N}", _SIGNS_WITH_SLASH, _SPACES))


@dataclass(frozen=True, slots=True)
class _Scheme:
    """A pre-tokenizer by its name in llama.cpp.

    split: regular expression of words; None: GPT-2's. single_digits: each digit is a word.
    takes_whole_words: a word that is a token becomes this token without merges. adds_bos: whether
    encoding adds bos if the file does not say. is_nfc: the text is first normalised to NFC.
    """

    split: str | None = None
    single_digits: bool = False
    takes_whole_words: bool = False
    adds_bos: bool = False
    is_nfc: bool = False


_LLAMA3 = _Scheme(_GPT4, takes_whole_words=True, adds_bos=True)
_QWEN2 = _Scheme(_QWEN, is_nfc=True)
_SCHEMES = {
    "gpt-2": _Scheme(),
    "smollm": _Scheme(single_digits=True),
    "llama-bpe": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama3": _LLAMA3,
    "dbrx": _Scheme(_GPT4),
    "smaug-bpe": _Scheme(_GPT4),
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "gpt-4o": _Scheme(_GPT4O),
    "tekken": _Scheme(_TEKKEN, takes_whole_words=True, adds_bos=True),
}


def _scheme_of(file: GgufFile) -> _Scheme:
    """The scheme of a byte-level BPE."""
    name = file.metadata.get("tokenizer.ggml.pre")
    if not isinstance(name, str) or name not in _SCHEMES:
        known = ", ".join(_SCHEMES)
        raise ValueError(f"tokenizer.ggml.pre {name!r} is not supported; supported: {known}")
    return _SCHEMES[name]


def _pre_tokenizer(scheme: _Scheme) -> pre.PreTokenizer:
    steps: list[pre.PreTokenizer] = []
    if scheme.single_digits:
        steps.append(pre.Digits(individual_digits=True))
    if scheme.split is not None:
        steps.append(pre.Split(Regex(scheme.split), "isolated"))
    steps.append(pre.ByteLevel(add_prefix_space=False, use_regex=scheme.split is None))
    return pre.Sequence(steps) if len(steps) > 1 else steps[0]


def build_tokenizer(file: GgufFile) -> Tokenizer:
    """Build the tokenizer. Raises ValueError for an unsupported scheme or inconsistent metadata."""
    makers = {"gpt2": _byte_level, "llama": _sentence_piece, "gemma4": _sentence_piece}
    model = file.metadata.get("tokenizer.ggml.model")
    if not isinstance(model, str) or model not in makers:
        raise ValueError(
            f"tokenizer.ggml.model {model!r} is not supported (gpt2, byte-level BPE, and llama "
            "and gemma4, SentencePiece, are); use the model's Hugging Face checkpoint"
        )
    vocab, types = _vocabulary(file), file.metadata.get("tokenizer.ggml.token_type")
    if not isinstance(types, list) or len(types) != len(vocab):
        raise ValueError("metadata key 'tokenizer.ggml.token_type' must have a number per token")
    if model != "gpt2":  # user-defined tokens contain plain spaces
        kinds = zip(vocab, types, strict=True)
        texts = [t.replace(" ", _SPACE) if kind == _USER_DEFINED else t for t, kind in kinds]
        vocab = {text: index for index, text in enumerate(texts)}
        if len(vocab) != len(types):
            raise ValueError("two tokens differ only in how they write a space")
    try:
        tokenizer = makers[model](file, vocab, types)
    except ValueError:
        raise
    except Exception as error:  # tokenizers raises plain Exception
        raise ValueError(f"the merges do not fit the vocabulary: {error}") from error
    strips = model == "llama" and file.metadata.get("general.architecture") == "phi3"
    tokenizer.add_tokens(
        [
            AddedToken(
                token,
                special=kind == _CONTROL,
                normalized=False,
                rstrip=strips and token not in _PHI3_UNSTRIPPED,
            )
            for token, kind in zip(vocab, types, strict=True)
            if kind in (_CONTROL, _USER_DEFINED)
        ]
    )
    tokenizer.post_processor = _post_processor(file, vocab)
    return tokenizer


def _byte_level(file: GgufFile, vocab: dict[str, int], _types: list[int]) -> Tokenizer:
    scheme = _scheme_of(file)
    merges = _listed_merges(file)
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=scheme.takes_whole_words))
    if scheme.is_nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _pre_tokenizer(scheme)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentence_piece(file: GgufFile, vocab: dict[str, int], types: list[int]) -> Tokenizer:
    """SentencePiece BPE with byte fallback, as in Llama 2 and Gemma; a space is an ordinary letter.

    Llama's tokenizer puts a space before the text, and before the text after each special token.
    """
    if file.metadata.get("tokenizer.ggml.remove_extra_whitespaces"):
        raise ValueError("tokenizer.ggml.remove_extra_whitespaces = True is not supported")
    if file.metadata.get("tokenizer.ggml.precompiled_charsmap"):
        raise ValueError("tokenizer.ggml.precompiled_charsmap is not supported")
    if types.count(_BYTE) != 256:
        raise ValueError(f"{types.count(_BYTE)} byte tokens are in the vocabulary, expected 256")
    unknown = file.token("unknown")
    has_merges = file.metadata.get("tokenizer.ggml.model") == "gemma4"
    merges = _listed_merges(file) if has_merges else _merges_by_score(file, vocab, types)
    bpe = models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    spaces = normalizers.Replace(" ", _SPACE)
    parts = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if file.metadata.get("tokenizer.ggml.add_space_prefix", True):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces])
        parts.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = spaces
    tokenizer.decoder = decoders.Sequence(parts)
    return tokenizer


def _listed_merges(file: GgufFile) -> list[tuple[str, str]]:
    parts = (merge.partition(" ") for merge in file.strings("tokenizer.ggml.merges"))
    return [(left, right) for left, _, right in parts]


def _merges_by_score(
    file: GgufFile, vocab: dict[str, int], types: list[int]
) -> list[tuple[str, str]]:
    """All merges that yield a token, by descending score of the token, then by length of the parts.

    SentencePiece merges the neighbours that make the token with the best score. It matches
    user-defined tokens first, whatever their scores in the file, so their scores count as 0.
    """
    scores = file.metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(vocab):
        raise ValueError("metadata key 'tokenizer.ggml.scores' must have a number per token")
    ranked: list[tuple[float, int, int, str, str]] = []
    for token, index in vocab.items():
        score = 0.0 if types[index] == _USER_DEFINED else scores[index]
        splits = ((token[:n], token[n:]) for n in range(1, len(token)))
        found = [(a, b) for a, b in splits if a in vocab and b in vocab]
        found.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        ranked += [(score, len(a), len(b), a, b) for a, b in found]
    ranked.sort(key=lambda merge: merge[:3], reverse=True)
    return [(a, b) for *_, a, b in ranked]


def tokenizer_config(file: GgufFile, max_length: int) -> dict[str, Any]:
    """tokenizer_config.json, which transformers reads in addition to tokenizer.json."""
    roles = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    special = {f"{ours}_token": file.token(theirs) for ours, theirs in roles.items()}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name: token for name, token in special.items() if token is not None},
        **{f"add_{role}_token": _is_added(file, role) for role in ("bos", "eos")},
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }


def _vocabulary(file: GgufFile) -> dict[str, int]:
    """Token -> id, ordered by id. Raises ValueError if a token occurs twice."""
    tokens = file.strings("tokenizer.ggml.tokens")
    vocab = {token: i for i, token in enumerate(tokens)}
    if not len(vocab) == len(tokens) <= file.num_embeddings:
        raise ValueError(
            f"{len(tokens)} tokens, {len(vocab)} of them different, do not fit an embedding of "
            f"{file.num_embeddings} rows"
        )
    return vocab


def _is_added(file: GgufFile, role: str) -> bool:
    """Whether encoding adds the bos or eos token. The default is llama.cpp's."""
    is_sentence_piece = file.metadata.get("tokenizer.ggml.model") in ("llama", "gemma4")
    default = role == "bos" and (is_sentence_piece or _scheme_of(file).adds_bos)
    is_wanted = file.metadata.get(f"tokenizer.ggml.add_{role}_token", default)
    return bool(is_wanted) and file.token_id(role) is not None


def _post_processor(file: GgufFile, vocab: dict[str, int]) -> processors.TemplateProcessing:
    bos, eos = ([str(file.token(r))] if _is_added(file, r) else [] for r in ("bos", "eos"))
    return processors.TemplateProcessing(
        single=[*bos, "$A", *eos],
        pair=[*bos, "$A", *eos, *(f"{token}:1" for token in bos), "$B:1", *eos],
        special_tokens=[(token, vocab[token]) for token in dict.fromkeys(bos + eos)],
    )
