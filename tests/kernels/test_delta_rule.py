"""The gated delta rule against transformers' and, in Triton, against the reference in float64."""

from __future__ import annotations

import pytest
import torch

from compiledllm.kernels.delta_rule import activated_gates, gated_delta_rule
from compiledllm.kernels.delta_rule_triton import delta_rule
from tests.support.state_layers import (
    HARD_CASES,
    KEPT,
    STEPS,
    DeltaInputs,
    assert_near,
    make_rows,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there in Triton's interpreter
DTYPES = {
    "float32": (torch.float32, torch.float32),  # of inputs, of the state
    "bfloat16": (torch.bfloat16, torch.float32),
    "bfloat16 state": (torch.bfloat16, torch.bfloat16),
}


@pytest.mark.parametrize("before", [0, 5])
@pytest.mark.parametrize("count", [1, 2, 64, 65, 200])
@pytest.mark.parametrize("heads", [(1, 1), (2, 4), (3, 3)], ids=str)
def test_reference_is_the_rule_of_transformers(
    heads: tuple[int, int], count: int, before: int
) -> None:
    from transformers.models.qwen3_next.modeling_qwen3_next import (
        torch_chunk_gated_delta_rule,
        torch_recurrent_gated_delta_rule,
    )

    case = DeltaInputs([(count, before)], heads, (64, 32), device="cpu")
    initial = case.state[case.rows.rows] if before else None
    # Early transformers 5 repeats the heads of keys outside these functions.
    keys = [x.repeat_interleave(heads[1] // heads[0], 1) for x in (case.query, case.key)]
    gates = activated_gates(case.a, case.b, case.log_decay_rate, case.step_bias)
    batched = [x[None] for x in (*keys, case.value, *gates)]
    out = gated_delta_rule(*case)
    for rule in (torch_recurrent_gated_delta_rule, torch_chunk_gated_delta_rule):
        expected, state = rule(
            *batched, initial_state=initial, output_final_state=True, use_qk_l2norm_in_kernel=True
        )
        torch.testing.assert_close(out, expected[0], atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(case.state[case.rows.rows], state, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("cuts", [[1] * 9, [2, 1, 3, 3], [4, 5], [8, 1]], ids=str)
def test_reference_of_a_prompt_in_pieces_equals_the_whole(cuts: list[int]) -> None:
    case = DeltaInputs([(9, 0)], (1, 2), (16, 16), device="cpu")
    state = case.state.clone()
    expected = gated_delta_rule(*case)
    done, outputs = 0, []
    for cut in cuts:
        rows = make_rows([(cut, done)], "cpu")._replace(rows=case.rows.rows)
        part = [x[done : done + cut] for x in case.tokens]
        outputs.append(gated_delta_rule(*part, *case.of_heads, state, *rows))
        done += cut
    torch.testing.assert_close(torch.cat(outputs), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(
        state[case.rows.rows], case.state[case.rows.rows], atol=1e-6, rtol=1e-5
    )


@pytest.mark.pairwise
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (16, 32), (128, 64)], ids=str)
@pytest.mark.parametrize("heads", [(1, 1), (1, 2), (3, 3), (4, 8)], ids=str)
@pytest.mark.parametrize("step", STEPS)
def test_kernels_equal_the_reference(
    step: str, heads: tuple[int, int], dims: tuple[int, int], dtypes: str
) -> None:
    assert_near(DeltaInputs(STEPS[step], heads, dims, *DTYPES[dtypes], DEVICE))


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("name", KEPT)
def test_kernels_keep_the_states_behind_borders(name: str, dtypes: str) -> None:
    step, borders = KEPT[name]
    assert_near(DeltaInputs(step, (1, 2), (64, 64), *DTYPES[dtypes], DEVICE, borders))


def test_reference_keeps_the_state_that_a_shorter_row_ends_with() -> None:
    whole = DeltaInputs([(150, 6)], (1, 2), (16, 16), device="cpu", borders=[90])
    assert whole.snapshots is not None
    start, out = whole.state.clone(), gated_delta_rule(*whole)
    part, rows = [x[:90] for x in whole.tokens], make_rows([(90, 6)], "cpu")
    rows = rows._replace(rows=whole.rows.rows)
    first = gated_delta_rule(*part, *whole.of_heads, start, *rows)
    torch.testing.assert_close(out[:90], first, atol=1e-6, rtol=1e-5)
    kept = whole.state[whole.snapshots[:1, 1]]
    torch.testing.assert_close(kept, start[rows.rows], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtypes", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", HARD_CASES)
def test_kernels_are_stable_where_the_system_is_hard(name: str, dtypes: str) -> None:
    case = DeltaInputs([(130, 70), (64, 0)], (1, 2), (64, 64), *DTYPES[dtypes], DEVICE)
    HARD_CASES[name](case)
    # A difference of two logs of decays has the precision of their size, which is 3000 here.
    assert_near(case, float32_error=1e-3 if name == "forgetting" else 3e-5)


def test_kernels_of_a_prompt_in_pieces_continue_from_the_state() -> None:
    case = DeltaInputs([(150, 0)], (1, 2), (64, 64), device=DEVICE)
    expected, states = case.exact()
    done, outputs = 0, []
    for cut in (70, 1, 64, 1, 2, 12):
        rows = make_rows([(cut, done)], DEVICE)._replace(rows=case.rows.rows)
        part = [x[done : done + cut] for x in case.tokens]
        outputs.append(delta_rule(*part, *case.of_heads, case.state, *rows))
        done += cut
    own = case.rows.rows
    torch.testing.assert_close(torch.cat(outputs).double(), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(case.state[own].double(), states[own], atol=1e-5, rtol=1e-4)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    together = DeltaInputs([(65, 0), (3, 9), (1, 4), (200, 1)], (1, 2), (64, 64), device=DEVICE)
    states = together.state.clone()
    out = delta_rule(*together)
    alone = [x[69:] for x in together.tokens]
    rows = make_rows([(200, 1)], DEVICE)._replace(rows=together.rows.rows[3:])
    assert torch.equal(delta_rule(*alone, *together.of_heads, states, *rows), out[69:])
    assert torch.equal(states[rows.rows], together.state[rows.rows])


def test_the_op_declares_what_it_does() -> None:
    case = DeltaInputs(STEPS["short"], (1, 2), (16, 16), device="cpu")
    tokens = [x.contiguous() for x in case.tokens]
    arguments = *tokens, *case.of_heads, case.state.nan_to_num(), *case.rows
    torch.library.opcheck(torch.ops.compiledllm.gated_delta_rule.default, arguments)
