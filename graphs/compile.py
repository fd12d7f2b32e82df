"""Compiles the decoder block: once per distinct layer spec, shared by all layers that have it.

And the decoder's edges, what lies before the first block and behind the last. Variants of each: one
token (a static shape, for single-row decode) and ranges of token counts. Any later compilation is a
recompile, which never happens in a healthy engine: it is counted and tests hold it to zero. Knows
"a module with blocks, a `block_forward` and edges", no model by name.
"""

from __future__ import annotations

import logging
import math
import threading
import time
import types
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from compiledllm.platform import can_overlap_kernels

log = logging.getLogger("compiledllm")

Forward = Callable[..., Any]
Args = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Variant:
    """A compilation for steps of `least` to `most` tokens, made with `example` tokens.

    The compiler sizes its kernels by the example: what suits two tokens is slow for thousands.
    """

    least: int
    most: int
    example: int


@dataclass(frozen=True, slots=True)
class Example:
    """A call by which a variant of something is compiled.

    name: the decoder's attribute that was called. spec: of the block; None of an edge.
    """

    name: str
    spec: Any
    variant: Variant
    module: nn.Module
    args: Args


_BLOCK = "block_forward"
_ANY = 2**30
_CPU_VARIANTS = (Variant(1, 1, 1), Variant(2, _ANY, 2))
_GPU_VARIANTS = (
    Variant(1, 1, 1),
    Variant(2, 16, 8),
    Variant(17, 256, 64),
    Variant(257, _ANY, 2048),
)


def variants_for(max_tokens: int, on_gpu: bool) -> list[Variant]:
    """Those that steps of at most `max_tokens` need.

    The bound is the true one: the compiler indexes with 32 bits where it can prove they suffice.
    """
    found = []
    for v in _GPU_VARIANTS if on_gpu else _CPU_VARIANTS:
        if v.least <= max_tokens:
            most = min(v.most, max(max_tokens, v.least + 1))  # a range of one would be static
            found.append(Variant(v.least, most, min(v.example, most)))
    return found


def edge_variants(variants: Sequence[Variant]) -> dict[Variant, Variant]:
    """Those that the edges need, by the block's with the same example: one token, and any number.

    Their kernels are alike for few and many, and each variant takes time at start.
    """
    few = dict(zip(variants[:2], variants[:2], strict=True))
    last = variants[:2][-1]
    return few | {last: replace(last, most=variants[-1].most)}


class Decoder(Protocol):
    """What is compiled: `block_forward(block, *tensors, kv_cache, attn)` runs one block.

    The tensors begin with the dimension of tokens; blocks of equal `spec` share what is compiled.
    kv_cache: one, or a list of them. edges: names of attributes like it that are called once a
    step, `edge(decoder, *tensors)`.
    """

    block_forward: Forward

    @property
    def edges(self) -> tuple[str, ...]: ...


class BlockCompiler:
    """Replaces a decoder's `block_forward` and edges by their compiled forms.

    decoder: the model. run_dummy: runs it on that many padding tokens. variants: by ascending
    size, the first for one token, the last for any number. Compilation is started by `compile`,
    which blocks, by `compile_in_background`, or by `compile_after` so much work; in the last two
    the model serves eagerly meanwhile.
    """

    def __init__(
        self,
        decoder: Decoder,
        run_dummy: Callable[[int], None],
        variants: Sequence[Variant],
    ) -> None:
        self._decoder = decoder
        self._variants = variants
        self._run_dummy = run_dummy
        self._inductor_options = {"triton.enable_pdl": can_overlap_kernels()}
        names: tuple[str, ...] = (_BLOCK, *decoder.edges)
        self.eager: dict[str, Forward] = {name: getattr(decoder, name) for name in names}
        self._warmed_up_at: int | None = None
        self.compiled: dict[str, Forward] | None = None
        self._thread: threading.Thread | None = None
        self._threads_to_restore = 1
        self._busy_seconds_left = math.inf
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
        if not self.is_ready:
            self._compile_examples(self._record_examples())
            self._switch_over()
        return self.is_ready

    def compile_in_background(self) -> None:
        """Start compiling in a thread; the decoder switches over at the end of a later step.

        Meanwhile the model leaves one core to the compiler: two threads that wait for each other
        at every operator lose far more to a third than the core is worth.
        """
        examples, num_threads = self._record_examples(), torch.get_num_threads()

        def run() -> None:
            # The count is per thread and guarded by the compiled code. Asked for first, because
            # torch sets a thread's count from the process's when it is first asked for.
            torch.get_num_threads()
            torch.set_num_threads(num_threads)
            with torch._inductor.config.patch(compile_threads=1):
                self._compile_examples(examples)

        self._thread = threading.Thread(target=run, name="compile", daemon=True)
        self._thread.start()
        self._threads_to_restore = num_threads
        torch.set_num_threads(max(1, num_threads - 1))

    def compile_after(self, busy_seconds: float) -> None:
        """Start in the background once `count_work` has seen this much work."""
        self._busy_seconds_left = busy_seconds

    def count_work(self, seconds: float) -> None:
        """The model worked this long. To be called between steps, by the thread that runs them."""
        if self._thread is not None and not self._thread.is_alive():
            self._thread = None
            torch.set_num_threads(self._threads_to_restore)
            self._switch_over()
        self._busy_seconds_left -= seconds
        if self._busy_seconds_left <= 0:
            self._busy_seconds_left = math.inf
            self.compile_in_background()

    def wait(self) -> None:
        """Return once a background compilation is over and the decoder has switched over."""
        if self._thread is not None:
            self._thread.join()
            self.count_work(0.0)

    def _switch_over(self) -> None:
        if self.compiled is not None:
            self._warmed_up_at = self.num_compiles
            self.use(self.compiled)
            log.info("compiled the decoder block in %.1f s", self.seconds)

    def use(self, forwards: Mapping[str, Forward]) -> None:
        """Let the decoder run these: `eager`, or `compiled`."""
        for name, forward in forwards.items():
            setattr(self._decoder, name, forward)

    def _record_examples(self) -> list[Example]:
        """Arguments of the first call of each distinct block, for each variant, largest first.

        And of each edge.
        """
        examples: list[Example] = []
        of_edges = edge_variants(self._variants)
        for variant in reversed(self._variants):
            of_name = dict.fromkeys(self.eager, of_edges.get(variant)) | {_BLOCK: variant}
            recorders = {n: self._recorder(n, v, examples) for n, v in of_name.items() if v}
            self.use(self.eager | recorders)
            try:
                self._run_dummy(variant.example)
            finally:
                self.use(self.eager)
        return examples

    def _recorder(self, name: str, variant: Variant, examples: list[Example]) -> Forward:
        eager, seen = self.eager[name], set()

        def record(module: Any, *args: Any) -> Any:
            spec = module.spec if name == _BLOCK else None
            if spec not in seen:
                seen.add(spec)
                examples.append(Example(name, spec, variant, module, args))
            return eager(module, *args)

        return record

    @torch.inference_mode()
    def _compile_examples(self, examples: list[Example]) -> None:
        start = time.perf_counter()
        compiled: dict[tuple[str, Any], list[tuple[float, Forward]]] = {}
        try:
            for example in examples:
                forward = torch.compile(
                    _own_copy(self.eager[example.name]),
                    fullgraph=True,
                    dynamic=False,  # but for what is marked: not what other engines differed in
                    backend=self._counting_inductor,
                )
                _mark_token_and_row_counts_dynamic(example)
                with _cached_for(example.variant):
                    forward(example.module, *example.args)
                of_key = compiled.setdefault((example.name, example.spec), [])
                of_key.insert(0, (example.variant.most, forward))
        except Exception as error:  # whatever the compiler raises, the eager model still serves
            self.error = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
            log.warning("compilation failed, running eagerly (%s)", self.error)
            return
        self.seconds = time.perf_counter() - start
        self.compiled = {name: _by_size(name, compiled) for name in self.eager}

    def _counting_inductor(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        from torch._inductor.compile_fx import compile_fx

        self.num_compiles += 1
        if self.is_ready:
            log.warning("the decoder block was compiled again after warm-up: this is a bug")
        return compile_fx(graph, inputs, config_patches=self._inductor_options)


def _by_size(name: str, compiled: dict[tuple[str, Any], list[tuple[float, Forward]]]) -> Forward:
    """Calls what was compiled for the module's spec and this number of tokens."""
    is_block = name == _BLOCK

    def run(module: Any, first: Tensor, *args: Any) -> Any:
        sizes = compiled[name, module.spec if is_block else None]
        forward = next(f for most, f in sizes if len(first) <= most)
        return forward(module, first, *args)

    return run


def _own_copy(forward: Forward) -> Forward:
    """The same function with a code object of its own.

    The compiler keeps what it compiled by code object, and at most eight of them: shared by all
    engines of a process and all layer specs, the fifth would fail.
    """
    assert isinstance(forward, types.FunctionType)
    copy = types.FunctionType(
        forward.__code__.replace(), forward.__globals__, forward.__name__, forward.__defaults__
    )
    copy.__kwdefaults__ = forward.__kwdefaults__
    return copy


def _cached_for(variant: Variant) -> AbstractContextManager[None]:
    """What is compiled inside is found again by variants of the same range only.

    The compiler's own key has no ranges: it would take what was compiled for fewer tokens, and then
    refuse it.
    """
    tag = f"{variant.least} to {variant.most} tokens"
    config: Any = torch.compiler.config
    patched: AbstractContextManager[None] = config.patch(cache_key_tag=tag)
    return patched


def _mark_token_and_row_counts_dynamic(example: Example) -> None:
    """First dimension of everything but the cache: the number of tokens, or of rows."""
    variant, tensors = example.variant, list(example.args)
    if variant.most == 1:
        return  # static
    if example.name == _BLOCK:
        *tensors, _, attn = tensors
        tensors.append(attn.slot_mapping)
        for tensor in (attn.block_tables, attn.seq_lens, attn.query_start_loc):
            torch._dynamo.mark_dynamic(tensor, 0)
    for tensor in tensors:
        torch._dynamo.mark_dynamic(tensor, 0, min=variant.least, max=variant.most)
