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
    filled = [part.double() for part in parts if part.shape[1]]  # plain rounds have no drafts
    rows = (torch.cat(filled, dim=1) if len(filled) > 1 else filled[0]).cpu()
    found = iter(rows.split([part.shape[1] for part in filled], dim=1))
    return [next(found).tolist() if part.shape[1] else [[]] * len(part) for part in parts]


def integers(rows: Sequence[Sequence[float]]) -> list[list[int]]:
    """Downloaded integers as such."""
    return [[int(value) for value in row] for row in rows]
