"""A causal depthwise convolution over a request's tokens. Its state is the request's last inputs.

State layers (Gated DeltaNet, Mamba-2, LFM2's short convolution) mix each channel with the channel's
last few inputs. On a GPU a Triton kernel computes all rows; on other devices plain torch does.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from compiledllm.kernels.ops import define

ACTIVATIONS = ("none", "silu")


def _convolution_fake(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@define("short_convolution", fake=_convolution_fake, mutates=("state",))
def short_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    rows: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    activation: str,
    row_bound: Tensor | None = None,
    snapshots: Tensor | None = None,
) -> Tensor:
    """out[t] = activation(bias + sum over j of weight[:, j] * input[t - width + 1 + j]).

    x: [tokens, channels], rows of tokens one after the other. weight: [channels, width], width at
    least 2; bias: [channels]. state: [request rows, channels, width - 1] in x's dtype, the last
    inputs of each request, oldest first. rows: integers [rows], the request row whose state a batch
    row owns. query_start_loc: int32 [rows + 1]; seq_lens: int32 [rows], context lengths including
    these tokens; both may have further rows without tokens. activation: "silu" or "none".
    row_bound: from `backend.make_row_bound`; steps with a maximum of 1 take a faster kernel.
    snapshots: int64 [rows, 2], for each batch row its border and a request row: the state after the
    batch row's first `border` tokens (fewer than all) is also written to that request row; border
    0: no snapshot. None: no row has a snapshot.

    A row without earlier tokens starts from zeros, whatever its state holds; a row without tokens
    does nothing. If several batch rows own the same request row, as padding rows do, their outputs
    and state are undefined. Sums are in float32. Mutates `state`. Returns [tokens, channels] in x's
    dtype, undefined for tokens outside every row.
    """
    assert activation in ACTIVATIONS, activation
    if x.is_cuda:
        from compiledllm.kernels.short_convolution_triton import convolve

        metadata = rows, query_start_loc, seq_lens
        return convolve(x, weight, bias, state, *metadata, activation, row_bound, snapshots)
    return short_convolution_reference(
        x, weight, bias, state, rows, query_start_loc, seq_lens, activation, snapshots
    )


def short_convolution_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    rows: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    activation: str,
    snapshots: Tensor | None = None,
) -> Tensor:
    """See `short_convolution`. Rows with equal numbers of tokens and equal borders form a batch."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    dtype = torch.promote_types(x.dtype, torch.float32)
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    for (count, border), batch in rows_alike(query_start_loc, snapshots, len(rows)).items():
        first, own = query_start_loc[batch].long(), rows[batch].long()
        tokens = first[:, None] + torch.arange(count, device=x.device)  # [rows, count]
        is_new = (seq_lens[batch] == count)[:, None, None]
        before = state[own].masked_fill(is_new, 0)
        inputs = torch.cat((before, x[tokens].mT.to(state.dtype)), dim=-1)
        if border and snapshots is not None:
            state[snapshots[batch, 1]] = inputs[:, :, border : border + state.shape[-1]]
        state[own] = inputs[:, :, count:]
        mixed = F.conv1d(inputs.to(dtype), weight[:, None], bias, groups=len(weight)).mT
        out[tokens] = (F.silu(mixed) if activation == "silu" else mixed).to(x.dtype)
    return out


def rows_alike(
    query_start_loc: Tensor, snapshots: Tensor | None, num_rows: int
) -> dict[tuple[int, int], Tensor]:
    """(number of tokens, border of the snapshot) -> indices of the batch rows that have these.

    Rows without tokens are left out. Reads the tensors on the host.
    """
    counts = query_start_loc.diff()[:num_rows].tolist()
    borders = [0] * num_rows if snapshots is None else snapshots[:num_rows, 0].tolist()
    found: dict[tuple[int, int], list[int]] = {}
    for row, alike in enumerate(zip(counts, borders, strict=True)):
        if alike[0]:
            found.setdefault(alike, []).append(row)
    device = query_start_loc.device
    return {alike: torch.tensor(batch, device=device) for alike, batch in found.items()}


def chunks_of_row(count: int, border: int, size: int) -> Iterator[tuple[int, int]]:
    """(start, end) of chunks of up to `size` of `count` tokens; a chunk starts at the border."""
    starts = *range(0, border, size), *range(border, count, size)
    return itertools.pairwise((*starts, count))
