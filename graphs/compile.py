"""Compiles the decoder block, once per distinct layer spec, and the decoder's edges.

Layers with equal specs share a compiled block. The edges are the decoder's functions that run
before the first block and after the last block. Blocks and edges are compiled in variants: one
token (a static shape, for single-row decode) and ranges of token counts. A compilation after
warm-up is a recompile, which must never happen: recompiles are counted, and tests require zero. The
module knows a decoder with blocks, a `block_forward` and edges, but no model by name.
"""

from __future__ import annotations

import logging
import math
import threading
import time
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from compiledllm.graphs.examples import (
    BLOCK,
    Example,
    are_equal,
    defined,
    mark_dynamic_sizes,
)
from compiledllm.graphs.inductor_output import CannotSave, Recording, reading_rows_once
from compiledllm.graphs.saved_graph import SavedGraph, restore
from compiledllm.graphs.variants import Variant, edge_variants
from compiledllm.kernels import late_compiles
from compiledllm.platform import can_overlap_kernels

log = logging.getLogger("compiledllm")

Forward = Callable[..., Any]


class Decoder(Protocol):
    """A model to compile. `block_forward(block, *tensors, cache, metadata)` runs one block.

    tensors: each [tokens, ...], or None. cache: a tensor or a list of tensors. metadata: its
    `cache_dim` is the dimension of the cache whose size differs between engines; its
    `token_tensors` are tensors [tokens, ...]; the first dimensions of its `row_tensors` follow the
    number of rows, and the lengths of its `bound_tensors` are bounds. Blocks with equal `spec`
    share a compilation. edges: names of further attributes to compile, each called once per step as
    `edge(decoder, *tensors)`.
    """

    block_forward: Forward

    @property
    def edges(self) -> tuple[str, ...]: ...


class BlockCompiler:
    """Replaces a decoder's `block_forward` and edges by compiled functions.

    run_dummy: runs a step with the given number of padding tokens. variants: in ascending order,
    from one token up to the largest step (`variants_for`). `compile` waits for the compiler. After
    `compile_in_background` or `compile_after`, the decoder runs eagerly until compilation is done.
    `restore` uses functions that an earlier engine has compiled and saved. saves: an attribute,
    whether functions are saved for later engines.
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
        # Inductor has two candidate tilings for an elementwise kernel. Measuring the two takes time
        # and, on a busy host, has chosen the second, which took 1.7 times as long for 4096 tokens.
        self._inductor_options = {
            "triton.enable_pdl": can_overlap_kernels(),
            "triton.autotune_pointwise": False,
        }
        self.saves = True
        names: tuple[str, ...] = (BLOCK, *decoder.edges)
        self.eager: dict[str, Forward] = {name: getattr(decoder, name) for name in names}
        self._warmed_up_at: int | None = None
        self.compiled: dict[str, Forward] | None = None
        self._thread: threading.Thread | None = None
        self._threads_to_restore = 1
        self._busy_s_left = math.inf
        self.num_compiles = 0
        self.compile_s = 0.0
        self.error: str | None = None
        self.saved: list[SavedGraph] = []  # complete if `why_not_saved` is None
        self.why_not_saved: str | None = None
        self._when_ready: Callable[[], None] = lambda: None

    @property
    def is_ready(self) -> bool:
        return self._warmed_up_at is not None

    @property
    def num_recompiles(self) -> int:
        """Number of compilations since warm-up."""
        return self.num_compiles - self._warmed_up_at if self._warmed_up_at is not None else 0

    def compile(self) -> bool:
        """Compile and switch over. Returns False if that failed; the decoder then stays eager."""
        if not self.is_ready:
            self._compile_examples(self._record_examples())
            self._switch_over()
        return self.is_ready

    def compile_in_background(self) -> None:
        """Start compiling in a thread. The decoder switches over at the end of a later step.

        Meanwhile the model uses one thread fewer and leaves one core to the compiler. The model's
        threads wait for each other at every operator, so one thread that shares its core with the
        compiler would slow down all of them.
        """
        examples, num_threads = self._record_examples(), torch.get_num_threads()

        def run() -> None:
            # Compiled code guards on the thread count, which is per thread. The first call of
            # `get_num_threads` in a thread resets the count to the process's, so it comes first.
            torch.get_num_threads()
            torch.set_num_threads(num_threads)
            with torch._inductor.config.patch(compile_threads=1):
                self._compile_examples(examples)

        self._thread = threading.Thread(target=run, name="compile", daemon=True)
        self._thread.start()
        self._threads_to_restore = num_threads
        torch.set_num_threads(max(1, num_threads - 1))

    def compile_after(self, busy_s: float) -> None:
        """Compile in the background once `count_work` has seen this many seconds of work."""
        self._busy_s_left = busy_s

    def count_work(self, busy_s: float) -> None:
        """Add seconds of the model's work. The thread that runs steps calls this between steps."""
        if self._thread is not None and not self._thread.is_alive():
            self._thread = None
            torch.set_num_threads(self._threads_to_restore)
            self._switch_over()
        self._busy_s_left -= busy_s
        if self._busy_s_left <= 0:
            self._busy_s_left = math.inf
            self.compile_in_background()

    def wait(self) -> None:
        """Wait until a background compilation has ended and the decoder has switched over."""
        if self._thread is not None:
            self._thread.join()
            self.count_work(0.0)

    def _switch_over(self) -> None:
        if self.compiled is not None:
            self._warmed_up_at = self.num_compiles
            self.use(self.compiled)
            log.info("compiled the decoder block in %.1f s", self.compile_s)
            self._when_ready()

    def call_when_ready(self, function: Callable[[], None]) -> None:
        """Call a function once the decoder runs compiled code: now, or when compilation ends."""
        if self.is_ready:
            function()
        else:
            self._when_ready = function

    def use(self, forwards: Mapping[str, Forward]) -> None:
        """Make the decoder call these functions: `self.eager` or `self.compiled`."""
        for name, forward in forwards.items():
            setattr(self._decoder, name, forward)

    def _record_examples(self) -> list[Example]:
        """Record, per variant, the first call of each distinct block and of each edge.

        The largest variant comes first.
        """
        examples: list[Example] = []
        edge_variant = edge_variants(self._variants)
        for variant in reversed(self._variants):
            variants = dict.fromkeys(self.eager, edge_variant.get(variant)) | {BLOCK: variant}
            recorders = {n: self._recorder(n, v, examples) for n, v in variants.items() if v}
            self.use(self.eager | recorders)
            try:
                self._run_dummy(variant.example)
            finally:
                self.use(self.eager)
        return examples

    def _recorder(self, name: str, variant: Variant, examples: list[Example]) -> Forward:
        eager, seen = self.eager[name], set()

        def record(module: Any, *args: Any) -> Any:
            spec = module.spec if name == BLOCK else None
            if spec not in seen:
                seen.add(spec)
                examples.append(Example(name, spec, variant, module, args))
            return eager(module, *args)

        return record

    def restore(self, saved: Sequence[SavedGraph]) -> None:
        """Switch over to functions that another engine has compiled, usually in another process.

        Raises an exception of any kind if a function cannot be loaded or is missing.
        """
        started = time.perf_counter()
        modules: Iterable[Any] = cast("nn.Module", self._decoder).modules()
        specs = {repr(m.spec): m.spec for m in modules if hasattr(m, "spec")} | {"": None}
        compiled: dict[tuple[str, Any], list[tuple[float, Forward]]] = {}
        for graph in sorted(saved, key=lambda graph: graph.max_tokens):
            forwards = compiled.setdefault((graph.name, specs[graph.spec]), [])
            forwards.append((graph.max_tokens, restore(graph)))
        if missing := set(self.eager) - {name for name, _ in compiled}:
            raise ValueError(f"there is no compiled {', '.join(sorted(missing))}")
        self.compiled = {name: _by_size(name, compiled) for name in self.eager}
        self.compile_s = time.perf_counter() - started
        self._warmed_up_at = self.num_compiles
        self.use(self.compiled)

    @torch.inference_mode()
    def _compile_examples(self, examples: list[Example]) -> None:
        start = time.perf_counter()
        compiled: dict[tuple[str, Any], list[tuple[float, Forward]]] = {}
        try:
            for example in examples:
                forward = self._compile_example(example)
                forwards = compiled.setdefault((example.name, example.spec), [])
                forwards.insert(0, (example.variant.max_tokens, forward))
        except Exception as error:  # after any compiler error the eager model still serves
            self.error = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
            log.warning("compilation failed, running eagerly (%s)", self.error)
            return
        self.compile_s = time.perf_counter() - start
        self.compiled = {name: _by_size(name, compiled) for name in self.eager}

    def _compile_example(self, example: Example) -> Forward:
        from torch._inductor.compile_fx import compile_fx

        recording = Recording()

        def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
            self.num_compiles += 1
            if self.is_ready:
                late_compiles.report(f"the decoder's {example.name}")
            if not self.saves:
                return compile_fx(graph, inputs, config_patches=self._inductor_options)
            # Inductor's static launcher would keep no machine code that could be saved.
            options = self._inductor_options | {"use_static_cuda_launcher": False}
            return recording.compile(graph, inputs, options)

        function = _own_copy(self.eager[example.name])
        # Only the dimensions marked below are dynamic, not dimensions that differed between earlier
        # engines.
        forward = torch.compile(function, fullgraph=True, dynamic=False, backend=backend)
        mark_dynamic_sizes(example)
        with _cached_for(example.variant), reading_rows_once():
            result = forward(example.module, *example.args)
        if not self.saves:
            return forward
        try:
            return self._save(example, recording, result)
        except Exception as error:  # the compiled function itself still runs
            self.why_not_saved = f"{type(error).__name__}: {str(error).strip()[:200]}"
            log.info("%s cannot be kept for the next start (%s)", example.name, self.why_not_saved)
            return forward

    def _save(self, example: Example, recording: Recording, result: Any) -> Forward:
        """Append the compiled function to `self.saved`. Returns the function restored from there.

        This engine then runs the same function as a later engine that restores the saved one.
        Raises an exception if the restored function gives another result than the compiled one.
        """
        code = self.eager[example.name].__code__
        parameters = list(code.co_varnames[: code.co_argcount])
        spec = "" if example.spec is None else repr(example.spec)
        max_tokens = example.variant.max_tokens
        saved = recording.saved(example.name, spec, max_tokens, parameters, result)
        restored = restore(saved)
        found = defined(example, restored(example.module, *example.args))
        if not all(map(are_equal, found, defined(example, result))):
            raise CannotSave("the saved function gives another result")
        self.saved.append(saved)
        return restored


def import_compiler() -> None:
    """Import the compiler, and start the processes in which it compiles kernels."""
    from torch._inductor import async_compile, compile_fx  # noqa: F401

    async_compile.maybe_warm_pool()


def _by_size(name: str, compiled: dict[tuple[str, Any], list[tuple[float, Forward]]]) -> Forward:
    """A function that calls the variant for the module's spec and the number of tokens.

    compiled: (name, spec) -> (maximum number of tokens, function), in ascending order.
    """
    is_block = name == BLOCK

    def run(module: Any, first: Tensor, *args: Any) -> Any:
        sizes = compiled[name, module.spec if is_block else None]
        forward = next(f for max_tokens, f in sizes if len(first) <= max_tokens)
        return forward(module, first, *args)

    return run


def _own_copy(forward: Forward) -> Forward:
    """A copy of the function with its own code object.

    Dynamo keeps at most eight compilations per code object. Without copies, all engines of a
    process and all layer specs would share the eight, and the fifth engine could not compile.
    """
    assert isinstance(forward, types.FunctionType)
    copy = types.FunctionType(
        forward.__code__.replace(), forward.__globals__, forward.__name__, forward.__defaults__
    )
    copy.__kwdefaults__ = forward.__kwdefaults__
    return copy


def _cached_for(variant: Variant) -> AbstractContextManager[None]:
    """A context in which the key of the compiler's disk cache contains the variant's token range.

    The default key contains no ranges: the compiler would find the cached code of another range and
    then reject that code.
    """
    tag = f"{variant.min_tokens} to {variant.max_tokens} tokens"
    config: Any = torch.compiler.config
    patched: AbstractContextManager[None] = config.patch(cache_key_tag=tag)
    return patched
