"""x @ weight.T + bias, by whatever is fastest for the number of rows.

One row of a 16-bit type on a GPU goes to a matrix-vector kernel; everything else to the library.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_LIBRARY: Any = torch.library.Library("compiledllm", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("gemv(Tensor x, Tensor weight, Tensor? bias) -> Tensor")


def _gemv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    from compiledllm.kernels.gemv_triton import gemv

    return gemv(x, weight, bias)


def _gemv_fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((1, weight.shape[0]))


_LIBRARY.impl("gemv", _gemv, "CompositeExplicitAutograd")
torch.library.register_fake("compiledllm::gemv", _gemv_fake, lib=_LIBRARY)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [rows, inputs], weight [outputs, inputs], bias [outputs] -> [rows, outputs]."""
    if x.is_cuda and x.shape[0] == 1 and x.dtype.itemsize == 2:
        out: Tensor = torch.ops.compiledllm.gemv(x, weight, bias)
        return out
    return F.linear(x, weight, bias)
