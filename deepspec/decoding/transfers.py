"""What crosses between host and device in a round: lists up without waiting, one answer down."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def upload(values: Any, device: torch.device) -> Tensor:
    """A tensor of `values` (lists of numbers, or a tensor on the host) on `device`.

    From pinned memory: an ordinary copy would wait for all that CUDA still has to compute.
    """
    tensor = torch.as_tensor(values)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def download(*parts: Tensor) -> list[list[list[float]]]:
    """Each of `parts` [B, *] as lists, all in one transfer: fp64 holds tokens and fp32 exactly."""
    rows = torch.cat([part.double() for part in parts], dim=1)
    widths = [part.shape[1] for part in parts]
    return [part.tolist() for part in rows.cpu().split(widths, dim=1)]


def integers(rows: Sequence[Sequence[float]]) -> list[list[int]]:
    """Downloaded integers as such."""
    return [[int(value) for value in row] for row in rows]
