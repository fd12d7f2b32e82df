"""Kernels that Triton compiled earlier, launched on a driver that only notes the launches."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest

from compiledllm.kernels import machine_code
from compiledllm.kernels.direct_launches import DirectLauncher
from compiledllm.kernels.machine_code import CudaError, LaunchConfig, TritonBinary

LAUNCH: dict[str, Any] = {
    "entry": "triton_add",
    "arguments": ["x", "out", "xnumel", "ynumel", "one", "eps"],
    "parameters": [["x", "*bf16"], ["out", "*bf16"], ["xnumel", "i64"], ["eps", "fp32"]],
    "statements": ["half = xnumel // 2"],
    "grid": ["-(half // -4)", "ynumel", "1"],
    "num_warps": 4,
    "shared_bytes": 70_000,
    "overlap": True,
}


class Driver:
    """Notes what is loaded and launched. `status` is what the next launches return."""

    def __init__(self) -> None:
        self.loaded: list[Any] = []
        self.launches: list[dict[str, Any]] = []
        self.status = 0

    def cuModuleLoadData(self, module: Any, code: bytes) -> int:  # noqa: N802
        self.loaded.append(code)
        return 0

    def cuModuleGetFunction(self, function: Any, module: Any, name: bytes) -> int:  # noqa: N802
        self.loaded.append(name)
        return 0

    def cuFuncSetAttribute(self, function: Any, attribute: int, value: int) -> int:  # noqa: N802
        self.loaded.append(value)
        return 0

    def cuDriverGetVersion(self, version: Any) -> int:  # noqa: N802
        version._obj.value = 13000
        return 0

    def cuGetErrorString(self, status: int, text: Any) -> None:  # noqa: N802
        text._obj.value = b"out of luck"

    def cuLaunchKernelEx(self, config: Any, function: Any, addresses: Any, _: None) -> int:  # noqa: N802
        found: LaunchConfig = config._obj
        types = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_float)
        values = [
            ctypes.cast(a, ctypes.POINTER(t))[0] for a, t in zip(addresses, types, strict=False)
        ]
        scratch = [ctypes.cast(a, ctypes.POINTER(ctypes.c_void_p))[0] for a in addresses[4:]]
        self.launches.append(
            {
                "grid": list(found.grid),
                "block": list(found.block),
                "shared": found.shared_bytes,
                "stream": found.stream,
                "attributes": found.num_attributes,
                "values": values,
                "scratch": scratch,
            }
        )
        return self.status


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver()
    monkeypatch.setattr(machine_code, "driver", lambda: made)
    return made


def tensor(address: int) -> Any:
    return SimpleNamespace(data_ptr=lambda: address)


def test_launch_passes_the_parameters_that_the_code_takes(driver: Driver) -> None:
    kernel = TritonBinary(b"code", **LAUNCH)
    assert driver.loaded == [b"code", b"triton_add", 70_000]
    for xnumel in (2**40, 18):
        kernel.run(tensor(4096), tensor(8192), xnumel, 3, 1, 0.5, stream=77)
    first, second = driver.launches
    assert first["values"] == [4096, 8192, 2**40, 0.5] and first["scratch"] == [None, None]
    assert second["values"] == [4096, 8192, 18, 0.5]
    assert second["grid"] == [3, 3, 1] and second["block"] == [128, 1, 1]
    assert (second["stream"], second["shared"], second["attributes"]) == (77, 70_000, 1)


def test_nothing_is_launched_for_no_elements(driver: Driver) -> None:
    TritonBinary(b"code", **LAUNCH).run(tensor(1), tensor(2), 0, 3, 1, 0.5, stream=0)
    assert driver.launches == []


def test_kernel_without_overlap_has_no_attribute(driver: Driver) -> None:
    kernel = TritonBinary(b"code", **(LAUNCH | {"overlap": False, "shared_bytes": 0}))
    assert driver.loaded == [b"code", b"triton_add"]
    kernel.run(tensor(1), tensor(2), 8, 1, 1, 0.5, stream=0)
    assert driver.launches[0]["attributes"] == 0


def test_failed_launch_is_an_error(driver: Driver) -> None:
    kernel = TritonBinary(b"code", **LAUNCH)
    driver.status = 700
    with pytest.raises(CudaError, match="CUDA reports 700: out of luck"):
        kernel.run(tensor(1), tensor(2), 8, 1, 1, 0.5, stream=0)


def test_type_that_cannot_be_passed_is_refused(driver: Driver) -> None:
    with pytest.raises(KeyError, match="fp16"):
        TritonBinary(b"code", **(LAUNCH | {"parameters": [["x", "fp16"]]}))


def test_version_of_the_driver(driver: Driver) -> None:
    assert machine_code.driver_version() == 13000


# -- launches instead of Triton's launchers --------------------------------------------------------

SIGNATURE = {"x": "*bf16", "no": "constexpr", "out": "*bf16", "n": "i64", "eps": "fp32"}
SIGNATURE |= {"WIDTH": "constexpr"}
METADATA = {
    "num_ctas": 1,
    "num_warps": 8,
    "shared": 640,
    "launch_pdl": True,
    "global_scratch_size": 0,
    "profile_scratch_size": 0,
    "launch_cooperative_grid": False,
}


def launcher(**changes: object) -> DirectLauncher:
    metadata = SimpleNamespace(**(METADATA | changes))
    return DirectLauncher(SimpleNamespace(signature=SIGNATURE), metadata)


def test_direct_launch_takes_what_triton_gives_its_launchers(driver: Driver) -> None:
    others = (8, 1, 640), None, None, None
    arguments = tensor(4096), None, tensor(8192), 2**40, 0.5, 128
    launcher()(2, 3, 4, 77, 1234, *others, *arguments)
    (found,) = driver.launches
    assert found["values"] == [4096, 8192, 2**40, 0.5] and found["scratch"] == [None, None]
    assert found["grid"] == [2, 3, 4] and found["block"] == [256, 1, 1]
    assert (found["stream"], found["shared"], found["attributes"]) == (77, 640, 1)


@pytest.mark.parametrize(
    "changes", [{"num_ctas": 2}, {"global_scratch_size": 8}, {"launch_cooperative_grid": True}]
)
def test_kernels_that_need_more_keep_tritons_launcher(
    changes: dict[str, object], driver: Driver
) -> None:
    with pytest.raises(KeyError):
        launcher(**changes)
