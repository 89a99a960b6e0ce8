"""Weights in 8 and 4 bits with a scale a block, as DeepSeek V4's checkpoints have them.

FP8 (E4M3): a scale for every 128 x 128 block. FP4 (E2M1): two numbers a byte, the lower half first,
and a scale for every 32 numbers of a row. Scales are powers of two (UE8M0). All of it is exact in
fp32, and in bf16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepspec.errors import CheckpointError

PLAIN = (torch.bfloat16, torch.float16, torch.float32)
FP8 = torch.float8_e4m3fn
FP4 = (torch.int8, torch.uint8, torch.float4_e2m1fn_x2)
FP8_BLOCK, FP4_BLOCK = (128, 128), (1, 32)
_HALF = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1 = torch.tensor([*_HALF, *(-value for value in _HALF)])  # by its four bits


def dequantised(name: str, stored: Tensor, scale: Tensor | None) -> Tensor:
    """The tensor `name` in fp32; `scale`: the one stored beside it, None where there is none.

    Raises CheckpointError for another dtype, and for scales that are missing or of another shape.
    """
    if stored.dtype in PLAIN and scale is None:
        return stored.float()
    if stored.dtype == FP8:
        values, block = stored.float(), FP8_BLOCK
    elif stored.dtype in FP4:
        values, block = _unpacked(stored), FP4_BLOCK
    else:
        extra = "" if scale is None else " with a scale"
        raise CheckpointError(
            f"{name} is {stored.dtype}{extra}; weights are read as bf16, fp16 or fp32 without "
            "scales, as FP8 (float8_e4m3fn) or as packed FP4 (int8) with them"
        )
    if scale is None:
        raise CheckpointError(f"{name} is {stored.dtype}, but there are no scales beside it")
    return values * _spread(name, scale, values.shape, block)


def _unpacked(packed: Tensor) -> Tensor:
    """[.., I/2] bytes -> [.., I] fp32."""
    bits = packed.view(torch.uint8)
    return E2M1[torch.stack((bits & 15, bits >> 4), dim=-1).flatten(-2).long()]


def _spread(name: str, scale: Tensor, shape: torch.Size, block: tuple[int, int]) -> Tensor:
    """Each scale over its block [O, I]; blocks at the end may be smaller."""
    expected = [-(-size // step) for size, step in zip(shape, block, strict=True)]
    if list(scale.shape) != expected:
        raise CheckpointError(
            f"{name} is {list(shape)}, but its scales are {list(scale.shape)}, expected "
            f"{expected}: one for every block of {block[0]} x {block[1]}"
        )
    if scale.dtype == torch.uint8:  # UE8M0 by its bits
        scale = scale.view(torch.float8_e8m0fnu)
    rows, columns = block
    spread = scale.float().repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    return spread[: shape[0], : shape[1]]
