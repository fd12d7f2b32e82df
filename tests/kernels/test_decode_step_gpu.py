"""The kernel of whole decode steps on a GPU, against the reference in float32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from compiledllm.kernels import decode_step_cuda
from compiledllm.kernels.decode_step import DecodeShape
from compiledllm.kernels.packed import Layout
from tests.support.decode_steps import TINY, Case, assert_equals_reference, make_case, make_inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9,
        reason="the kernel is for Hopper GPUs",
    ),
]

NUM_BLOCKS = 1000  # of the caches


def case_of(shape: DecodeShape, windows: Sequence[int] = ()) -> Case:
    torch.manual_seed(0)
    assert decode_step_cuda.why_not(shape, torch.device("cuda")) is None
    return make_case(shape, decode_step_cuda, NUM_BLOCKS, "cuda", windows)


def of_heads(count: int, num_kv_heads: int, head_dim: int, **changes: object) -> DecodeShape:
    sizes = {"num_heads": count, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
    return replace(TINY, rotary_dim=head_dim, **sizes, **changes)  # type: ignore[arg-type]


LLAMA_8B = of_heads(32, 8, 128, hidden_size=4096, intermediate_size=14336)
QWEN3_600M = of_heads(
    16,
    8,
    128,
    num_layers=3,
    hidden_size=1024,
    intermediate_size=3072,
    has_qk_norm=True,
    qk_eps=1e-6,
)
SMOLLM2_135M = of_heads(9, 3, 64, hidden_size=576, intermediate_size=1536, num_layers=5)
OTHERS = of_heads(
    8, 1, 96, hidden_size=512, dtype=torch.float16, kv_dtype=torch.float16, activation="gelu_tanh",
    has_qkv_bias=True, has_other_biases=True, soft_cap=3.0, has_sinks=True, has_windows=True,
    plus_one=True, block_size=32,
)  # fmt: skip
FP8, INT4 = Layout("fp8", 0, "float32", False), Layout("int4", 1, "bfloat16", False)
BLOCKS = Layout("fp8", 1, "float32", False, 128)
SHAPES = {
    "llama 8b": LLAMA_8B,
    "qwen3 0.6b": QWEN3_600M,
    "smollm2 135m": SMOLLM2_135M,
    "others": OTHERS,
    "fp8": replace(LLAMA_8B, layouts=(FP8,) * 4),
    "int4": replace(QWEN3_600M, layouts=(INT4,) * 4),
    "fp8 in blocks": replace(LLAMA_8B, layouts=(BLOCKS,) * 4),
    "fp8 cache": replace(LLAMA_8B, layouts=(FP8,) * 4, kv_dtype=torch.float8_e4m3fn),
}
LENGTHS = ([1], [5000], [17, 1024], [300, 0], [900, 20, 1, 5], [40, 2000, 1, 16, 17, 5, 6, 0])


@pytest.mark.parametrize("name", SHAPES)
def test_values(name: str) -> None:
    """In steps of one to eight rows, one after another in one workspace; 0: padding, at the end."""
    case = case_of(SHAPES[name], (100, 0) if SHAPES[name].has_windows else ())
    for lengths in LENGTHS:
        inputs = make_inputs(case.step.shape, lengths, NUM_BLOCKS, "cuda")
        assert_equals_reference(case, inputs)


def test_equal_steps_are_equal_to_the_bit_and_captured() -> None:
    step = case_of(QWEN3_600M).step
    inputs = make_inputs(QWEN3_600M, [600, 1100], NUM_BLOCKS, "cuda")
    arguments = inputs.x, inputs.cos, inputs.sin, inputs.attn
    expected = step(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step(*arguments)
    for _ in range(200):
        for tensor in found:
            tensor.zero_()
        graph.replay()
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
