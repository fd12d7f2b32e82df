"""Rotary position embedding. Tables are computed once per step for all layers of equal RopeSpec."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compiledllm.models.spec import RopeSpec


class RotaryTable(nn.Module):
    """int64 positions [tokens] -> (cos, sin), each [tokens, 1, rotary_dim] in the given dtype.

    With `RopeSpec.growth`, the tables are [tokens, 2, rotary_dim]: for queries, then for keys.
    """

    def __init__(self, spec: RopeSpec) -> None:
        super().__init__()
        self.spec = spec
        frequencies = torch.tensor(spec.inverse_frequencies, dtype=torch.float32)
        self.register_buffer("inverse_frequencies", frequencies, persistent=False)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        frequencies: Tensor = self.get_buffer("inverse_frequencies").float()
        angles = positions.float()[:, None] * frequencies  # [tokens, rotary_dim / 2]
        if self.spec.interleaved:
            angles = angles.repeat_interleave(2, dim=-1).unsqueeze(1)
        else:
            angles = torch.cat((angles, angles), dim=-1).unsqueeze(1)
        scale: float | Tensor = self.spec.scale
        if self.spec.growth is not None:
            factor, length = self.spec.growth
            counted = positions.float() + self.spec.first_position
            growth = 1 + factor * torch.log1p(torch.floor(counted / length))
            scale = scale * torch.stack((growth, torch.ones_like(growth)), dim=-1)[..., None]
        return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate x [tokens, heads, head_dim]. Dimensions beyond the tables' width stay unchanged.

    cos, sin: [tokens, 1, rotary_dim]."""
    width = cos.shape[-1]
    rotated, rest = x[..., :width], x[..., width:]
    if interleaved:
        partner = torch.stack((-rotated[..., 1::2], rotated[..., ::2]), dim=-1).flatten(-2)
    else:
        first, second = rotated.chunk(2, dim=-1)
        partner = torch.cat((-second, first), dim=-1)
    turned = rotated * cos + partner * sin
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned
