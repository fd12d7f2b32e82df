"""The kernel of whole decode steps, compiled for a CPU, against the reference in float32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from compiledllm.kernels import decode_step_cuda
from compiledllm.kernels.decode_step import ALL_ROWS, DecodeShape
from compiledllm.kernels.packed import Layout
from tests.support import decode_steps
from tests.support.cuda_on_cpu import CpuKernel
from tests.support.decode_step import emulate_kernel
from tests.support.decode_steps import TINY, Case, StepInputs, assert_equals_reference

NUM_BLOCKS = 60  # of the caches


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    emulate_kernel(monkeypatch)
    torch.manual_seed(0)


def make_case(shape: DecodeShape, windows: Sequence[int] = ()) -> Case:
    assert decode_step_cuda.why_not(shape, torch.device("cpu")) is None
    return decode_steps.make_case(shape, decode_step_cuda, NUM_BLOCKS, "cpu", windows)


def make_inputs(shape: DecodeShape, lengths: Sequence[int]) -> StepInputs:
    return decode_steps.make_inputs(shape, lengths, NUM_BLOCKS, "cpu")


SMOL = replace(
    TINY, num_layers=3, hidden_size=576, intermediate_size=544, num_heads=9, num_kv_heads=3,
    head_dim=64, rotary_dim=64,
)  # fmt: skip
QWEN = replace(
    TINY, num_layers=3, dtype=torch.float16, kv_dtype=torch.float16, has_qk_norm=True, qk_eps=1e-6,
    head_dim=128, rotary_dim=64,
)  # fmt: skip
BIASES = replace(
    TINY, head_dim=96, rotary_dim=96, num_heads=8, num_kv_heads=1, has_qkv_bias=True,
    has_other_biases=True, activation="gelu", soft_cap=3.0, has_sinks=True,
)  # fmt: skip
WINDOWS = replace(
    TINY, num_layers=4, plus_one=True, has_qk_norm=True, qk_eps=1e-6, activation="gelu_tanh",
    has_windows=True, block_size=32,
)  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "lengths", "windows"),
    [
        (TINY, [1], ()),
        (TINY, [5, 300, 0], ()),  # a padding row
        (SMOL, [1, 16, 17, 100, 129], ()),
        (QWEN, [40, 260, 1, 30, 5, 6, 7, 0], ()),
        (BIASES, [200, 33], ()),
        (WINDOWS, [200, 33, 500, 20], (40, 0)),
        (replace(TINY, kv_dtype=torch.float8_e4m3fn), [129, 300, 0], ()),
        (replace(QWEN, kv_dtype=torch.float8_e4m3fn), [140, 260, 100, 130, 96, 97, 40, 0], ()),
        (replace(WINDOWS, kv_dtype=torch.float8_e4m3fn, num_layers=3), [400], (140, 0)),
    ],
    ids=["tiny", "padding", "smol", "qwen", "biases", "windows", "fp8", "fp8 heads", "fp8 windows"],
)
def test_values(shape: DecodeShape, lengths: list[int], windows: tuple[int, ...]) -> None:
    assert_equals_reference(make_case(shape, windows), make_inputs(shape, lengths))


@pytest.mark.parametrize("num_layers", [2, 3], ids=["barriers", "tags"])
def test_steps_of_other_rows_follow_each_other(num_layers: int) -> None:
    """The workspace needs no reset, whichever number of rows a step has."""
    shape = replace(TINY, num_layers=num_layers)
    case = make_case(shape)
    for lengths in ([150], [20, 170, 4], [150], [5, 6, 7, 8]):
        assert_equals_reference(case, make_inputs(shape, lengths))


@pytest.mark.parametrize(
    ("num_layers", "lengths", "num_slots"),
    [
        (2, [20], None),
        (3, [20], None),
        (3, [300, 20], None),
        (2, [17, 1, 16, 140, 5, 33, 0, 2], 3),
    ],
    ids=["barriers", "tags", "tags and splits", "few slots"],
)
def test_results_do_not_depend_on_the_order_of_threads(
    num_layers: int, lengths: list[int], num_slots: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row leaves a thread block without attention; few slots are soon filled again."""
    shape = replace(TINY, num_layers=num_layers)
    if num_slots:
        monkeypatch.setattr(decode_step_cuda, "_stages", lambda *_: num_slots)
    step, inputs = make_case(shape).step, make_inputs(shape, lengths)
    expected = step(inputs.x, inputs.cos, inputs.sin, inputs.attn)
    for seed in (1, 2, 3):
        monkeypatch.setattr(CpuKernel, "seed", seed)
        found = step(inputs.x, inputs.cos, inputs.sin, inputs.attn)
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    "layout",
    [
        Layout("fp8", 0, "float32", False),
        Layout("int8", 0, "float32", False),
        Layout("int4", 0, "float32", False),
        Layout("int4", 1, "bfloat16", False),
        Layout("int4", 4, "float16", True),
        Layout("fp8", 1, "float32", False, 128),
    ],
    ids=str,
)
def test_quantised_weights(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two slots of inputs, of which the last is partial, and an odd number of pieces."""
    for name in ("_SEGMENT_BYTES", "_SMALL_SEGMENT_BYTES"):
        monkeypatch.setattr(decode_step_cuda, name, 1024)
    shape = replace(
        TINY, num_layers=2 + layout.groups % 2, layouts=(layout,) * 4, hidden_size=1152,
        intermediate_size=256, head_dim=64, rotary_dim=64,
    )  # fmt: skip
    if layout.block_rows > 1:
        shape = replace(shape, hidden_size=1536, intermediate_size=512, num_heads=8)
        monkeypatch.setattr(decode_step_cuda, "num_multiprocessors", lambda: 12)
    assert_equals_reference(make_case(shape), make_inputs(shape, [20, 1, 3]))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float32}, "no float32"),
        ({"kv_dtype": torch.float32}, "no KV cache in float32"),
        ({"hidden_size": 72}, "hidden_size=72 is not a multiple of 32"),
        ({"block_size": 8}, "block_size=8 is not a multiple of 16"),
        ({"head_dim": 256}, "head_dim=256"),
        ({"num_heads": 18}, "9 query heads"),
        ({"intermediate_size": 2048}, "too large"),
    ],
)
def test_what_the_kernel_does_not_take(change: dict[str, object], reason: str) -> None:
    shape = replace(TINY, **change)  # type: ignore[arg-type]
    assert reason in str(decode_step_cuda.why_not(shape, torch.device("cpu")))


FP8, INT4 = Layout("fp8", 0, "float32", False), Layout("int4", 1, "bfloat16", False)


@pytest.mark.parametrize(
    ("hidden_size", "intermediate_size", "head_dim", "layout", "rows"),
    [
        (2048, 8192, 64, None, ALL_ROWS),  # Llama-3.2-1B
        (4096, 14336, 128, None, range(2, 4)),  # Llama-3.1-8B
        (8192, 28672, 128, None, range(0)),
        (4096, 14336, 128, FP8, range(1, 5)),
        (4096, 14336, 128, INT4, range(1, 5)),
        (8192, 28672, 128, INT4, range(0)),
        (2048, 8192, 64, replace(INT4, groups=4), range(0)),  # not measured
    ],
)
def test_rows_for_which_the_kernel_is_the_default(
    hidden_size: int, intermediate_size: int, head_dim: int, layout: Layout | None, rows: range
) -> None:
    shape = replace(
        TINY, hidden_size=hidden_size, intermediate_size=intermediate_size, num_heads=32,
        num_kv_heads=8, head_dim=head_dim, layouts=(layout,) * 4,
    )  # fmt: skip
    assert decode_step_cuda.faster_rows(shape) == rows
    of_fp8 = decode_step_cuda.faster_rows(replace(shape, kv_dtype=torch.float8_e4m3fn))
    assert list(of_fp8) == [row for row in rows if row < 3 or head_dim == 64]  # not in large layers


@pytest.mark.parametrize(
    ("rows", "expected"),
    [(ALL_ROWS, [1, 2, 4, 8]), (range(1, 2), [1]), (range(2, 5), [2, 4]), (range(2, 4), [2, 4])],
)
def test_only_variants_that_steps_run_are_compiled(rows: range, expected: list[int]) -> None:
    assert decode_step_cuda._variants(rows) == expected
