"""A vocabulary of single bytes, and grammars and JSON schemas of any depth."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from compiledllm.grammars.library import Vocabulary


def make_vocabulary() -> Vocabulary:
    vocab = {"<eos>": 0}
    for piece in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[piece] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    return Vocabulary(tokenizer.to_str(), len(vocab), (0,))


def rules(count: int) -> str:
    chain = (f'r{i}: "a" r{i + 1}' for i in range(count))
    return "\n".join(["start: r0", *chain, f'r{count}: "b"'])


def references(count: int) -> dict[str, Any]:
    chain = {
        f"r{i}": {"type": "array", "items": {"$ref": f"#/$defs/r{i + 1}"}} for i in range(count)
    }
    return {"$ref": "#/$defs/r0", "$defs": chain | {f"r{count}": {"type": "null"}}}
