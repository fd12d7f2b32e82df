"""x @ weight.T + bias, by whatever is fastest for the number of rows.

Up to 16 rows of a 16-bit type on a GPU go to our own kernels; everything else to the library.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_SKINNY_ROWS = 16

_LIBRARY: Any = torch.library.Library("compiledllm", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("skinny_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")


def _skinny_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    from compiledllm.kernels.skinny_triton import skinny_linear

    return skinny_linear(x, weight, bias)


def _skinny_linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


_LIBRARY.impl("skinny_linear", _skinny_linear, "CompositeExplicitAutograd")
torch.library.register_fake("compiledllm::skinny_linear", _skinny_linear_fake, lib=_LIBRARY)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """x [rows, inputs], weight [outputs, inputs], bias [outputs] -> [rows, outputs].

    out: written and returned if given; not in compiled code, and not beside a bias.
    """
    if out is not None:
        return _linear_into(out, x, weight)
    if _is_skinny(x):
        product: Tensor = torch.ops.compiledllm.skinny_linear(x, weight, bias)
        return product
    return F.linear(x, weight, bias)


def _linear_into(out: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    if _is_skinny(x):
        from compiledllm.kernels.skinny_triton import skinny_linear

        return skinny_linear(x, weight, None, out=out)
    return torch.mm(x, weight.t(), out=out)


def _is_skinny(x: Tensor) -> bool:
    return x.is_cuda and x.dtype.itemsize == 2 and x.shape[0] <= MAX_SKINNY_ROWS
