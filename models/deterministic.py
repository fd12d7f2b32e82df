"""Makes a model's results bitwise independent of the rest of the batch."""

from __future__ import annotations

from torch import nn

from compiledllm.config import ConfigError
from compiledllm.models.decoder import Decoder
from compiledllm.models.layers.attention import can_fuse
from compiledllm.models.layers.linear import Linear
from compiledllm.models.layers.norm import RMSNorm
from compiledllm.models.spec import MlpSpec


def make_deterministic(model: Decoder) -> None:
    """Replace the model's matmuls and norms by the kernels of `kernels.fixed_order_triton`.

    The model's attention backend must be `FixedOrderBackend`. The model must not be compiled,
    because the compiler chooses the order of sums by the number of tokens. All other operations are
    elementwise. Raises ConfigError if the model's norms, MLPs or positions have no such kernels.
    """
    _check(model)
    from compiledllm.kernels.fixed_order_triton import linear, rms_norm

    replacements: dict[type[nn.Module], tuple[str, object]] = {
        Decoder: ("product", linear),
        Linear: ("product", linear),
        RMSNorm: ("normalize", rms_norm),
    }
    for module in model.modules():
        if type(module) in replacements:
            setattr(module, *replacements[type(module)])


def _check(model: Decoder) -> None:
    norms = [layer.norm for layer in model.spec.layers] + [model.spec.final_norm]
    is_rms = all(norm.kind == "rms" for norm in norms)
    is_dense = all(isinstance(layer.mlp, MlpSpec) for layer in model.spec.layers)
    if not (is_rms and is_dense and all(can_fuse(layer.attn) for layer in model.spec.layers)):
        raise ConfigError(
            f"deterministic=True is not supported for {model.spec.architecture}: only dense MLPs, "
            "RMSNorm, and positions by rotating halves of each head, have kernels of one order; "
            "leave it out"
        )
