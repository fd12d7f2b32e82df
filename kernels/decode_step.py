"""All decoder blocks of a decode step of few rows as one call, and the models that it can run.

At a handful of rows, a step is a reading of the weights, and every launch fills and drains the
memory pipeline anew. One persistent kernel reads the weights of all blocks without a break.

    step = DecodeStep(shape, layers, kernel)  # allocates the workspace, begins to compile
    step.bind(kv_caches)                      # the kernel finds every tensor through one table
    x, update = step(x, cos, sin, attn)       # in place of the loop over the blocks

`models.decode_blocks` describes a model in these terms. `decode_step_torch` computes the same in
plain torch; `decode_step_cuda` is the kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeGuard

import torch
from torch import Tensor

from compiledllm.kernels.backend import AttentionMetadata, StateMetadata
from compiledllm.kernels.packed import Layout, Packed

MAX_ROWS = 8
ALL_ROWS = range(1, MAX_ROWS + 1)

Layouts = tuple[Layout | None, ...]  # of the matrices of a block, see `DecodeLayer.matrices`


@dataclass(frozen=True, slots=True)
class DecodeShape:
    """What all blocks of a model have in common.

    Each block computes, of x [rows, hidden_size] and the pending `update` of the block before:

        x += update
        x += out(attention(qk_norm, rotation of qkv(norm(x))))
        update = down(activation(gate) * up) of gate, up = gate_up(norm(x))

    All norms are RMSNorms in float32; plus_one: they multiply by 1 + weight, and round once, else
    they round before they multiply by the weight. eps: of the norms before attention and MLP;
    qk_eps: of the norms of query and key heads. Rotation turns the first `rotary_dim` dimensions
    of a head, of which a pair lies rotary_dim / 2 apart. activation: "silu", "gelu" or
    "gelu_tanh". scale, soft_cap: see `ScoreOptions`. block_size: tokens in a block of the KV cache.
    layouts: how the matrices qkv, out, gate_up and down are stored in every layer; None: in dtype.
    """

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    block_size: int
    eps: float
    scale: float
    dtype: torch.dtype
    kv_dtype: torch.dtype
    layouts: Layouts
    qk_eps: float = 0.0
    plus_one: bool = False
    activation: str = "silu"
    soft_cap: float = 0.0
    has_qk_norm: bool = False
    has_qkv_bias: bool = False
    has_other_biases: bool = False  # of any matrix but qkv
    has_windows: bool = False  # in any layer
    has_sinks: bool = False

    @property
    def group(self) -> int:
        """Number of query heads of a KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def qkv_size(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def num_weights(self) -> int:
        """Of the matrices of a layer."""
        return self.hidden_size * (self.qkv_size + self.q_size + 3 * self.intermediate_size)


@dataclass(frozen=True, slots=True)
class DecodeMatrix:
    """A matrix [outputs, inputs] with its bias [outputs] in the model's dtype, if it has one."""

    weight: Tensor | Packed
    bias: Tensor | None = None

    @property
    def layout(self) -> Layout | None:
        return self.weight.layout if isinstance(self.weight, Packed) else None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """weight, scales, zeros, row_scales and bias, in the order of `FIELDS`."""
        if isinstance(self.weight, Packed):
            w = self.weight
            return w.codes, w.scales, w.zeros, w.row_scales, self.bias
        return self.weight, None, None, None, self.bias


@dataclass(frozen=True, slots=True)
class DecodeLayer:
    """The tensors of a block, all contiguous.

    qkv: rows of all query heads, key heads, value heads. gate_up: rows of gate, then of up.
    attn_norm, mlp_norm: [hidden_size]. q_norm, k_norm: [head_dim]; None: there is no norm.
    kv_scales: float32 [2], read with an FP8 cache only. window: see `ScoreOptions.sliding_window`.
    sinks: [num_heads].
    """

    attn_norm: Tensor
    qkv: DecodeMatrix
    out: DecodeMatrix
    mlp_norm: Tensor
    gate_up: DecodeMatrix
    down: DecodeMatrix
    kv_scales: Tensor
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    sinks: Tensor | None = None
    window: int = 0

    @property
    def matrices(self) -> tuple[DecodeMatrix, ...]:
        """In the order of `DecodeShape.layouts`."""
        return self.qkv, self.out, self.gate_up, self.down


# The columns of the table: int64 [layers, len(FIELDS)], addresses but for the window; 0: none.
_OF_MATRIX = ("weight", "scales", "zeros", "row_scales", "bias")
_MATRICES = ("qkv", "out", "gate_up", "down")
FIELDS = (
    *("keys", "values", "kv_scales", "window"),
    *("attn_norm", "mlp_norm", "q_norm", "k_norm", "sinks"),
    *(f"{matrix}_{part}" for matrix in _MATRICES for part in _OF_MATRIX),
)


def table_row(layer: DecodeLayer, kv_cache: Tensor) -> list[int]:
    """A layer's row of the table. kv_cache: see `kernels.attention`."""
    keys, values = kv_cache
    kv_scales = layer.kv_scales if kv_cache.dtype.itemsize == 1 else None
    norms = layer.attn_norm, layer.mlp_norm, layer.q_norm, layer.k_norm, layer.sinks
    parts = (part for matrix in layer.matrices for part in matrix.tensors)
    tensors = keys, values, kv_scales, *norms, *parts
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    return [*addresses[:3], layer.window, *addresses[3:]]


class Kernel(Protocol):
    """An implementation, a module: `decode_step_cuda` or `decode_step_torch`."""

    def why_not(self, shape: DecodeShape, device: torch.device) -> str | None:
        """Why the implementation cannot run blocks of this shape; None if it can."""

    def faster_rows(self, shape: DecodeShape) -> range:
        """Numbers of rows for which one call was measured to be faster than separate kernels."""

    def workspace_bytes(self, shape: DecodeShape) -> int:
        """Bytes of a workspace for up to MAX_ROWS rows, which is zeroed once, when it is made."""

    def compile(self, shape: DecodeShape, rows: range) -> None:
        """Compile all that steps of so many rows need, in any thread. Raises CudaError."""

    def load(self, shape: DecodeShape, rows: range) -> None:
        """Load what `compile` has compiled, on the current device. Raises CudaError."""

    def run(
        self, step: DecodeStep, x: Tensor, cos: Tensor, sin: Tensor, attn: AttentionMetadata
    ) -> tuple[Tensor, Tensor]:
        """See `DecodeStep.__call__`."""


class DecodeStep:
    """A model's blocks on one device.

    rows: the numbers of rows, at least one of `ALL_ROWS`, of the steps that run here. Attributes
    for the kernel: `shape`; `layers`; `kv_caches`, one per layer; `table`, int64 on the device, see
    `FIELDS`; `workspace`, uint8 on the device, which belongs to one step at a time.
    """

    def __init__(
        self,
        shape: DecodeShape,
        layers: Sequence[DecodeLayer],
        kernel: Kernel,
        rows: range = ALL_ROWS,
    ) -> None:
        assert len(layers) == shape.num_layers and rows and set(rows) <= set(ALL_ROWS)
        self.rows = rows
        device = layers[0].attn_norm.device
        self.shape = shape
        self.layers = list(layers)
        self.kv_caches: list[Tensor] = []
        self.table = torch.zeros(len(layers), len(FIELDS), dtype=torch.int64, device=device)
        size = kernel.workspace_bytes(shape)
        self.workspace = torch.zeros(size, dtype=torch.uint8, device=device)
        self._kernel = kernel
        thread = ThreadPoolExecutor(1, thread_name_prefix="decode_step")
        self._compiled = thread.submit(kernel.compile, shape, rows)
        thread.shutdown(wait=False)

    def bind(self, kv_caches: Sequence[Tensor]) -> None:
        """Read and write these caches from now on, one per layer, of equal shape and dtype.

        Waits for the kernel. Raises CudaError if there is none.
        """
        self._compiled.result()
        self._kernel.load(self.shape, self.rows)
        self.kv_caches = list(kv_caches)
        rows = [table_row(*pair) for pair in zip(self.layers, self.kv_caches, strict=True)]
        self.table.copy_(torch.tensor(rows, dtype=torch.int64))

    def takes(self, attn: AttentionMetadata | StateMetadata) -> TypeGuard[AttentionMetadata]:
        """Whether a step runs here: a decode step of one of the numbers of rows in `rows`."""
        if not isinstance(attn, AttentionMetadata) or attn.max_row_tokens != 1:
            return False
        return len(attn.slot_mapping) in self.rows

    def __call__(
        self, x: Tensor, cos: Tensor, sin: Tensor, attn: AttentionMetadata
    ) -> tuple[Tensor, Tensor]:
        """Run all blocks for one token of each row; stores the tokens' keys and values.

        x: [rows, hidden_size], contiguous, without a pending update; unchanged. cos, sin: [rows, 1,
        rotary_dim] in x's dtype, contiguous, whose two halves are equal. attn: of the model's only
        cache group; row i has token i, and an empty row follows. Returns what the last block
        returns: x, and the update that is still to be added, both [rows, hidden_size], new.
        """
        return self._kernel.run(self, x, cos, sin, attn)


def layouts_of(layers: Sequence[DecodeLayer]) -> Layouts | None:
    """The matrices' layouts, as in `DecodeShape`; None if they differ from layer to layer."""
    found = {tuple(matrix.layout for matrix in layer.matrices) for layer in layers}
    return found.pop() if len(found) == 1 else None
