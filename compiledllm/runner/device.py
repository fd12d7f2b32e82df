"""The way from the host to the device."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def to_device(values: np.ndarray, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """A copy on the device that does not wait for the work queued there.

    Pageable memory would: its copy starts only once the device has caught up.
    """
    tensor = torch.from_numpy(values).to(dtype)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
