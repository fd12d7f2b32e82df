"""Makes the CUDA context in a thread while torch is being imported, since both take long.

The context is the device's primary context, which torch uses as well. Without a driver, or if the
device does not exist, nothing happens here, and torch reports the error later.
"""

from __future__ import annotations

import ctypes
import threading


def make_in_thread(device: object) -> None:
    """Start the thread, unless the engine runs on a CPU.

    device: the engine's option, such as "auto", "cpu" or "cuda:1".
    """
    kind, _, number = str(device).partition(":")
    if kind in ("auto", "cuda") and (number or "0").isdecimal():
        threading.Thread(target=_make, args=(int(number or 0),), daemon=True).start()


def _make(number: int) -> None:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return
    device, context = ctypes.c_int(), ctypes.c_void_p()
    if driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(device), number) == 0:
        driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
