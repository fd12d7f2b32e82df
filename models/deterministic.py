"""Makes a model's results independent of what else is in the batch, bit for bit."""

from __future__ import annotations

from torch import nn

from compiledllm.models.decoder import Decoder
from compiledllm.models.layers.linear import Linear
from compiledllm.models.layers.norm import RMSNorm

FIXED_ORDER_BACKEND = "fixed_order"


def make_deterministic(model: Decoder) -> None:
    """Replace products and norms by those of `kernels.fixed_order_triton`.

    The model must have been built with `FIXED_ORDER_BACKEND` and must not be compiled: the compiler
    chooses its own sums for each number of tokens. Everything else works element by element.
    """
    from compiledllm.kernels.fixed_order_triton import linear, rms_norm

    replacements: dict[type[nn.Module], tuple[str, object]] = {
        Decoder: ("product", linear),
        Linear: ("product", linear),
        RMSNorm: ("normalize", rms_norm),
    }
    for module in model.modules():
        if type(module) in replacements:
            setattr(module, *replacements[type(module)])
