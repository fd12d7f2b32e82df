"""Log probabilities: in OpenAI's formats for chats and completions, in vLLM's for prompts."""

from __future__ import annotations

from typing import Any

from compiledllm.engine.tokenizer import Tokenizer
from compiledllm.outputs import CompletionOutput, PositionLogprobs, RequestOutput


def prompt_logprobs(output: RequestOutput) -> list[Any] | None:
    """Prompt log probabilities in vLLM's format: per token, a map from token id to its entry."""
    if output.prompt_logprobs is None:
        return None
    return [
        found
        and {
            str(token_id): {
                "logprob": _finite(entry.logprob),
                "rank": entry.rank,
                "decoded_token": entry.decoded_token,
            }
            for token_id, entry in found.items()
        }
        for found in output.prompt_logprobs
    ]


def chat_logprobs(
    completion: CompletionOutput, top: int, tokenizer: Tokenizer | None
) -> dict[str, Any] | None:
    if completion.logprobs is None:
        return None
    content = []
    ids, text, offsets = completion.token_ids, completion.text, completion.text_offsets or []
    shown = _shown_texts(ids, text, offsets, tokenizer)
    for token_id, own, found in zip(ids, shown, completion.logprobs, strict=True):
        entry, *others = _entries(found, token_id, top, tokenizer)
        if own != entry["token"]:
            entry |= {"token": own, "bytes": list(own.encode())}
        content.append(entry | {"top_logprobs": others})
    return {"content": content, "refusal": None}


def _entries(
    found: PositionLogprobs, token_id: int, top: int, tokenizer: Tokenizer | None
) -> list[dict[str, Any]]:
    """The sampled token's entry, then the most likely tokens' and the requested tokens' entries."""
    return [_entry(i, found, tokenizer) for i in (token_id, *_ranked(found, top))]


def _ranked(found: PositionLogprobs, top: int) -> list[int]:
    """Token ids: the most likely tokens, then the tokens that were asked for."""
    best = sorted(
        (i for i, entry in found.items() if entry.rank is not None and entry.rank <= top),
        key=lambda i: found[i].rank or 0,
    )
    return best + [i for i, entry in found.items() if entry.rank is None]


def _entry(token_id: int, found: PositionLogprobs, tokenizer: Tokenizer | None) -> dict[str, Any]:
    text = _token_text(token_id, tokenizer)
    piece = text.encode() if tokenizer is None else tokenizer.token_bytes(token_id)
    return {"token": text, "logprob": _finite(found[token_id].logprob), "bytes": list(piece)}


def _finite(logprob: float) -> float:
    return max(logprob, -9999.0)  # JSON has no infinity


def _token_text(token_id: int, tokenizer: Tokenizer | None) -> str:
    return f"token_id:{token_id}" if tokenizer is None else tokenizer.token_text(token_id)


def _shown_texts(
    token_ids: list[int], text: str, offsets: list[int], tokenizer: Tokenizer | None
) -> list[str]:
    """The vocabulary's text of each token, without a space at its edge that the text lacks."""
    texts = [_token_text(token_id, tokenizer) for token_id in token_ids]
    for i, (start, end) in enumerate(zip(offsets, [*offsets, len(text)][1:], strict=True)):
        shown = text[max(start, 0) : end]
        is_whole = start >= 0 and (shown or start == 0)  # otherwise the text lacks the token
        if is_whole and shown != texts[i] and shown.strip(" ") == texts[i].strip(" "):
            texts[i] = shown
    return texts


def text_logprobs(
    token_ids: list[int],
    found: list[PositionLogprobs | None],
    top: int,
    tokenizer: Tokenizer | None,
    text: str,
    offsets: list[int],
) -> dict[str, Any]:
    """Log probabilities of a text completion; the first token of a prompt has none.

    offsets: the position in `text` at which each token begins.
    """
    values: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    for token_id, entries in zip(token_ids, found, strict=True):
        if entries is None:
            values.append(None)
            tops.append(None)
        else:
            values.append(_finite(entries[token_id].logprob))
            tops.append(_by_text(entries, token_id, top, tokenizer) if top else None)
    return {
        "tokens": _shown_texts(token_ids, text, offsets, tokenizer),
        "token_logprobs": values,
        "top_logprobs": tops if top else None,
        "text_offset": offsets,
    }


def _by_text(
    found: PositionLogprobs, own: int, top: int, tokenizer: Tokenizer | None
) -> dict[str, float]:
    """Map token texts to log probabilities, the most likely first and the sampled token last.

    Among tokens with the same text, the sampled token has the text as its key, or else the most
    likely one; the other keys are "token_id:N".
    """
    ranked = _ranked(found, top)
    keys: dict[str, int] = {}
    for token_id in dict.fromkeys((own, *ranked)):
        text = _token_text(token_id, tokenizer)
        keys[text if text and text not in keys else f"token_id:{token_id}"] = token_id
    key_of = {token_id: key for key, token_id in keys.items()}
    return {key_of[i]: _finite(found[i].logprob) for i in dict.fromkeys((*ranked, own))}
