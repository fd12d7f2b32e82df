"""RMSNorm of each head, times the SiLU of a gate: the end of a Gated DeltaNet layer.

On a GPU one Triton kernel computes both, where the compiler would write the norm's statistics to
memory in between; on other devices plain torch does.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from compiledllm.kernels.ops import define


def _gated_norm_fake(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@define("gated_rms_norm", fake=_gated_norm_fake)
def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * (x / rms(x)) * silu(gate), in float32 from the weight on.

    x, gate: [tokens, heads, dim]; weight: [dim]. x / rms(x) and its product with the weight are
    rounded to x's dtype, as in transformers. Returns [tokens, heads, dim] in x's dtype.
    """
    if x.is_cuda:
        from compiledllm.kernels.gated_norm_triton import gated_norm

        return gated_norm(x, gate, weight, eps)
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return ((weight * normed.to(x.dtype)).float() * F.silu(gate.float())).to(x.dtype)
