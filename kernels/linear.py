"""x @ weight.T + bias, by the fastest kernel for the number of rows.

On a Hopper GPU, most products of 2 to 32 rows of a 16-bit dtype go to `dense_linear_cuda`. On any
GPU, most other products of up to 32 rows of a 16-bit dtype go to `skinny_triton`, as does one row
of a router in float32 (`_is_skinny`); all other products go to cuBLAS or cuBLASLt. On a GPU the
product is an op that is opaque to the compiler. Otherwise the compiler would fold the residual
addition after the product into the library's call, which copies the residual stream first. With an
opaque op, the compiler fuses the addition with the next norm, where it costs nothing.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor

from compiledllm.kernels import dense_linear_cuda
from compiledllm.kernels.ops import define

MAX_SKINNY_ROWS = 32
# Float32 products of one row with at most this many outputs use `skinny_triton`. These are routers,
# whose time is that of the launch.
_MAX_FLOAT32_OUTPUTS = 512
# With more rows than this, and at least four times as many inputs as outputs, the library is
# faster, because it splits the sums over the inputs (split-K).
_MAX_ROWS_WITHOUT_SPLIT = 16
# For these numbers of rows, cuBLASLt chooses better kernels than cuBLAS if there are many inputs,
# and equally good kernels otherwise: the layers of models of 1 to 8 B parameters take 1.5 to 4 %
# less time on an H100.
_ROWS_FOR_CUBLASLT = range(41, 161)
_PREFERENCE_LOCK = threading.Lock()


def _linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


@define("linear", fake=_linear_fake)
def _linear_on_gpu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    own = _own_product(x, weight, bias, None)
    if own is not None:
        return own
    with _best_library(x):
        return F.linear(x, weight, bias)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """x [rows, inputs], weight [outputs, inputs], bias [outputs] -> [rows, outputs].

    out: [rows, outputs], written and returned if given; must be None in compiled code or with a
    bias.
    """
    if out is not None:
        return _linear_into(out, x, weight)
    if x.is_cuda:
        return _linear_on_gpu(x, weight, bias)
    return F.linear(x, weight, bias)


def _linear_into(out: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    own = _own_product(x, weight, None, out)
    if own is not None:
        return own
    with _best_library(x):
        return torch.mm(x, weight.t(), out=out)


def _own_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None
) -> Tensor | None:
    """The product by a kernel of our own, in `out` if given; None: the library is faster."""
    if kernel := dense_linear_cuda.kernel_for(x, weight, bias, out):
        result = _linear_fake(x, weight, bias) if out is None else out
        return dense_linear_cuda.product(kernel, x, weight, bias, result)
    if not _is_skinny(x, weight) or not (out is None or out.is_contiguous()):
        return None
    from compiledllm.kernels.skinny_triton import skinny_linear

    return skinny_linear(x, weight, bias, out=out)


def _best_library(x: Tensor) -> AbstractContextManager[None]:
    """A context that selects the best library for products of x; a captured step keeps it."""
    is_for_lt = x.is_cuda and x.dtype.itemsize == 2 and x.shape[0] in _ROWS_FOR_CUBLASLT
    return _preferring("cublaslt") if is_for_lt else contextlib.nullcontext()


@contextlib.contextmanager
def _preferring(library: str) -> Iterator[None]:
    """Set torch's preferred library, a setting of the whole process: threads take turns."""
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
    if not x.is_cuda or num_rows > MAX_SKINNY_ROWS or not x.stride(1) == weight.stride(1) == 1:
        return False
    if x.dtype.itemsize != 2:  # for one row, the kernel uses no tensor cores, so nothing is TF32
        return num_rows == 1 and num_outputs <= _MAX_FLOAT32_OUTPUTS
    return num_rows <= _MAX_ROWS_WITHOUT_SPLIT or num_inputs < 4 * num_outputs
