"""Turns a function that Inductor has compiled in this process into a `SavedGraph`.

    recording = Recording()
    compiled = recording.compile(graph, inputs, options)   # in Dynamo's backend, for compile_fx
    result = function(*arguments)                           # Dynamo's function, calls `compiled`
    saved = recording.saved(name, spec, max_tokens, parameters, result)

Only this module knows the internals of Inductor's modules, CPU kernels and autotuners. It raises
`CannotSave` for anything that it does not know. Callers must compare the results of the saved
function with `result`, so that no wrong function is saved.
"""

from __future__ import annotations

import ast
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compiledllm.graphs.saved_graph import Kernel, SavedGraph
from compiledllm.kernels.direct_launches import launching_directly

# What a generated module may import. Imports of compilers are dropped: `saved_graph.restore`
# defines the names that the module needs from them.
_KEPT_MODULES = ("ctypes", "torch", "math", "random", "os", "tempfile", "cmath")
_DROPPED_MODULES = ("torch._inductor", "triton")
_DROPPED_FUNCTIONS = ("benchmark_compiled_module", "get_args")
_LOCAL = re.compile(r"L\['(\w+)'\]")


class CannotSave(Exception):
    """The compiled function runs in this process, but cannot be kept for the next one."""


class Recording:
    """Records one compilation: the sources of its inputs, Inductor's result and its outputs."""

    def __init__(self) -> None:
        self._sources: list[str | None] = []
        self._code: Any = None  # Inductor's result
        self._outputs: Sequence[Any] = ()

    def compile(
        self, graph: torch.fx.GraphModule, inputs: list[Tensor], options: dict[str, Any]
    ) -> Callable[..., Any]:
        """Compile with Inductor. The returned function records its outputs for `saved`."""
        import torch._functorch.config
        from torch._inductor.compile_fx import compile_fx, compile_fx_inner

        def inner(*args: Any, **kwargs: Any) -> Any:
            self._code = compile_fx_inner(*args, **kwargs)
            return self._code

        self._sources = list(map(_source, graph.graph.find_nodes(op="placeholder")))
        on_gpu = any(isinstance(x, Tensor) and x.is_cuda for x in inputs)
        # A hit in autograd's cache would skip `inner`. Inductor's own cache works inside `inner`.
        with (
            torch._functorch.config.patch(enable_autograd_cache=False),
            launching_directly() if on_gpu else nullcontext(),
        ):
            compiled: Any = compile_fx(graph, inputs, inner_compile=inner, config_patches=options)

        def run(*args: Any) -> Any:
            self._outputs = compiled(*args)
            return self._outputs

        return run

    def saved(
        self, name: str, spec: str, max_tokens: int, parameters: list[str], result: Any
    ) -> SavedGraph:
        """The compiled function as data. Raises CannotSave.

        name, spec, max_tokens, parameters: see `SavedGraph`. result: the value that Dynamo's
        function returned in the last call.
        """
        code, outputs = self._code, self._outputs
        self._outputs = ()  # frees the tensors
        if code is None:
            raise CannotSave("Inductor gave no code")
        if code.constants or getattr(code, "torchbind_constants", None):
            raise CannotSave(f"constants {sorted(code.constants)} are part of the code")
        if None in self._sources:
            raise CannotSave("an input does not come from the arguments")
        scope = _module_scope(code)
        module, kernel_names = _without_compilers(code.source_code)
        places = {id(output): index for index, output in enumerate(outputs)}
        return SavedGraph(
            name,
            spec,
            max_tokens,
            parameters,
            [_LOCAL.sub(r"\1", str(source)) for source in self._sources],
            _expression(result, places),
            list(code.inputs_to_check),
            sorted(code.mutated_input_idxs),
            module,
            {kernel: _kernel(scope[kernel]) for kernel in kernel_names},
        )


@contextmanager
def reading_rows_once() -> Iterator[None]:
    """A context in which the calling thread's reductions hold a row in registers where they can.

    For such a reduction Inductor compiles a second kernel, which reads the row for each pass, and
    measures both at their first launch. The two add in different orders, and on a busy GPU the
    measurement may choose the slower one, which later starts would then keep.
    """
    from torch._inductor.runtime import triton_heuristics

    autotuners: Any = triton_heuristics.CachingAutotuner
    measured, thread = autotuners.benchmark_all_configs, threading.get_ident()

    def choose(autotuner: Any, *args: Any, **kwargs: Any) -> dict[Any, float]:
        """A time for each launcher. Inductor keeps the launcher with the shortest."""
        is_ours = threading.get_ident() == thread
        if not is_ours or not autotuner.inductor_meta.get("add_persistent_rblock"):
            timings: dict[Any, float] = measured(autotuner, *args, **kwargs)
            return timings
        return {x: 1 / x.config.kwargs.get("R0_BLOCK", 1) for x in autotuner.launchers}

    autotuners.benchmark_all_configs = choose
    try:
        yield
    finally:
        autotuners.benchmark_all_configs = measured


def _source(placeholder: Any) -> str | None:
    """A Python expression that computes an input from the arguments; None if none can."""
    argument: Any = placeholder.meta.get("grapharg")
    source: Any = getattr(argument, "source", getattr(placeholder, "_dynamo_source", None))
    name: Any = getattr(source, "name", None)
    text = name() if callable(name) else name  # a method up to torch 2.12
    return text if isinstance(text, str) and text.startswith("L[") else None


def _expression(result: Any, places: dict[int, int]) -> str:
    """A Python expression that builds the result from `out`, the outputs of the graph.

    places: id of an output -> its index.
    """
    if isinstance(result, tuple | list):
        parts = ", ".join(_expression(part, places) for part in result)
        return f"[{parts}]" if isinstance(result, list) else f"({parts}{',' * (len(result) == 1)})"
    if result is None:
        return "None"
    if id(result) not in places:
        raise CannotSave("a result is not an output of the graph")
    return f"out[{places[id(result)]}]"


# -- the generated module --------------------------------------------------------------------------


def _module_scope(code: Any) -> dict[str, Any]:
    """The names of the module that Inductor generated and imported."""
    runner = code.compiled_fn_runner
    function = code.current_callable if runner is None else type(runner).call
    scope: dict[str, Any] = getattr(function, "__globals__", {})
    if "call" not in scope:
        raise CannotSave("Inductor's module is not found")
    return scope


def _without_compilers(source: str) -> tuple[str, list[str]]:
    """The module's source without compilers and compilations; names of the compiled kernels."""
    tree = ast.parse(source)
    kept, kernels = [], []
    for node in tree.body:
        if _is_dropped(node):
            continue
        if name := _compiled_name(node):
            kernels.append(name)
        elif "async_compile" in ast.unparse(node):
            raise CannotSave(f"the generated code compiles: {ast.unparse(node)[:80]}")
        else:
            kept.append(node)
    for module in _imported(kept):
        if module.split(".")[0] not in _KEPT_MODULES:
            raise CannotSave(f"the generated code imports {module}")
    return ast.unparse(ast.Module(kept, [])), kernels


def _is_dropped(node: ast.stmt) -> bool:
    if isinstance(node, ast.Import | ast.ImportFrom):
        return any(module.startswith(_DROPPED_MODULES) for module in _imported([node]))
    if isinstance(node, ast.FunctionDef):
        return node.name in _DROPPED_FUNCTIONS
    text = ast.unparse(node)
    is_guard = isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)
    is_compilers = text.startswith(("async_compile = ", "async_compile.wait(", "del async_compile"))
    return is_guard or is_compilers


def _imported(nodes: Sequence[ast.stmt]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def _compiled_name(node: ast.stmt) -> str | None:
    """`name` of a statement `name = async_compile.x(...)`."""
    if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Call):
        return None
    function, target = node.value.func, node.targets[0]
    if not isinstance(function, ast.Attribute) or not isinstance(function.value, ast.Name):
        return None
    is_compiled = function.value.id == "async_compile" and isinstance(target, ast.Name)
    return target.id if is_compiled and isinstance(target, ast.Name) else None


# -- kernels ---------------------------------------------------------------------------------------


def _kernel(kernel: Any) -> Kernel:
    if hasattr(kernel, "launchers"):
        return _triton_kernel(kernel)
    path = getattr(getattr(kernel, "__self__", None), "__file__", None)
    if path is None or kernel.__name__ != "kernel":
        raise CannotSave(f"a kernel is of an unknown kind, {type(kernel).__name__}")
    return Kernel(Path(path).read_bytes())


def _triton_kernel(autotuner: Any) -> Kernel:
    """A Triton kernel with the configuration that Inductor's autotuner has chosen."""
    from torch._inductor.runtime.triton_heuristics import GridExpr

    if len(autotuner.launchers) != 1:
        raise CannotSave(f"{len(autotuner.launchers)} configurations of a kernel are left")
    (launcher,) = autotuner.launchers
    binary = launcher.__globals__.get("bin")
    if binary is None:
        raise CannotSave("a kernel's launcher holds no machine code")
    metadata = binary.metadata
    for name, expected in (
        ("num_ctas", 1),
        ("launch_cooperative_grid", False),
        ("global_scratch_size", 0),
        ("profile_scratch_size", 0),
    ):
        if (value := getattr(metadata, name, expected)) not in (expected, None):
            raise CannotSave(f"a kernel has {name}={value}")
    *arguments, stream = launcher.__code__.co_varnames[: launcher.__code__.co_argcount]
    assert stream == "stream", stream
    grid = GridExpr.from_meta(autotuner.inductor_meta, launcher.config)
    parameters = [(n, t) for n, t in binary.src.signature.items() if t != "constexpr"]
    launch = {
        "entry": metadata.name,
        "arguments": arguments,
        "parameters": parameters,
        "statements": list(grid.prefix),
        "grid": [str(size) for size in (grid.x_grid, grid.y_grid, grid.z_grid)],
        "num_warps": metadata.num_warps,
        "shared_bytes": metadata.shared,
        "overlap": bool(getattr(metadata, "launch_pdl", False)),
    }
    return Kernel(binary.asm["cubin"], launch)
