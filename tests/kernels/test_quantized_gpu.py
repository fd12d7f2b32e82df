"""Products with quantised matrices on a GPU, against the dequantised matrix in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from compiledllm.models.formats.codes import dequantize
from compiledllm.models.formats.gguf_blocks import KINDS as BLOCKS
from compiledllm.models.formats.gguf_blocks import from_gguf
from compiledllm.models.formats.quantized import Quantized
from tests.support.gguf_blocks import random_blocks

pytestmark = pytest.mark.gpu

if torch.cuda.is_available():
    from compiledllm.kernels.moe import experts_in_torch
    from compiledllm.kernels.packed import Layout, fp8_linear, pack, packed_experts, packed_linear
    from compiledllm.kernels.quantized_cuda import Tiling, dequantized, quantized_product
    from compiledllm.kernels.records import pack_bytes, pack_records

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
# Code, inputs that share a scale (0: all), the scales' dtype, zeros, outputs that share a scale.
KINDS = [
    ("fp8", 0, torch.float32, False, 1),
    ("fp8", 128, torch.float32, False, 128),
    ("int8", 0, torch.float32, False, 1),
    ("int8", 128, torch.bfloat16, False, 1),
    ("int8", 32, torch.float16, True, 1),
    ("int4", 0, torch.float32, False, 1),
    ("int4", 128, torch.bfloat16, False, 1),
    ("int4", 128, torch.float16, True, 1),
    ("int4", 64, torch.float16, True, 1),
    ("int4", 32, torch.bfloat16, True, 1),
    ("fp4", 32, torch.float8_e8m0fnu, False, 1),
    ("fp4", 16, torch.float8_e4m3fn, False, 1),
]
SHAPES = [(576, 576), (1000, 2048), (4096, 1536), (17, 128)]


class Matrix:
    """A random quantised matrix, packed, and its values in float32."""

    def __init__(self, kind, num_outputs: int, num_inputs: int) -> None:
        code, group, scale_dtype, has_zeros, rows = kind
        device = torch.device("cuda")
        codes, self.values = _random_codes(code, num_outputs, num_inputs, device)
        groups = 128 // group if group else 0
        name = str(scale_dtype).removeprefix("torch.")
        self.layout = Layout(code, groups, name, has_zeros, rows)
        self.scales = self.zeros = self.row_scales = None
        if group == 0 or code == "fp4" and scale_dtype == torch.float8_e4m3fn:
            self.row_scales = torch.rand(num_outputs, device=device) / 50 + 0.01
        if group:
            shape = -(-num_outputs // rows), -(-num_inputs // 128) * groups
            scales = torch.rand(shape, device=device) / 50 + 0.01
            if scale_dtype == torch.float8_e8m0fnu:
                scales = scales.log2().floor().exp2()
            if scale_dtype == torch.float8_e4m3fn:
                scales = scales * 1000
            self.scales = scales.to(scale_dtype)
        if has_zeros:
            low, high = (0, 16) if code == "int4" else (-128, 128)
            dtype = torch.uint8 if code == "int4" else torch.int8
            self.zeros = torch.randint(low, high, shape, device=device, dtype=dtype)
        self._apply(code, group, rows)
        self.codes = codes
        if code in ("int4", "fp4"):
            self.codes = pack_records(codes, self.scales, self.zeros, code)
            self.scales = self.zeros = None
        if code == "int8":
            self.codes = pack_bytes(codes)

    def _apply(self, code: str, group: int, rows: int) -> None:
        values, (num_outputs, num_inputs) = self.values, self.values.shape

        def spread(part: Tensor) -> Tensor:
            part = part.float().repeat_interleave(group, 1).repeat_interleave(rows, 0)
            return part[:num_outputs, :num_inputs]

        if self.zeros is not None:
            values = values - spread(self.zeros)
        elif code == "int4":
            values = values - 8
        if self.scales is not None:
            values = values * spread(self.scales)
        if self.row_scales is not None:
            values = values * self.row_scales[:, None]
        self.values = values

    def times(self, x: Tensor, bias: Tensor | None, tiling: Tiling | None = None) -> Tensor:
        return quantized_product(
            x, self.codes, self.scales, self.zeros, self.row_scales, bias, self.layout,
            len(self.values), tiling,
        )  # fmt: skip


def _random_codes(code: str, n: int, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    if code == "fp8":
        codes = (torch.randn(n, k, device=device) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
        return codes, codes.float()
    if code == "int8":
        codes = torch.randint(-128, 128, (n, k), device=device, dtype=torch.int8)
        return codes, codes.float()
    codes = torch.randint(0, 16, (n, k), device=device, dtype=torch.uint8)
    if code == "int4":
        return codes, codes.float()
    return codes, torch.tensor(E2M1, device=device)[codes.long()]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind)))
def test_rows_are_those_of_the_dequantised_matrix(kind):
    for n, k in SHAPES:
        matrix = Matrix(kind, n, k)
        parts = matrix.codes, matrix.scales, matrix.zeros, matrix.row_scales, matrix.layout
        whole = dequantized(*parts, n, k, torch.bfloat16)
        ids = torch.randint(0, n, (37,), device="cuda")
        ids[:3] = torch.tensor([0, n - 1, 15])
        found = dequantized(*parts, len(ids), k, torch.bfloat16, ids=ids)
        assert torch.equal(found, whole[ids])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind)))
def test_product_equals_the_dequantised_one(kind, dtype):
    for (n, k), num_rows in itertools.product(SHAPES, (1, 8, 11, 30, 64, 70, 300)):
        matrix = Matrix(kind, n, k)
        x = torch.randn(num_rows, k, device="cuda", dtype=dtype)
        bias = torch.randn(n, device="cuda", dtype=dtype)
        expected = x.double() @ matrix.values.double().T + bias.double()
        result = matrix.times(x, bias)
        error = (result.double() - expected).abs().max() / expected.abs().max()
        bound = 4e-3 if dtype == torch.bfloat16 else 6e-4
        bound *= 1 + (num_rows > 16)  # the matrix may be rounded to 16 bits
        assert error < bound, (n, k, num_rows, error)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind)))
def test_dequantised_matrix_is_rounded_once(kind):
    for (n, k), dtype in itertools.product(SHAPES, (torch.bfloat16, torch.float16)):
        m = Matrix(kind, n, k)
        result = dequantized(m.codes, m.scales, m.zeros, m.row_scales, m.layout, n, k, dtype)
        if m.layout.groups and m.row_scales is not None:  # the two scales are multiplied first
            assert (result.float() - m.values).abs().max() <= m.values.abs().max() * 2**-8
        else:
            assert torch.equal(result, m.values.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("code", ["fp8", "int8"])
def test_every_code_is_exact(code, dtype):
    """FP8 sums have an error of 2^-29, far below any that matters."""
    codes = torch.zeros(256, 128, device="cuda", dtype=torch.uint8)
    codes[:, 5] = torch.arange(256, device="cuda", dtype=torch.uint8)
    codes = codes.view(torch.float8_e4m3fn if code == "fp8" else torch.int8)
    stored = pack_bytes(codes) if code == "int8" else codes
    layout = Layout(code, 0, "float32", False)
    for factor in (1.0, 0.01, 1e-5):
        x = torch.full((1, 128), factor, device="cuda", dtype=dtype)
        expected = (codes[:, 5].float() * x[0, 0].float()).to(dtype)
        result = quantized_product(x, stored, None, None, None, None, layout, 256)[0]
        error = (result.float() - expected.float()).abs()[expected.isfinite()]
        assert (error <= (2**-28 if code == "fp8" else 0)).all()


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[6], KINDS[10]], ids=lambda kind: kind[0])
def test_tilings_agree(kind):
    matrix = Matrix(kind, 1000, 4096)
    x = torch.randn(5, 4096, device="cuda", dtype=torch.bfloat16)
    expected = x.double() @ matrix.values.double().T
    for tiling in [(1, 1, 1, 1), (2, 2, 4, 3), (1, 4, 2, 2, 2), (1, 1, 16, 1, 4)]:
        result = matrix.times(x, None, Tiling(*tiling)).double()
        assert (result - expected).abs().max() / expected.abs().max() < 4e-3


def test_graph_replays_the_product():
    matrix = Matrix(KINDS[6], 4096, 4096)
    x = torch.randn(3, 4096, device="cuda", dtype=torch.bfloat16)
    matrix.times(x, None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        first = matrix.times(x, None)
        second = matrix.times(first, None)
    for _ in range(3):
        x.normal_()
        graph.replay()
        assert torch.equal(first, matrix.times(x, None))
        assert torch.equal(second, matrix.times(first, None))


@pytest.mark.parametrize("num_rows", [17, 40, 64, 333])
@pytest.mark.parametrize("is_block", [False, True], ids=["channel", "block"])
def test_fp8_inputs(is_block, num_rows):
    """Quantised inputs have 3 bits of mantissa; their errors average out over 4096 inputs."""
    matrix = Matrix(KINDS[int(is_block)], 1024, 4096)
    x = torch.randn(num_rows, 4096, device="cuda", dtype=torch.bfloat16)
    x *= torch.rand(num_rows, 1, device="cuda") * 10
    expected = x.double() @ matrix.values.double().T
    result = fp8_linear(x, matrix.codes, matrix.scales, matrix.row_scales, None).double()
    error = (result - expected).norm(dim=1) / expected.norm(dim=1)
    assert error.max() < 0.04
    exact = matrix.times(x[:16], None).double()
    assert ((exact - expected[:16]).norm(dim=1) / expected[:16].norm(dim=1)).max() < 4e-3


@pytest.mark.parametrize("limit", [0.0, 7.0])
@pytest.mark.parametrize(
    "kind", [KINDS[i] for i in (0, 1, 4, 6, 10)], ids=lambda kind: "-".join(map(str, kind))
)
def test_experts(kind, limit):
    num_experts, hidden, size, top_k = 8, 384, 256, 2

    def packed(n: int, k: int) -> tuple[list, Tensor]:
        found = [Matrix(kind, n, k) for _ in range(num_experts)]
        ones = torch.ones(n, device="cuda")
        rows = torch.stack([ones if m.row_scales is None else m.row_scales for m in found])
        stacked = [
            None if getattr(found[0], name) is None
            else torch.stack([getattr(m, name) for m in found])
            for name in ("codes", "scales", "zeros")
        ]  # fmt: skip
        parts = [*stacked, rows, str(found[0].layout)]
        return parts, torch.stack([m.values for m in found]).to(torch.bfloat16)

    up, up_values = packed(2 * size, hidden)
    down, down_values = packed(hidden, size)
    for num_tokens in (1, 3, 24, 100, 700):
        x = torch.randn(num_tokens, hidden, device="cuda", dtype=torch.bfloat16) / 8
        ids = torch.rand(num_tokens, num_experts, device="cuda").topk(top_k).indices.int()
        biases = [torch.randn(num_experts, n, device="cuda").bfloat16() for n in (2 * size, hidden)]
        result = packed_experts(x, ids, *up, *down, *biases, 1.7, limit)
        expected = experts_in_torch(x, ids, up_values, down_values, *biases, 1.7, limit)
        assert (result - expected).norm() / expected.norm() < 0.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_of_gguf(kind, dtype, monkeypatch):
    """Minima, and scales of two levels: the matrix is rounded once, and products are near."""
    monkeypatch.setattr(torch, "get_default_dtype", lambda: dtype)
    for n, k in [(17, 256), (576, 512), (1000, 2048), (4096, 1536)]:
        num_blocks = k // (256 if "K" in kind else 32)
        blocks = random_blocks(kind, n, num_blocks, seed=n, spread=0.003)
        matrix = from_gguf(blocks.cuda(), kind)
        format = Quantized(BLOCKS[kind].spec)
        with torch.device("cuda"):
            params = [*format.parameters({"": n}, k).values()]
        format.slots({"": n}, k, params)["weight"].put(matrix)
        found, tensors = format.finish(params, k)
        codes, scales, zeros, _, row_scales = params = [*tensors.values()]
        weight = dequantize(matrix)
        result = dequantized(codes, scales, zeros, row_scales, found.layout, n, k, dtype)
        assert torch.equal(result, weight.to(dtype))
        for num_rows in (1, 8, 11, 30, 64, 70, 300):
            x = torch.randn(num_rows, k, device="cuda", dtype=dtype) + 0.5
            bias = torch.randn(n, device="cuda", dtype=dtype)
            expected = x.double() @ weight.double().T + bias.double()
            y = found.product(x, params, bias).double()
            error = (y - expected).abs().max() / expected.abs().max()
            bound = 4e-3 if dtype == torch.bfloat16 else 6e-4
            # For more than 16 rows weights may be rounded to 16 bits.
            assert error < bound * (1 + (num_rows > 16)), (n, k, num_rows, error)


@pytest.mark.parametrize("code", ["fp8", "int8", "int4", "fp4"])
def test_packing_keeps_the_matrix(code):
    """`pack` of scales that are not in whole units: 576 inputs in groups of 64 or of all."""
    n, k = 48, 576
    codes, values = _random_codes(code, n, k, torch.device("cuda"))
    is_padded = code in ("int4", "fp4")
    stored = torch.nn.functional.pad(codes, (0, 64)) if is_padded else codes
    for group in (k, 64):
        if group == 64 and code == "fp8":
            continue
        num_groups = 1 if group == k else stored.shape[1] // 64
        scales = torch.rand(n, num_groups, device="cuda")
        matrix = pack(code, stored, scales, None, k)
        assert matrix is not None
        expected = values - (8 if code == "int4" else 0)
        expected = expected * scales.repeat_interleave(group, 1)[:, :k]
        x = torch.eye(k, device="cuda", dtype=torch.float16)[:40]
        parts = matrix.codes, matrix.scales, matrix.zeros, matrix.row_scales, None
        result = packed_linear(x, *parts, str(matrix.layout), n)
        assert torch.allclose(result.float(), expected.T[:40], rtol=2e-3, atol=1e-3)
