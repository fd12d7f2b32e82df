"""Compiled functions as data, which run again without the compiler.

Inductor's result is a Python module that allocates buffers and calls kernels. A `SavedGraph` holds
this module without the parts that compile, the kernels' machine code, and how a block's arguments
become the module's inputs and its outputs the block's. `restore` makes a function of these. The
function has no guards: whoever restores a graph must know that it fits.
"""

from __future__ import annotations

import os
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
    """A kernel's machine code. launch: of a Triton kernel; None: an extension module of Python."""

    code: bytes
    launch: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class SavedGraph:
    """A compiled function of a block or of an edge, for steps of at most `max_tokens` tokens.

    name: the decoder's attribute. spec: the block's spec as text, "" for an edge. parameters: the
    function's. inputs: Python expressions in the parameters. output: a Python expression in `out`,
    the tuple of the module's outputs. checked: inputs that must be aligned. mutated: inputs that
    the module writes. module: Python code that defines `call(inputs)`.
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
    """The function with a block's parameters around the module's function."""
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
    """Call with copies in place of inputs at odd addresses, as the compiler's own function does."""

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
    """The library functions that Inductor's modules call. A module that calls another fails."""

    mm = torch.mm
    addmm = torch.addmm
    bmm = torch.bmm
    baddbmm = torch.baddbmm
    _int_mm = torch._int_mm
    _scaled_mm = torch._scaled_mm

    @staticmethod
    def bias_addmm(bias: Tensor, a: Tensor, b: Tensor, **options: Any) -> Tensor:
        """addmm whose bias is a row in all rows; cuBLAS has a faster kernel for the row itself."""
        is_row = bias.size(0) == 1 or (bias.size(0) > 1 and bias.stride(0) == 0)
        return torch.addmm(bias[0] if is_row else bias, a, b, **options)


def _kernel(kernel: Kernel) -> Any:
    if kernel.launch is not None:
        return TritonBinary(kernel.code, **kernel.launch)
    return _extension(kernel.code).kernel


def _extension(code: bytes) -> Any:
    """Load an extension module that Inductor compiled, from memory.

    The module asks the environment for the address of a function of torch.
    """
    guards: Any = torch._C._dynamo.guards
    address = guards._torchinductor_pyobject_tensor_data_ptr
    os.environ["_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR"] = str(address)
    file = os.memfd_create("kernel", os.MFD_CLOEXEC)
    try:
        with open(file, "wb", closefd=False) as writer:
            writer.write(code)
        # The system's loader takes equal paths for the same module, so each module has its own.
        path = f"/proc/self/fd/{'/' * len(_extensions)}{file}"
        loader = ExtensionFileLoader(f"compiledllm_{len(_extensions)}.kernel", path)
        spec = spec_from_loader(loader.name, loader)
        assert spec is not None
        module = module_from_spec(spec)
        loader.exec_module(module)
    finally:
        os.close(file)
    _extensions.append(module)
    return module


_extensions: list[types.ModuleType] = []  # never unloaded, as other engines may run their code
