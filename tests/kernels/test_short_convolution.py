"""The short convolution against transformers' and, in Triton, against the torch reference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from compiledllm.kernels.short_convolution import short_convolution, short_convolution_reference
from compiledllm.kernels.short_convolution_triton import convolve
from tests.support.state_layers import (
    KEPT,
    NUM_REQUEST_ROWS,
    STEPS,
    Rows,
    make_rows,
    make_snapshots,
    num_tokens,
    owned_by_nobody,
    row_bound,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there in Triton's interpreter
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def make_inputs(
    step: list[tuple[int, int]], channels: int, width: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Rows]:
    """x (rows strided), weight, bias, state and rows. Stale states of new requests are NaN."""
    torch.manual_seed(channels + width)
    x = torch.randn(num_tokens(step), channels + 8, device=DEVICE).to(dtype)[:, :channels]
    weight = torch.randn(channels, width, device=DEVICE).to(dtype)
    bias = torch.randn(channels, device=DEVICE).to(dtype)
    shape = NUM_REQUEST_ROWS, channels, width - 1
    state = torch.randn(shape, device=DEVICE).to(dtype)
    rows = make_rows(step, DEVICE)
    for own, (_, before) in zip(rows.rows.tolist(), step, strict=True):
        if not before:
            state[own] = float("nan")
    return x, weight, bias, state, rows


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("activation", ["silu", "none"])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("channels", "width"), [(96, 4), (300, 3), (130, 2)])
@pytest.mark.parametrize("step", STEPS)
def test_kernels_equal_the_reference(
    step: str, channels: int, width: int, has_bias: bool, activation: str, dtype: torch.dtype
) -> None:
    x, weight, bias, state, rows = make_inputs(STEPS[step], channels, width, dtype)
    tensors = x, weight, bias if has_bias else None
    expected_state = state.clone()
    expected = short_convolution_reference(*tensors, expected_state, *rows, activation)
    untouched = state[owned_by_nobody(rows)].clone()
    bound = row_bound(STEPS[step], DEVICE)
    out = convolve(*tensors, state, *rows, activation, bound)
    torch.testing.assert_close(out, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    torch.testing.assert_close(state, expected_state, atol=0, rtol=0, equal_nan=True)
    torch.testing.assert_close(
        state[owned_by_nobody(rows)], untouched, atol=0, rtol=0, equal_nan=True
    )


@pytest.mark.parametrize("name", KEPT)
def test_kernels_keep_the_last_inputs_before_borders(name: str) -> None:
    step, borders = KEPT[name]
    x, weight, _, state, rows = make_inputs(step, 96, 4, torch.float32)
    snapshots, before = make_snapshots(rows, borders), state.clone()
    expected_state = state.clone()
    arguments = x, weight, None
    expected = short_convolution_reference(
        *arguments, expected_state, *rows, "silu", snapshots=snapshots
    )
    out = convolve(*arguments, state, *rows, "silu", None, snapshots)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(state, expected_state, atol=0, rtol=0, equal_nan=True)
    starts = rows.query_start_loc.tolist()
    for row, (border, slot) in enumerate(snapshots.tolist()):
        if border:
            old = before[rows.rows[row]] if step[row][1] else torch.zeros_like(before[0])
            inputs = torch.cat((old.T, x[starts[row] : starts[row] + border]))
            assert torch.equal(state[slot], inputs[-3:].T)


@pytest.mark.parametrize(("width", "activation"), [(4, "silu"), (3, "none")])
def test_reference_is_the_convolution_of_transformers(width: int, activation: str) -> None:
    from transformers.models.qwen3_next.modeling_qwen3_next import (
        causal_conv1d_fn,
        causal_conv1d_update,
    )

    torch.manual_seed(0)
    count, channels = 23, 12
    x, weight = torch.randn(count + 1, channels), torch.randn(channels, width)
    state = torch.full((2, channels, width - 1), float("nan"))
    prompt = Rows(torch.tensor([1]), torch.tensor([0, count]), torch.tensor([count]))
    then = Rows(torch.tensor([1]), torch.tensor([0, 1]), torch.tensor([count + 1]))
    first = short_convolution(x[:count], weight, None, state, *prompt, activation)
    columns, name = x.T[None], None if activation == "none" else activation
    expected = causal_conv1d_fn(columns[..., :count], weight, activation=name)
    torch.testing.assert_close(first, expected[0].T)
    before = columns[..., count - width + 1 : count].clone()
    second = short_convolution(x[count:], weight, None, state, *then, activation)
    expected = causal_conv1d_update(columns[..., count:], before, weight, activation=name)
    torch.testing.assert_close(second, expected[0].T)
    torch.testing.assert_close(state[1:], before)


@pytest.mark.parametrize("cuts", [[1] * 9, [2, 1, 3, 3], [4, 5], [8, 1]], ids=str)
def test_prompt_in_pieces_equals_the_whole(cuts: list[int]) -> None:
    torch.manual_seed(1)
    x, weight = torch.randn(9, 70, device=DEVICE), torch.randn(70, 4, device=DEVICE)
    expected = F.conv1d(F.pad(x.T, (3, 0))[None], weight[:, None], groups=70)[0].T
    state = torch.full((3, 70, 3), float("nan"), device=DEVICE)
    done, outputs = 0, []
    for cut in cuts:
        rows = make_rows([(cut, done)], DEVICE)._replace(rows=torch.tensor([2], device=DEVICE))
        outputs.append(convolve(x[done : done + cut], weight, None, state, *rows, "none"))
        done += cut
    torch.testing.assert_close(torch.cat(outputs), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(state[2], x[-3:].T)


def test_decode_step_without_a_bound_is_computed_as_with_one() -> None:
    *tensors, state, rows = make_inputs(STEPS["decode"], 96, 4, torch.float32)
    states = state.clone()
    out = convolve(*tensors, state, *rows, "silu")
    expected = convolve(*tensors, states, *rows, "silu", row_bound(STEPS["decode"], DEVICE))
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(state, states, atol=0, rtol=0, equal_nan=True)


def test_the_op_declares_what_it_does() -> None:
    x, weight, bias, state, rows = make_inputs(STEPS["mixed"], 24, 4, torch.float32)
    state = state.nan_to_num()
    arguments = (x.contiguous(), weight, bias, state, *rows, "silu")
    torch.library.opcheck(torch.ops.compiledllm.short_convolution.default, arguments)
