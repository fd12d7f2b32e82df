"""A step that only names kernels runs blocks of each kind, in every place where kernels differ."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from compiledllm.graphs.few_blocks import few_blocks


class Block(nn.Module):
    def __init__(self, spec: str) -> None:
        super().__init__()
        self.spec = spec
        self.weight = nn.Parameter(torch.zeros(8))


def names_of_run(blocks: list[Block], metadata: list[object], caches: list[Any]) -> list[int]:
    """Indices of the blocks that run in a forward."""
    ran: list[int] = []

    def forward(block: Block, x: Tensor, update: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        ran.append(blocks.index(block))
        return x + 1, update

    decoder = SimpleNamespace(block_forward=forward)
    x = torch.zeros(3, 8)
    with few_blocks(decoder):
        for block, cache, attn in zip(blocks, caches, metadata, strict=True):
            x, _ = decoder.block_forward(block, x, x, None, cache, attn)
    assert decoder.block_forward is forward
    return ran


def test_two_blocks_of_each_spec_and_metadata_run() -> None:
    blocks = [Block(spec) for spec in "aaabba"]
    whole, window = object(), object()
    metadata = [whole, whole, whole, window, window, window]
    caches = [torch.zeros(4) for _ in blocks]
    assert names_of_run(blocks, metadata, caches) == [0, 1, 3, 4, 5]


def test_block_with_another_alignment_has_kernels_of_its_own() -> None:
    """Triton compiles other code for an address that 16 does not divide."""
    blocks = [Block("a") for _ in range(5)]
    caches = [torch.zeros(5)] * 4 + [torch.zeros(5)[1:]]
    assert names_of_run(blocks, [caches] * 5, caches) == [0, 1, 4]
    states = [[torch.zeros(4)]] * 5
    assert names_of_run(blocks, [states] * 5, states) == [0, 1]
