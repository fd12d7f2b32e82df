"""Reads from a checkpoint whether it is a reranker, and how its score is computed.

Imports no torch, because the process that makes prompts uses this module, too.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compiledllm.config import ConfigError
from compiledllm.models.json_file import read_json

SCORE_HEAD = "score.weight"  # head of models that classify texts
_CLASSIFIERS = "ForSequenceClassification"
_DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_MAX_HEADER_BYTES = 2**27


@dataclass(frozen=True, slots=True)
class StoredReranker:
    """A model that reads a query with a document and judges both together.

    no_and_yes: the tokens between whose logits the model decides; the score is the probability of
    the second. head: float32 [hidden], for models that have a head in place of these tokens; the
    score is the sigmoid of its product with the last hidden state.
    """

    no_and_yes: tuple[str, str] = ("no", "yes")
    head: np.ndarray | None = None


def stored_reranker(checkpoint: Path, name: str) -> StoredReranker | None:
    """How a checkpoint computes scores; None for a model that is not a reranker.

    name: the model's name as the user gave it. Qwen3-Reranker's config is that of a chat model, so
    a reranker is recognised by "rerank" in its name, unless the config has vLLM's
    `classifier_from_token`. Raises ConfigError for rerankers that are not supported.
    """
    config = read_json(checkpoint / "config.json")
    architecture = str((config.get("architectures") or [""])[0])
    tokens = config.get("classifier_from_token")
    is_classifier = architecture.endswith(_CLASSIFIERS)
    if tokens is None and not is_classifier and "rerank" not in Path(name).name.lower():
        return None
    if config.get("model_type") != "qwen3":
        raise ConfigError(
            f"rerankers of model_type {config.get('model_type')!r:.80} are not supported, because "
            "their prompt is unknown; use Qwen3-Reranker, or an embedding model"
        )
    if tokens is None and is_classifier:
        return StoredReranker(head=_head(checkpoint))
    if tokens is None:
        return StoredReranker()
    if not isinstance(tokens, list) or len(tokens) != 2:
        raise ConfigError(f"classifier_from_token must be two tokens, got {tokens!r:.80}")
    return StoredReranker((str(tokens[0]), str(tokens[1])))


def _head(checkpoint: Path) -> np.ndarray:
    for path in sorted(checkpoint.glob("*.safetensors")):
        found = _read_tensor(path, SCORE_HEAD)
        if found is not None:
            if found.ndim != 2 or len(found) != 1:
                raise ConfigError(
                    f"{path}: {SCORE_HEAD} has shape {list(found.shape)}; a score needs one label"
                )
            head: np.ndarray = found[0]
            return head
    raise ConfigError(
        f"{checkpoint} has no tensor '{SCORE_HEAD}', which computes the scores; download it again"
    )


def _read_tensor(path: Path, name: str) -> np.ndarray | None:
    """A tensor of a safetensors file as float32; None if the file lacks the tensor."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > _MAX_HEADER_BYTES:
            raise ConfigError(f"{path} is not a readable safetensors file")
        entry: dict[str, Any] | None = json.loads(file.read(size)).get(name)
        if entry is None:
            return None
        if entry["dtype"] not in _DTYPES:
            raise ConfigError(
                f"{path}: {name} has dtype {entry['dtype']}; use float32, float16 or bfloat16"
            )
        start, end = entry["data_offsets"]
        file.seek(8 + size + start)
        stored = np.frombuffer(file.read(end - start), _DTYPES[entry["dtype"]])
    if entry["dtype"] == "BF16":  # the upper half of a float32
        stored = (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32).reshape(entry["shape"])
