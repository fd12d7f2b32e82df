"""The kernels that make a model's results bitwise independent of the rest of the batch."""

from __future__ import annotations

from compiledllm.config import ConfigError
from compiledllm.models.layers.attention import can_fuse
from compiledllm.models.layers.factory import Products
from compiledllm.models.spec import MlpSpec, ModelSpec


def fixed_order(spec: ModelSpec) -> Products:
    """The matmuls and norms of `kernels.fixed_order_triton`, for `build_model`.

    The model's attention backend must be `FixedOrderBackend`. The model must not be compiled,
    because the compiler chooses the order of sums by the number of tokens. All other operations are
    elementwise. Raises ConfigError for quantised weights, and for norms, MLPs or positions without
    kernels of a fixed order.
    """
    if spec.is_quantized:
        raise ConfigError(
            f"deterministic=True is not supported for quantised weights ({spec.quantization}); "
            "leave it out, or use unquantised weights"
        )
    _check(spec)
    from compiledllm.kernels.fixed_order_triton import linear, rms_norm

    return Products(linear, rms_norm)


def _check(spec: ModelSpec) -> None:
    norms = [layer.norm for layer in spec.layers] + [spec.final_norm]
    is_rms = all(norm.kind == "rms" for norm in norms)
    is_dense = all(isinstance(layer.mlp, MlpSpec) for layer in spec.layers)
    all_attend = len(spec.attentions) == len(spec.layers)
    have_plain_kv = all(a.v_norm is None and len(a.qkv_parts) == 3 for a in spec.attentions)
    all_fuse = have_plain_kv and all(map(can_fuse, spec.attentions))
    if not (is_rms and is_dense and all_attend and all_fuse):
        raise ConfigError(
            f"deterministic=True is not supported for {spec.architecture}: only dense MLPs, "
            "RMSNorm, attention, and rotary embedding that rotates halves of each head, have "
            "kernels with a fixed order of sums; leave it out"
        )
