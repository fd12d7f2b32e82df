"""What there is to know of a loaded model without having it: enough to make requests for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from compiledllm.config import EngineConfig


@dataclass(frozen=True, slots=True)
class ServedModel:
    """config: resolved. eos_token_ids: of config.json.

    num_slots: most tokens of a request that the KV cache has room for. max_position: the longest
    context that the model was made for; 0: not known.
    """

    config: EngineConfig
    model_path: Path
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    num_slots: int
    max_position: int = 0
