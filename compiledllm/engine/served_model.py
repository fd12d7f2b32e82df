"""Facts about a loaded model, enough to make requests for it in a process without the model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from compiledllm.config import EngineConfig


@dataclass(frozen=True, slots=True)
class ServedModel:
    """config: the options as asked. max_model_len: as resolved. eos_token_ids: from config.json.

    num_slots: longest request that fits in the KV cache, in tokens. max_position: the longest
    context that the model supports, in tokens; 0: unknown.
    """

    config: EngineConfig
    max_model_len: int
    model_path: Path
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    num_slots: int
    max_position: int = 0
