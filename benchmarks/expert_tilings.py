"""Measures tilings of products of experts in steps of few tokens, for the table of tilings.

The matrices are stored as the model's own, or in formats that are given by name. As in `tilings`,
caches are cold, calls are replayed from a CUDA graph, and several processes compile first. The
choice of experts is made before, and each call has other experts.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from compiledllm.benchmarks.quantized_tilings import FORMATS, packed_matrix
from compiledllm.benchmarks.quantized_tilings import candidates as candidates_of_codes
from compiledllm.benchmarks.state_layers import seconds_per_call
from compiledllm.benchmarks.tilings import (
    compile_in_processes,
    figures,
    is_worth,
    num_copies,
    of_the_fastest,
)
from compiledllm.kernels.launch import out_of_resources
from compiledllm.kernels.tables import SIXTEEN_BITS, ExpertProduct
from compiledllm.models.matrices import MixedSpec, QuantSpec
from compiledllm.models.registry import load_spec
from compiledllm.models.source import resolve_checkpoint
from compiledllm.models.spec import EXPERTS, LayerSpec, MoeSpec

if TYPE_CHECKING:
    from compiledllm.kernels.moe_routing_triton import Routing
    from compiledllm.kernels.moe_triton import Plan

Fields = tuple[int, ...]  # see `tables.ExpertProducts`
_SHARED_BYTES = 200 * 1024  # most bytes of tiles of a program; more does not leave room for sums
_DEVICE = "cuda"


class Product(NamedTuple):
    """A product of a step's items with their experts.

    spec: how the matrices are stored; None: in bfloat16. is_first: the product with gate and up,
    whose inputs are tokens; else the product with down, whose inputs are items.
    """

    spec: QuantSpec | None
    num_experts: int
    top_k: int
    num_outputs: int
    num_inputs: int
    is_first: bool
    tokens: int

    @property
    def num_items(self) -> int:
        return self.tokens * self.top_k

    def __str__(self) -> str:
        form = "bfloat16" if self.spec is None else self.spec.code
        sizes = f"{self.num_outputs} x {self.num_inputs} in {form}"
        return f"{self.num_items} items x {self.num_experts} experts of {sizes}"


def products_of(
    models: Iterable[str], formats: Sequence[str], token_counts: Sequence[int]
) -> list[Product]:
    """The distinct products of experts in these models' steps that have a table.

    formats: keys of FORMATS; the experts are measured in each of them. Empty: in their own format.
    """
    found = dict[Product, None]()
    for model in models:
        for layer in load_spec(resolve_checkpoint(model, weights=False)).distinct_layers:
            for product in itertools.chain(*(_of_layer(layer, formats, n) for n in token_counts)):
                if _has_table(product):
                    found[product] = None
    return list(found)


def _of_layer(layer: LayerSpec, formats: Sequence[str], tokens: int) -> Iterator[Product]:
    own = dict(layer.formats)
    for moe, path in ((layer.mlp, "mlp"), (layer.experts, EXPERTS)):
        if not isinstance(moe, MoeSpec):
            continue
        size, hidden = moe.intermediate_size, layer.hidden_size
        sizes = ("gate_up", 2 * size, hidden), ("down", hidden, size)
        for name, num_outputs, num_inputs in sizes:
            chosen: list[QuantSpec | MixedSpec | None] = [FORMATS[key] for key in formats]
            for spec in chosen or [own.get(f"{path}.{name}")]:
                if not isinstance(spec, MixedSpec):
                    counts = moe.num_experts, moe.top_k, num_outputs, num_inputs
                    yield Product(spec, *counts, name == "gate_up", tokens)


def _has_table(product: Product) -> bool:
    """Whether the product is multiplied by a kernel whose tilings are in the table."""
    spec = product.spec
    if spec is None:
        return True
    if product.num_inputs % (spec.span or 1):
        return False
    from compiledllm.kernels.quantized_experts_cuda import uses_few_rows

    packed = packed_matrix(spec, 16 * spec.rows, product.num_inputs)
    return packed is not None and uses_few_rows(product.num_items, product.num_experts, packed[0])


def candidates(rows: int) -> Iterator[Fields]:
    """Tilings of 16-bit weights worth measuring: outputs, columns, num_warps, num_stages.

    rows: items of a block.
    """
    tiles = (32, 128), (32, 256), (64, 64), (64, 128), (64, 256), (128, 64), (128, 128)
    for (outputs, columns), num_warps, num_stages in itertools.product(tiles, (4, 8), (3, 4, 6)):
        tile_bytes = 2 * columns * (outputs + rows) * num_stages
        if tile_bytes <= _SHARED_BYTES and outputs * max(rows, columns) >= 32 * 32 * num_warps:
            yield outputs, columns, num_warps, num_stages


def measure_products(
    products: Sequence[Product], advance: Callable[[str], None]
) -> dict[ExpertProduct, dict[str, Any] | None]:
    """A table entry for each product that some tiling computes at least 3 % faster than the rule's.

    None for other products. advance: called with a description of each measured product.
    """
    jobs = [(p, fields) for p in products for fields in _Work(p, num_experts=1).tilings()]
    compile_in_processes(_compile, jobs)
    found: dict[ExpertProduct, dict[str, Any] | None] = {}
    for product in products:
        work = _Work(product, product.num_experts)
        found[work.key] = _entry(work)
        advance(str(product))
        del work  # frees the weights before the next product's are made
    return found


def _measure(work: _Work, tilings: Iterable[Fields], **how: Any) -> dict[Fields, float]:
    """Seconds of the product with each tiling for which the GPU has the resources."""
    found = {}
    for fields in tilings:
        try:
            found[fields] = seconds_per_call(work.calls(fields), torch.device(_DEVICE), **how)
        except (out_of_resources(), _cuda_error()):
            continue
    return found


def _entry(work: _Work) -> dict[str, Any] | None:
    seconds = of_the_fastest(work.tilings(), functools.partial(_measure, work))
    key = work.key
    entry = {
        "weights": key.weights,
        "experts": key.num_experts,
        "rows": key.rows,
        "items": key.num_items,
        "outputs": key.num_outputs,
        "inputs": key.num_inputs,
        **figures(seconds, work.rule),
    }
    return entry if is_worth(entry) else None


def _compile(jobs: Sequence[tuple[Product, Fields]]) -> None:
    for product, fields in jobs:
        try:
            _Work(product, num_experts=1).calls(fields)[0]()
        except (out_of_resources(), _cuda_error()):
            continue


def _cuda_error() -> type[Exception]:
    from compiledllm.kernels.machine_code import CudaError

    return CudaError


class _Work:
    """Inputs of a product and the choices of experts of several calls.

    num_experts: the number of experts that take memory. With one expert, all items go to this
    expert, which is enough to compile the same kernel.
    """

    def __init__(self, product: Product, num_experts: int):
        self._product = product
        self._ids = list(_choices(product)) if num_experts > 1 else [_only_first(product)]
        num_rows = product.tokens if product.is_first else product.num_items
        self._x = torch.randn(num_rows, product.num_inputs, device=_DEVICE, dtype=torch.bfloat16)
        self._weights = _weights(product, num_experts)

    @functools.cached_property
    def rule(self) -> Fields:
        from compiledllm.kernels import moe_triton, quantized_experts_cuda

        if isinstance(self._weights, Tensor):
            return moe_triton.rule_for(*self._counts, self._weights.dtype).measured
        own = quantized_experts_cuda.rule_for(self._weights.layout.code, self.key.rows)
        return own.row_tiles, own.n_warps, own.k_warps, own.depth, own.chunk

    @functools.cached_property
    def key(self) -> ExpertProduct:
        from compiledllm.kernels import moe_triton

        p = self._product
        if isinstance(self._weights, Tensor):
            name, rows = SIXTEEN_BITS, moe_triton.rule_for(*self._counts, self._x.dtype).rows
        else:
            name, rows = str(self._weights.layout), self._routings[0].rows
        return ExpertProduct(name, p.num_experts, rows, p.num_outputs, p.num_inputs, p.num_items)

    @property
    def _counts(self) -> tuple[int, int]:
        return self._product.num_items, self._product.num_experts

    def tilings(self) -> list[Fields]:
        """The rule's tiling first, then the candidates."""
        if isinstance(self._weights, Tensor):
            others = candidates(self.key.rows)
        else:
            others = candidates_of_codes(self._weights.layout, self.key.rows)
        return list(dict.fromkeys([self.rule, *others]))

    def calls(self, fields: Fields) -> list[Callable[[], Tensor]]:
        """The product with a tiling, once for each choice of experts."""
        of_weights = self._calls_of_16_bits if isinstance(self._weights, Tensor) else self._of_codes
        return list(of_weights(fields))

    def _calls_of_16_bits(self, fields: Fields) -> Iterator[Callable[[], Tensor]]:
        from compiledllm.kernels.moe_triton import grouped_product, rule_for

        p, weight = self._product, self._weights
        assert isinstance(weight, Tensor)
        t = rule_for(*self._counts, weight.dtype).with_measured(fields)
        out = self._out(p.num_outputs // 2 if p.is_first else p.num_outputs)
        for plan in self._plans:
            yield functools.partial(
                grouped_product, self._x, weight, None, out, plan, t, is_gated=p.is_first
            )

    def _of_codes(self, fields: Fields) -> Iterator[Callable[[], Tensor]]:
        from compiledllm.kernels.quantized_cuda import Tiling

        out = self._out(self._product.num_outputs)
        for routing in self._routings:
            yield functools.partial(self._weights.times, self._x, out, routing, Tiling(*fields))

    @functools.cached_property
    def _plans(self) -> list[Plan]:
        """The choices of experts, for 16-bit weights."""
        from compiledllm.kernels.moe_triton import Plan

        return [Plan.of(ids, self._product.num_experts, self.key.rows) for ids in self._ids]

    @functools.cached_property
    def _routings(self) -> list[Routing]:
        """The choices of experts, for quantised weights."""
        from compiledllm.kernels.quantized_experts_cuda import route

        p = self._product
        per_row = p.top_k if p.is_first else 1
        return [replace(route(ids, p.num_experts), items_per_row=per_row) for ids in self._ids]

    def _out(self, num_outputs: int) -> Tensor:
        dtype = torch.bfloat16 if self._product.is_first else torch.float32
        return torch.empty(self._product.num_items, num_outputs, device=_DEVICE, dtype=dtype)


def _weights(product: Product, num_experts: int) -> Any:
    """All experts' matrices: a tensor, or an `ExpertMatrix`. See `_Work` for `num_experts`."""
    from compiledllm.kernels.quantized_experts_cuda import ExpertMatrix

    def for_all(one: Tensor | None) -> Tensor | None:
        if one is None:
            return None
        every = one.expand(product.num_experts, *one.shape)
        return every if num_experts == 1 else every.contiguous()

    if product.spec is None:
        shape = product.num_outputs, product.num_inputs
        one = torch.randn(shape, device=_DEVICE, dtype=torch.bfloat16)
        return for_all(one * 0.02)
    packed = packed_matrix(product.spec, product.num_outputs, product.num_inputs)
    assert packed is not None, product
    layout, parts = packed
    codes, scales, zeros, row_scales = map(for_all, parts)
    assert codes is not None and row_scales is not None
    return ExpertMatrix(codes, scales, zeros, row_scales, None, layout)


def _choices(product: Product) -> Iterator[Tensor]:
    """Experts of each token, int32 [tokens, top_k], for so many calls that caches are cold.

    A single token's experts are others than those of the calls before, as long as there are others.
    """
    random = torch.Generator().manual_seed(0)
    order = torch.randperm(product.num_experts, generator=random)
    used = min(product.num_items, product.num_experts)
    num_bytes = 2 * product.num_outputs * product.num_inputs * used
    if product.spec is not None:
        num_bytes = product.spec.num_bytes(product.num_outputs, product.num_inputs) * used
    for call in range(num_copies(num_bytes)):
        if product.tokens == 1:
            ids = order.roll(-call * product.top_k)[None, : product.top_k]
        else:
            ids = torch.rand(product.tokens, product.num_experts, generator=random).topk(
                product.top_k
            )[1]
        yield ids.int().to(_DEVICE)


def _only_first(product: Product) -> Tensor:
    return torch.zeros(product.tokens, product.top_k, dtype=torch.int32, device=_DEVICE)
