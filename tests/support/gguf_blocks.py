"""Random blocks of GGUF's types."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from compiledllm.models.formats.gguf_blocks import KINDS


def random_blocks(kind: str, n: int, num_blocks: int, seed: int, spread: float = 1.0) -> Tensor:
    """uint8 [n, bytes of a row]: random bits, with normal numbers where a block has float16."""
    draw = np.random.default_rng(seed)
    blocks = draw.integers(0, 256, (n, num_blocks, KINDS[kind].num_bytes), dtype=np.uint8)
    for start in KINDS[kind].floats.values():
        values = (draw.standard_normal((n, num_blocks, 1)) * spread).astype(np.float16)
        blocks[..., start : start + 2] = values.view(np.uint8)
    return torch.from_numpy(blocks.reshape(n, -1))
