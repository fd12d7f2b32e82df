"""Choices of experts in bfloat16 against the routers of transformers, where rounding decides."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from compiledllm.kernels.moe import route_in_torch
from compiledllm.models.layers.factory import Factory
from compiledllm.models.layers.moe import MoeMlp
from compiledllm.models.registry import load_spec
from compiledllm.models.spec import MoeSpec
from tests.support.families import VARIANTS

HIDDEN = 64


def spec_of(checkpoint: Path) -> MoeSpec:
    found = [layer.mlp for layer in load_spec(checkpoint).layers if isinstance(layer.mlp, MoeSpec)]
    return found[0]


def make_layer(spec: MoeSpec) -> MoeMlp:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return MoeMlp(HIDDEN, spec, Factory())
    finally:
        torch.set_default_dtype(before)


def close_experts(num_experts: int) -> Tensor:
    """A router's weights: logits of neighbours differ by less than bfloat16 resolves."""
    weight = (0.1 * torch.randn(num_experts, HIDDEN)).bfloat16()
    weight[1::2] = weight[::2]
    weight[1::2, 0] += 2**-9
    return weight


def chosen(ids: Tensor) -> list[list[int]]:
    return ids.sort(-1).values.tolist()


@pytest.mark.parametrize(
    ("family", "variant"), [("glm4_moe", "groups"), ("ernie4_5_moe", "some dense")]
)
def test_routers_in_float32_choose_as_transformers(
    family: str, variant: str, tiny_model: Callable[..., Path]
) -> None:
    from transformers import AutoConfig

    checkpoint = tiny_model(family, **VARIANTS[family, variant])
    spec = spec_of(checkpoint)
    layer = make_layer(spec)
    torch.manual_seed(0)
    weight, x = close_experts(spec.num_experts), torch.randn(200, HIDDEN).bfloat16()
    bias = 1e-5 * torch.randn(spec.num_experts)
    cast("Tensor", layer.router.weight).copy_(weight)
    assert layer.score_bias is not None and layer.router.weight.dtype == torch.float32
    layer.score_bias.data.copy_(bias)
    reference = reference_router(family, AutoConfig.from_pretrained(checkpoint), weight, bias)
    with torch.inference_mode():
        expected = reference(x)[2]
        ids = layer._route(x)[0][:, : spec.top_k]
        router = spec.router
        options = bias, router.scores, router.num_groups, router.top_groups
        rounded, _ = route_in_torch(x @ weight.t(), spec.top_k, True, *options)
    assert chosen(ids) == chosen(expected)
    assert chosen(rounded) != chosen(expected), "rounded logits choose other experts"


def reference_router(family: str, config: Any, weight: Tensor, bias: Tensor) -> Any:
    if family == "glm4_moe":
        from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter

        router = Glm4MoeTopkRouter(config)
        router.e_score_correction_bias.copy_(bias)
    else:
        from transformers.models.ernie4_5_moe.modeling_ernie4_5_moe import Ernie4_5_MoeTopKRouter

        router = Ernie4_5_MoeTopKRouter(config)
        router.moe_statics.e_score_correction_bias.data.copy_(bias[None])
    router.weight.data = weight
    return router
