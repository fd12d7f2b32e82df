"""RMSNorm of each head, times the SiLU of a gate: the end of a Gated DeltaNet layer.

On a GPU one Triton kernel computes the norm and the gate. Inductor would use two kernels and write
the norm's statistics to memory between them. On other devices plain torch computes both.
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
    """weight * (x / rms(x)) * silu(gate), with rms over the last dimension.

    x, gate: [tokens, heads, dim]; weight: [dim] in x's dtype. Computed in float32, but x / rms(x)
    and its product with the weight are rounded to x's dtype, as in transformers. Returns [tokens,
    heads, dim] in x's dtype.
    """
    if x.is_cuda:
        from compiledllm.kernels.gated_norm_triton import gated_norm

        return gated_norm(x, gate, weight, eps)
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return ((weight * normed.to(x.dtype)).float() * F.silu(gate.float())).to(x.dtype)
