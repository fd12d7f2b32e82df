"""Launches the kernels of compiled graphs without launchers that a C compiler must build first.

    with launching_directly():
        compile_graph()

Triton 3.6 launches a kernel with a C function that it builds for the types of the kernel's
parameters, in half a second. A graph's kernels run once or twice with that function, before
`TritonBinary` takes over.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from compiledllm.kernels.machine_code import TritonLaunch


class DirectLauncher:
    """Stands in for Triton's launcher of one kernel and has the same signature.

    src, metadata: attributes of the compiled kernel. Raises KeyError for a kernel that only
    Triton's own launcher can launch.
    """

    def __init__(self, src: Any, metadata: Any) -> None:
        self._kinds: list[str] = list(src.signature.values())
        needs = ("global_scratch_size", "profile_scratch_size", "launch_cooperative_grid")
        if metadata.num_ctas != 1 or any(getattr(metadata, name, 0) for name in needs):
            raise KeyError("the kernel needs more than parameters")
        kinds = [kind for kind in self._kinds if kind != "constexpr"]
        overlap = bool(getattr(metadata, "launch_pdl", False))
        self._launch = TritonLaunch(kinds, metadata.num_warps, metadata.shared, overlap)

    def __call__(
        self,
        x: int,
        y: int,
        z: int,
        stream: int,
        function: int,
        _metadata: Any,
        _launch_metadata: Any,
        _enter_hook: Any,
        _exit_hook: Any,
        *arguments: Any,
    ) -> None:
        """Launch the kernel. arguments: all arguments of the kernel, including constants."""
        pairs = zip(arguments, self._kinds, strict=True)
        values = [_value(argument) for argument, kind in pairs if kind != "constexpr"]
        self._launch.function = ctypes.c_void_p(function)
        self._launch(x, y, z, stream, *values)


def _value(argument: Any) -> Any:
    return argument.data_ptr() if hasattr(argument, "data_ptr") else argument


@contextmanager
def launching_directly() -> Iterator[None]:
    """A context in which kernels that the calling thread loads get a `DirectLauncher`."""
    from triton.backends.nvidia import driver as nvidia
    from triton.runtime.driver import driver

    if not hasattr(nvidia, "make_launcher"):  # a newer version, which builds no launchers
        yield
        return
    active, thread = driver.active, threading.get_ident()
    own = active.launcher_cls

    def launcher(src: Any, metadata: Any) -> Any:
        if threading.get_ident() != thread:  # other threads run other engines
            return own(src, metadata)
        try:
            return DirectLauncher(src, metadata)
        except (KeyError, AttributeError):
            return own(src, metadata)

    active.launcher_cls = launcher
    try:
        yield
    finally:
        active.launcher_cls = own
