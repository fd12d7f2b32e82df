"""Copies arrays from the host to the device."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def to_device(values: np.ndarray, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """Copy an array to the device without waiting for the work queued there.

    The source is pinned, because a copy from pageable memory starts only after the queued work.
    """
    tensor = torch.from_numpy(values).to(dtype)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
