"""Compiled functions as data, which another process can run without the compiler.

Inductor's result is a Python module that allocates buffers and calls kernels. A `SavedGraph` holds
this module without the parts that compile, the kernels' machine code, and expressions that compute
the module's inputs from the function's arguments and the function's result from the module's
outputs. `restore` makes a function of these parts. The function has no guards: its callers must
know that the graph fits the arguments.
"""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
from typing import Any

import torch
from torch import Tensor

from compiledllm.kernels.machine_code import TritonBinary

ALIGNMENT = 16  # bytes; compiled kernels rely on this alignment of their inputs


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel's machine code.

    launch: the keyword arguments of `TritonBinary` for a Triton kernel. None: `code` is a Python
    extension module, which contains a kernel for CPUs.
    """

    code: bytes
    launch: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class SavedGraph:
    """A compiled function of a block or of an edge, for steps of at most `max_tokens` tokens.

    name: the decoder's attribute that the function replaces. spec: the block's spec as text, "" for
    an edge. parameters: names of the function's parameters. inputs: a Python expression in the
    parameters for each input of the module. output: a Python expression in `out`, the tuple of the
    module's outputs. checked: indices of inputs that must be aligned. mutated: indices of inputs
    that the module writes. module: Python code that defines `call(inputs)`. kernels: by the name
    under which the module calls them.
    """

    name: str
    spec: str
    max_tokens: int
    parameters: list[str]
    inputs: list[str]
    output: str
    checked: list[int]
    mutated: list[int]
    module: str
    kernels: dict[str, Kernel] = field(default_factory=dict)


def restore(graph: SavedGraph) -> Callable[..., Any]:
    """The compiled function. Raises an exception of any kind if this machine cannot run it."""
    # Names that the module would import from Inductor.
    scope: dict[str, Any] = {
        "extern_kernels": _Library,
        "run_intermediate_hooks": lambda *_: None,
        "maybe_profile": lambda *_: nullcontext(),
        "align": lambda size: -(-size // 64) * 64,
    }
    scope |= {name: _kernel(kernel) for name, kernel in graph.kernels.items()}
    exec(compile(graph.module, f"<compiled {graph.name}>", "exec"), scope)
    return _adapt(graph, scope["call"])


def _adapt(graph: SavedGraph, call: Callable[[list[Any]], Any]) -> Callable[..., Any]:
    """A function with the graph's parameters that calls the module's function, `call`."""
    inputs = ", ".join(graph.inputs)
    if graph.checked:
        call = _aligning(call, graph.checked, graph.mutated)
    lines = [
        f"def run({', '.join(graph.parameters)}):",
        f"    out = call([{inputs}])",
        f"    return {graph.output}",
    ]
    scope: dict[str, Any] = {"call": call}
    exec(compile("\n".join(lines), f"<arguments of {graph.name}>", "exec"), scope)
    run: Callable[..., Any] = scope["run"]
    return run


def _aligning(
    call: Callable[[list[Any]], Any], checked: list[int], mutated: list[int]
) -> Callable[[list[Any]], Any]:
    """Call with aligned copies of misaligned inputs, as Inductor's own function does.

    Copies of mutated inputs are copied back after the call.
    """

    def run(inputs: list[Any]) -> Any:
        written: list[tuple[Tensor, Tensor]] = []
        for index in checked:
            tensor = inputs[index]
            if tensor.data_ptr() % ALIGNMENT:
                inputs[index] = tensor.clone()
                if index in mutated:
                    written.append((tensor, inputs[index]))
        out = call(inputs)
        for tensor, copy in written:
            tensor.copy_(copy)
        return out

    return run


class _Library:
    """The library functions that Inductor's modules may call. Calls of other functions fail."""

    mm = torch.mm
    addmm = torch.addmm
    bmm = torch.bmm
    baddbmm = torch.baddbmm
    _int_mm = torch._int_mm
    _scaled_mm = torch._scaled_mm

    @staticmethod
    def bias_addmm(bias: Tensor, a: Tensor, b: Tensor, **options: Any) -> Tensor:
        """addmm, faster: if all rows of the bias are one row, cuBLAS gets this row alone."""
        is_row = bias.size(0) == 1 or (bias.size(0) > 1 and bias.stride(0) == 0)
        return torch.addmm(bias[0] if is_row else bias, a, b, **options)


def _kernel(kernel: Kernel) -> Any:
    if kernel.launch is not None:
        return TritonBinary(kernel.code, **kernel.launch)
    return _extension(kernel.code).kernel


def _extension(code: bytes) -> Any:
    """Load an extension module that Inductor compiled, from memory.

    The module reads the address of one of torch's functions from an environment variable, which
    Inductor's loader would set.
    """
    guards: Any = torch._C._dynamo.guards
    address = guards._torchinductor_pyobject_tensor_data_ptr
    os.environ["_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR"] = str(address)
    file = os.memfd_create("kernel", os.MFD_CLOEXEC)
    try:
        with open(file, "wb", closefd=False) as writer:
            writer.write(code)
        # The dynamic loader does not load a path that it has loaded before. Each module gets a
        # different path by a different number of slashes.
        path = f"/proc/self/fd/{'/' * len(_extensions)}{file}"
        loader = ExtensionFileLoader(f"compiledllm_{len(_extensions)}.kernel", path)
        spec = spec_from_loader(loader.name, loader)
        assert spec is not None
        module = module_from_spec(spec)
        loader.exec_module(module)
    finally:
        os.close(file)
    # Some tools, such as Hypothesis, read the files of all modules. The file descriptor in the path
    # is closed and may later belong to a pipe, on which such a tool would block for ever.
    del module.__file__
    sys.modules.pop(loader.name, None)
    _extensions.append(module)
    return module


_extensions: list[types.ModuleType] = []  # never unloaded, as other engines may run their code
