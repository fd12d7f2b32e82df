"""The byte-level BPE tokenizer that a GGUF file's metadata describes.

Built here and not by transformers, which ignores how the text is split before merging
(`tokenizer.ggml.pre`) and gives other ids for digits and spaces. Knows no architecture, and nothing
of the weights but how many embeddings there are.
"""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, processors
from tokenizers import pre_tokenizers as pre

from compiledllm.models.gguf.file import GgufFile

_CONTROL, _USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_NAMES = ("llama-bpe", "llama-v3", "llama3")


def _pre_tokenizer(name: object) -> pre.PreTokenizer:
    """How text is split before merging, by the name llama.cpp gives the scheme."""
    if name == "gpt-2":
        return pre.ByteLevel(add_prefix_space=False)
    if name == "smollm":
        return pre.Sequence([pre.Digits(individual_digits=True), _pre_tokenizer("gpt-2")])
    if name in _LLAMA3_NAMES:
        split = pre.Split(Regex(_LLAMA3_SPLIT), "isolated")
        return pre.Sequence([split, pre.ByteLevel(add_prefix_space=False, use_regex=False)])
    known = ", ".join(("gpt-2", "smollm", *_LLAMA3_NAMES))
    raise ValueError(f"tokenizer.ggml.pre {name!r} is not supported; supported: {known}")


def build_tokenizer(file: GgufFile) -> Tokenizer:
    """The byte-level BPE tokenizer that the metadata describes."""
    if (model := file.metadata.get("tokenizer.ggml.model")) != "gpt2":
        raise ValueError(
            f"tokenizer.ggml.model {model!r} is not supported (gpt2, byte-level BPE, is); "
            "use the model's Hugging Face checkpoint"
        )
    scheme = file.metadata.get("tokenizer.ggml.pre")
    vocab = _vocabulary(file)
    parts = (merge.partition(" ") for merge in file.strings("tokenizer.ggml.merges"))
    merges = [(left, right) for left, _, right in parts]
    try:  # Llama 3 takes a piece that is a token whole, without asking the merges
        bpe = models.BPE(vocab, merges, ignore_merges=scheme in _LLAMA3_NAMES)
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(f"the merges do not fit the vocabulary: {error}") from error
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = _pre_tokenizer(scheme)
    tokenizer.decoder = decoders.ByteLevel()
    types = file.metadata.get("tokenizer.ggml.token_type")
    if not isinstance(types, list) or len(types) != len(vocab):
        raise ValueError("metadata key 'tokenizer.ggml.token_type' must have a number per token")
    tokenizer.add_tokens(
        [
            AddedToken(token, special=kind == _CONTROL, normalized=False)
            for token, kind in zip(vocab, types, strict=True)
            if kind in (_CONTROL, _USER_DEFINED)
        ]
    )
    tokenizer.post_processor = _post_processor(file, vocab)
    return tokenizer


def tokenizer_config(file: GgufFile, max_length: int) -> dict[str, Any]:
    """tokenizer_config.json: what transformers adds to `build_tokenizer`'s tokenizer.json."""
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
    """Token -> id, in the order of ids."""
    tokens = file.strings("tokenizer.ggml.tokens")
    vocab = {token: i for i, token in enumerate(tokens)}
    if not len(vocab) == len(tokens) <= file.num_embeddings:
        raise ValueError(
            f"{len(tokens)} tokens, {len(vocab)} of them different, do not fit an embedding of "
            f"{file.num_embeddings} rows"
        )
    return vocab


def _is_added(file: GgufFile, role: str) -> bool:
    """Whether encoding adds the bos or eos token; where the file is silent, as llama.cpp does."""
    default = role == "bos" and file.metadata.get("tokenizer.ggml.pre") in _LLAMA3_NAMES
    is_wanted = file.metadata.get(f"tokenizer.ggml.add_{role}_token", default)
    return bool(is_wanted) and file.token_id(role) is not None


def _post_processor(file: GgufFile, vocab: dict[str, int]) -> processors.TemplateProcessing:
    bos, eos = ([str(file.token(r))] if _is_added(file, r) else [] for r in ("bos", "eos"))
    return processors.TemplateProcessing(
        single=[*bos, "$A", *eos],
        pair=[*bos, "$A", *eos, *(f"{token}:1" for token in bos), "$B:1", *eos],
        special_tokens=[(token, vocab[token]) for token in dict.fromkeys(bos + eos)],
    )
