"""Makes CUDA's context in a thread while torch is being imported, as either takes a while.

Torch takes over the context, which is the device's primary one. Without a driver or with a device
that does not exist nothing happens here; torch says later what is wrong.
"""

from __future__ import annotations

import ctypes
import threading


def make_in_thread(device: object) -> None:
    """device: the engine's option, such as "auto", "cpu" or "cuda:1"."""
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
