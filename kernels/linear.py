"""x @ weight.T + bias, by whatever is fastest for the number of rows.

Up to 32 rows of a 16-bit type on a GPU go to our own kernels; everything else to the library. On a
GPU all of it is one op, opaque to the compiler: it would fold the addition that follows a product
into the library's call, which then copies the residual stream first; the next norm adds for free.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_SKINNY_ROWS = 32
_ROWS_WITHOUT_SPLIT = 16  # more rows are faster in the library where it splits the sums
# Of so many cuBLASLt chooses better kernels than cuBLAS where inputs are many, and as good ones
# otherwise: on an H100 it takes 1.5 to 4 % less for the layers of models of 1 to 8 B parameters.
_ROWS_FOR_CUBLASLT = range(41, 161)
_PREFERENCE = threading.Lock()

_LIBRARY: Any = torch.library.Library("compiledllm", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not _is_skinny(x, weight):
        with _best_library(x):
            return F.linear(x, weight, bias)
    from compiledllm.kernels.skinny_triton import skinny_linear

    return skinny_linear(x, weight, bias)


def _linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


_LIBRARY.impl("linear", _linear, "CompositeExplicitAutograd")
torch.library.register_fake("compiledllm::linear", _linear_fake, lib=_LIBRARY)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """x [rows, inputs], weight [outputs, inputs], bias [outputs] -> [rows, outputs].

    out: written and returned if given; not in compiled code, and not beside a bias.
    """
    if out is not None:
        return _linear_into(out, x, weight)
    if x.is_cuda:
        product: Tensor = torch.ops.compiledllm.linear(x, weight, bias)
        return product
    return F.linear(x, weight, bias)


def _linear_into(out: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    if _is_skinny(x, weight):
        from compiledllm.kernels.skinny_triton import skinny_linear

        return skinny_linear(x, weight, None, out=out)
    with _best_library(x):
        return torch.mm(x, weight.t(), out=out)


def _best_library(x: Tensor) -> AbstractContextManager[None]:
    """For a product of x inside. A captured step keeps what was chosen."""
    is_for_lt = x.is_cuda and x.dtype.itemsize == 2 and x.shape[0] in _ROWS_FOR_CUBLASLT
    return _preferring("cublaslt") if is_for_lt else contextlib.nullcontext()


@contextlib.contextmanager
def _preferring(library: str) -> Iterator[None]:
    """It holds for the whole process: one thread after the other."""
    preferred = torch.backends.cuda.preferred_blas_library
    with _PREFERENCE:
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
    return num_rows <= _ROWS_WITHOUT_SPLIT or num_inputs < 4 * num_outputs
