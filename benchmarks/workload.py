"""The requests a benchmark runs: generated token ids, or a file of prompts.

The same seed gives the same requests on every machine and for every engine.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_MAX_LENGTH = 1024  # max tokens of a sharegpt-like prompt or output

Encode = Callable[[str], list[int]]


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """One request: its prompt, as text or token ids, and how many tokens to generate."""

    prompt: str | list[int]
    output_len: int


@dataclass(frozen=True, slots=True)
class Generated:
    """What an engine made of some requests, and the seconds of the engine's own call."""

    seconds: float
    token_ids: list[list[int]]  # each request's answer


def ids_of(request: SampleRequest) -> list[int]:
    assert not isinstance(request.prompt, str), "the prompt is text; see with_token_ids"
    return request.prompt


def check_lengths(requests: Sequence[SampleRequest], answers: Sequence[Sequence[int]]) -> None:
    """Raise RuntimeError unless each request has generated as many tokens as were asked for."""
    for request, answer in zip(requests, answers, strict=True):
        if len(answer) != request.output_len:
            raise RuntimeError(
                f"the engine generated {len(answer)} tokens instead of {request.output_len}: "
                "this is not the work that was asked for"
            )


def random_requests(
    count: int, input_len: int, output_len: int, vocab_size: int, seed: int
) -> list[SampleRequest]:
    """Prompts of random token ids, all of the same length."""
    rng = random.Random(seed)
    return [
        SampleRequest(_random_ids(rng, input_len, vocab_size), output_len) for _ in range(count)
    ]


def sharegpt_like_requests(count: int, vocab_size: int, seed: int) -> list[SampleRequest]:
    """Random token ids with the long-tailed lengths of chat traffic.

    Lognormal: median 160 tokens in (sigma 1.1), 140 out (sigma 0.9), each between 4 and 1024.
    """
    rng = random.Random(seed)

    def length(median: float, sigma: float) -> int:
        return max(4, min(_MAX_LENGTH, int(rng.lognormvariate(0, sigma) * median)))

    return [
        SampleRequest(_random_ids(rng, length(160, 1.1), vocab_size), length(140, 0.9))
        for _ in range(count)
    ]


def _random_ids(rng: random.Random, length: int, vocab_size: int) -> list[int]:
    """Random token ids, except the first and last ten ids, which tend to be special tokens."""
    return [rng.randrange(10, vocab_size - 10) for _ in range(length)]


def requests_from_file(
    path: Path, count: int | None, output_len: int, encode: Encode | None = None
) -> list[SampleRequest]:
    """The first `count` requests of a file (None: all).

    The file has JSON lines with "prompt" (text) or "prompt_token_ids", and the number of tokens to
    generate as "output_len", "output_tokens" or "max_tokens", else `output_len`. Or the file is a
    ShareGPT array: the first two turns of each conversation are prompt and answer, and `encode`, if
    given, tells the answer's length.

    Raises ValueError with the file, the line and the fault.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the dataset {path} cannot be read: {error}") from error
    parse = _sharegpt_requests if text.lstrip().startswith("[") else _json_line_requests
    found: list[SampleRequest] = []
    for request in parse(path, text, output_len, encode):
        if count is not None and len(found) == count:
            break
        found.append(request)
    if not found:
        raise ValueError(f"the dataset {path} has no requests")
    return found


def _json_line_requests(
    path: Path, text: str, output_len: int, encode: Encode | None
) -> Iterator[SampleRequest]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield _parse_request(json.loads(line), output_len)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from None


def _parse_request(entry: Any, output_len: int) -> SampleRequest:
    if not isinstance(entry, dict):
        raise ValueError(f"a request is a JSON object, got {type(entry).__name__}")
    prompt = entry.get("prompt_token_ids", entry.get("prompt"))
    if isinstance(prompt, list):
        if not all(type(token_id) is int and token_id >= 0 for token_id in prompt):
            raise ValueError("prompt_token_ids must be a list of token ids")
    elif not isinstance(prompt, str):
        raise ValueError(
            "a request needs 'prompt' (text) or 'prompt_token_ids' (a list), "
            f"got keys {sorted(entry)}"
        )
    if not prompt:
        raise ValueError("the prompt is empty")
    names = ("output_len", "output_tokens", "max_tokens")
    length = next((entry[name] for name in names if name in entry), output_len)
    if type(length) is not int or length < 1:
        raise ValueError(f"output_len must be an integer >= 1, got {length!r}")
    return SampleRequest(prompt, length)


def _sharegpt_requests(
    path: Path, text: str, output_len: int, encode: Encode | None
) -> Iterator[SampleRequest]:
    try:
        entries = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    for index, entry in enumerate(entries):
        turns = entry.get("conversations") if isinstance(entry, dict) else None
        if not isinstance(turns, list):
            raise ValueError(f"{path}, entry {index}: no 'conversations' (a ShareGPT entry)")
        texts: list[Any] = [t.get("value") if isinstance(t, dict) else None for t in turns[:2]]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{path}, entry {index}: a turn has no text under 'value'")
        if len(texts) == 2 and texts[0]:
            answer = len(encode(texts[1])) if encode else output_len
            yield SampleRequest(texts[0], max(answer, 1))


def with_token_ids(requests: Sequence[SampleRequest], encode: Encode) -> list[SampleRequest]:
    """The same requests, with every text prompt tokenized."""
    return [
        SampleRequest(encode(r.prompt), r.output_len) if isinstance(r.prompt, str) else r
        for r in requests
    ]


def fingerprint(requests: Sequence[SampleRequest]) -> str:
    """A digest of the requests, which tells reports of different work apart."""
    digest = hashlib.sha256()
    for request in requests:
        digest.update(f"{request.prompt}|{request.output_len}\n".encode())
    return digest.hexdigest()[:16]
