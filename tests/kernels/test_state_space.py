"""The state space of Mamba-2 against transformers' and, in Triton, against torch in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compiledllm.kernels.state_space import state_space, state_space_reference
from compiledllm.kernels.state_space_triton import compute_states
from tests.support.state_layers import (
    KEPT,
    NUM_REQUEST_ROWS,
    STEPS,
    make_rows,
    make_snapshots,
    num_tokens,
    owned_by_nobody,
    relative_error,
    row_bound,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there in Triton's interpreter
DTYPES = {
    "float32": (torch.float32, torch.float32),  # of inputs, of the state
    "bfloat16": (torch.bfloat16, torch.float32),
    "bfloat16 state": (torch.bfloat16, torch.bfloat16),
}


class Inputs:
    """The arguments of `state_space`: x, b and c are parts of one tensor, as in a layer.

    States of new requests hold NaN, which must not be read.
    """

    def __init__(
        self,
        step: list[tuple[int, int]],
        heads: tuple[int, int],  # heads, groups
        dims: tuple[int, int],  # of a state, of a head
        dtype: torch.dtype = torch.float32,
        state_dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        borders: list[int] | None = None,
    ) -> None:
        torch.manual_seed(sum(heads) + sum(dims))
        (num_heads, groups), (state_dim, head_dim) = heads, dims
        tokens, sizes = num_tokens(step), (num_heads * head_dim, *[groups * state_dim] * 2)
        mixed = torch.randn(tokens, sum(sizes) + num_heads, device=device).to(dtype)
        x, b, c, steps = mixed.split([*sizes, num_heads], dim=1)
        shapes = (num_heads, head_dim), (groups, state_dim), (groups, state_dim)
        parts = zip((x, b, c), shapes, strict=True)
        self.tokens = [part.unflatten(1, shape) for part, shape in parts] + [steps]
        rate = torch.rand(num_heads, device=device).mul(6).sub(4)
        bias, skip = torch.randn(2, num_heads, device=device)
        self.of_heads = [rate, bias, skip]
        shape = NUM_REQUEST_ROWS, num_heads, state_dim, head_dim
        self.state = torch.randn(shape, device=device).to(state_dtype)
        self.rows = make_rows(step, device)
        self.row_bound = row_bound(step, device)
        self.snapshots = None if borders is None else make_snapshots(self.rows, borders)
        for own, (_, before) in zip(self.rows.rows.tolist(), step, strict=True):
            if not before:
                self.state[own] = float("nan")

    def exact(self) -> tuple[Tensor, Tensor]:
        """Output and states in float64, from the same inputs; leaves `state` as it is."""
        state = self.state.double()
        inputs = [x.double() for x in (*self.tokens, *self.of_heads)]
        return state_space_reference(*inputs, state, *self.rows, self.snapshots), state

    def compute(self) -> Tensor:
        tensors = *self.tokens, *self.of_heads, self.state, *self.rows
        return compute_states(*tensors, self.row_bound, self.snapshots)


def assert_near(case: Inputs) -> None:
    """Output and states are near those in float64, and no other state changes."""
    expected, states = case.exact()
    idle = owned_by_nobody(case.rows, case.snapshots)
    busy = sorted(set(range(NUM_REQUEST_ROWS)) - set(idle))
    untouched = case.state[idle].clone()
    out = case.compute()
    largest = 3e-5 if out.dtype == torch.float32 else 1e-2
    assert relative_error(out, expected) < largest
    assert relative_error(case.state[busy], states[busy]) < largest
    torch.testing.assert_close(case.state[idle], untouched, atol=0, rtol=0, equal_nan=True)


@pytest.mark.pairwise
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("dims", [(64, 64), (128, 64), (16, 32), (16, 16)], ids=str)
@pytest.mark.parametrize("heads", [(1, 1), (4, 1), (6, 2)], ids=str)
@pytest.mark.parametrize("step", STEPS)
def test_kernels_equal_the_reference(
    step: str, heads: tuple[int, int], dims: tuple[int, int], dtypes: str
) -> None:
    assert_near(Inputs(STEPS[step], heads, dims, *DTYPES[dtypes], DEVICE))


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("name", KEPT)
def test_kernels_keep_the_states_behind_borders(name: str, dtypes: str) -> None:
    step, borders = KEPT[name]
    assert_near(Inputs(step, (2, 1), (64, 32), *DTYPES[dtypes], DEVICE, borders))


@pytest.mark.parametrize("count", [1, 2, 64, 65, 200])
@pytest.mark.parametrize("heads", [(4, 1), (4, 2)], ids=str)
def test_reference_is_the_state_space_of_transformers(heads: tuple[int, int], count: int) -> None:
    mamba = pytest.importorskip(
        "transformers.models.granitemoehybrid.modeling_granitemoehybrid",
    )
    if not hasattr(mamba, "mamba2_chunk_scan"):  # early transformers 5 has it in a method
        pytest.skip("no function of its own")
    case = Inputs([(count, 5)], heads, (16, 8))
    initial = case.state[case.rows.rows].mT
    x, b, c, step = (part[None] for part in case.tokens)
    rate, bias, skip = case.of_heads
    expected, state = mamba.mamba2_chunk_scan(
        x, step, -rate.exp(), b, c, 64, D=skip, dt_bias=bias, initial_states=initial,
        dt_softplus=True, return_final_states=True,
    )  # fmt: skip
    out = state_space(*case.tokens, *case.of_heads, case.state, *case.rows)
    torch.testing.assert_close(out, expected[0], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(case.state[case.rows.rows].mT, state, atol=2e-5, rtol=1e-4)


def test_the_op_declares_what_it_does() -> None:
    case = Inputs(STEPS["short"], (4, 2), (16, 16), borders=[1, 0, 0, 2, 0, 0])
    tokens = [x.contiguous() for x in case.tokens]
    arguments = *tokens, *case.of_heads, case.state.nan_to_num(), *case.rows, None, case.snapshots
    torch.library.opcheck(torch.ops.compiledllm.state_space.default, arguments)
