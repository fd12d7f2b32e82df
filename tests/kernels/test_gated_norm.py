"""The gated norm in Triton against torch's, and torch's against transformers'."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compiledllm.kernels.gated_norm import gated_rms_norm
from compiledllm.kernels.gated_norm_triton import gated_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there in Triton's interpreter
SHAPES = [(1, 32, 128), (5, 3, 48), (9, 8, 256)]


def make_inputs(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x, a gate that is part of a wider tensor, and a weight."""
    torch.manual_seed(sum(shape))
    tokens, heads, dim = shape
    x = torch.randn(shape, device=DEVICE).mul(3).to(dtype)
    wider = torch.randn(tokens, heads * dim + 24, device=DEVICE).mul(3).to(dtype)
    return x, wider[:, 24:].view(shape), torch.randn(dim, device=DEVICE).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernel_equals_torch(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    x, gate, weight = make_inputs(shape, dtype)
    expected = gated_rms_norm(x.cpu(), gate.cpu(), weight.cpu(), 1e-6)
    found = gated_norm(x, gate, weight, 1e-6).cpu()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
    assert found.is_contiguous() and gated_norm(x[:0], gate[:0], weight, 1e-6).shape[0] == 0


def test_torch_equals_transformers() -> None:
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

    x, gate, weight = (t.cpu() for t in make_inputs((7, 4, 32), torch.bfloat16))
    module = Qwen3NextRMSNormGated(32, eps=1e-5).to(torch.bfloat16)
    module.weight.data.copy_(weight)
    expected = module(x.reshape(-1, 32), gate.reshape(-1, 32)).view(x.shape)
    assert torch.equal(gated_rms_norm(x, gate, weight, 1e-5), expected)
