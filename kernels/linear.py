"""x @ weight.T + bias, by whatever is fastest for the number of rows.

Up to 32 rows of a 16-bit type on a GPU go to our own kernels, everything else to the library. On a
GPU the product is one op, opaque to the compiler, which would otherwise fold the addition that
follows the product into the library's call. That call copies the residual stream first, whereas the
next norm adds for free.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor

from compiledllm.kernels.ops import define

MAX_SKINNY_ROWS = 32
_MAX_ROWS_WITHOUT_SPLIT = 16  # the library is faster for more rows where it splits the sums
# For these numbers of rows cuBLASLt chooses better kernels than cuBLAS where there are many inputs,
# and equally good ones elsewhere: the layers of models of 1 to 8 B parameters take 1.5 to 4 % less
# time on an H100.
_ROWS_FOR_CUBLASLT = range(41, 161)
_PREFERENCE_LOCK = threading.Lock()


def _linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


@define("linear", fake=_linear_fake)
def _linear_on_gpu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not _is_skinny(x, weight):
        with _best_library(x):
            return F.linear(x, weight, bias)
    from compiledllm.kernels.skinny_triton import skinny_linear

    return skinny_linear(x, weight, bias)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """x [rows, inputs], weight [outputs, inputs], bias [outputs] -> [rows, outputs].

    out: [rows, outputs], written and returned if given; not in compiled code, not beside a bias.
    """
    if out is not None:
        return _linear_into(out, x, weight)
    if x.is_cuda:
        return _linear_on_gpu(x, weight, bias)
    return F.linear(x, weight, bias)


def _linear_into(out: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    if _is_skinny(x, weight):
        from compiledllm.kernels.skinny_triton import skinny_linear

        return skinny_linear(x, weight, None, out=out)
    with _best_library(x):
        return torch.mm(x, weight.t(), out=out)


def _best_library(x: Tensor) -> AbstractContextManager[None]:
    """Inside, the library is the best for a product of x. A captured step keeps the choice."""
    is_for_lt = x.is_cuda and x.dtype.itemsize == 2 and x.shape[0] in _ROWS_FOR_CUBLASLT
    return _preferring("cublaslt") if is_for_lt else contextlib.nullcontext()


@contextlib.contextmanager
def _preferring(library: str) -> Iterator[None]:
    """The preference is the process's, so threads take turns."""
    preferred = torch.backends.cuda.preferred_blas_library
    with _PREFERENCE_LOCK:
        before = preferred()
        preferred(library)
        try:
            yield
        finally:
            preferred(before)


def _is_skinny(x: Tensor, weight: Tensor) -> bool:
    num_rows, (num_outputs, num_inputs) = x.shape[0], weight.shape
    if not x.is_cuda or x.dtype.itemsize != 2 or num_rows > MAX_SKINNY_ROWS:
        return False
    return num_rows <= _MAX_ROWS_WITHOUT_SPLIT or num_inputs < 4 * num_outputs
