"""Compiles the decoder block: once per distinct layer spec, shared by all layers that have it.

Two variants of each: one token (a static shape, for single-row decode) and a dynamic number of
tokens. Any later compilation is a recompile, which never happens in a healthy engine: it is counted
and tests hold it to zero. Knows "a module with blocks and a `block_forward`", no model by name.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

log = logging.getLogger("compiledllm")

Block = nn.Module
BlockForward = Callable[..., tuple[Tensor, Tensor]]
BlockArgs = tuple[Any, ...]


class Decoder(Protocol):
    """What is compiled: `block_forward(layer, x, due, cos, sin, kv_cache, attn)` runs one layer."""

    block_forward: BlockForward


class BlockCompiler:
    """Replaces a decoder's `block_forward` by its compiled form.

    decoder: the model. run_dummy: runs it on that many padding tokens. Both are used once, in
    `compile`, which blocks, or in `compile_in_background`, which serves eagerly meanwhile.
    """

    def __init__(self, decoder: Decoder, run_dummy: Callable[[int], None]) -> None:
        self._decoder = decoder
        self._run_dummy = run_dummy
        self._eager = decoder.block_forward
        self._warmed_up_at: int | None = None
        self._thread: threading.Thread | None = None
        self.num_compiles = 0
        self.seconds = 0.0
        self.error: str | None = None

    @property
    def is_ready(self) -> bool:
        return self._warmed_up_at is not None

    @property
    def num_recompiles(self) -> int:
        """Compilations since warm-up."""
        return self.num_compiles - self._warmed_up_at if self._warmed_up_at is not None else 0

    def compile(self) -> bool:
        """Compile and switch over. False, after one warning, if that fails: eager goes on."""
        self._compile_examples(self._record_examples())
        return self.is_ready

    def compile_in_background(self) -> None:
        """Start compiling in a thread; the decoder switches over by itself when that is done."""
        examples = self._record_examples()
        self._thread = threading.Thread(
            target=self._compile_examples, args=(examples,), name="compile", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Return once a background compilation is over."""
        if self._thread is not None:
            self._thread.join()

    def _record_examples(self) -> list[tuple[Block, BlockArgs]]:
        """Arguments of the first call of each distinct block, for two tokens and for one."""
        examples: list[tuple[Block, BlockArgs]] = []
        for num_tokens in (2, 1):
            seen: set[Any] = set()

            def record(layer: Block, *args: Any, seen: set[Any] = seen) -> tuple[Tensor, Tensor]:
                if layer.spec not in seen:
                    seen.add(layer.spec)
                    examples.append((layer, args))
                return self._eager(layer, *args)

            self._decoder.block_forward = record
            try:
                self._run_dummy(num_tokens)
            finally:
                self._decoder.block_forward = self._eager
        return examples

    @torch.inference_mode()
    def _compile_examples(self, examples: list[tuple[Block, BlockArgs]]) -> None:
        start = time.perf_counter()
        compiled: BlockForward = torch.compile(
            self._eager, fullgraph=True, backend=self._counting_inductor
        )
        try:
            for layer, args in examples:
                _mark_token_and_row_counts_dynamic(args)
                compiled(layer, *args)
        except Exception as error:  # whatever the compiler raises, the eager model still serves
            self.error = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
            log.warning("compilation failed, running eagerly (%s)", self.error)
            return
        self.seconds = time.perf_counter() - start
        self._warmed_up_at = self.num_compiles
        self._decoder.block_forward = compiled
        log.info("compiled the decoder block in %.1f s", self.seconds)

    def _counting_inductor(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        from torch._inductor.compile_fx import compile_fx

        self.num_compiles += 1
        if self.is_ready:
            log.warning("the decoder block was compiled again after warm-up: this is a bug")
        return compile_fx(graph, inputs)


def _mark_token_and_row_counts_dynamic(args: BlockArgs) -> None:
    """First dimension of everything but the cache: the number of tokens, or of rows."""
    x, due, cos, sin, _, attn = args
    for tensor in (x, due, cos, sin, *attn):
        if tensor.shape[0] > 1:  # one token is the static variant
            torch._dynamo.mark_dynamic(tensor, 0)
