"""Features as plain tensors, for a file or the wire.

FP8 is E4M3 with a scale a token and layer: hidden states of different layers differ by orders of
magnitude, and a few tokens carry huge ones. Legend: T tokens, F of them with final states, L
captured layers, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepspec.records import TargetFeatures

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max
ALL_FLOAT8 = torch.arange(256, dtype=torch.uint8).view(FLOAT8).float()  # by their codes
DTYPES = {"bfloat16": torch.bfloat16, "float8": FLOAT8, "float32": torch.float32}


def resolve_dtype(wanted: str, target: torch.dtype) -> str:
    """`wanted` as a key of DTYPES; auto is what the target computes in."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    return names.get(target, "float32") if wanted == "auto" else wanted


def state_bytes(dtype: str, hidden_size: int) -> int:
    """Bytes of one hidden state: D numbers, in FP8 also their scale."""
    scale = torch.float32.itemsize if dtype == "float8" else 0
    return hidden_size * DTYPES[dtype].itemsize + scale


def token_bytes(dtype: str, layers: int, hidden_size: int) -> int:
    """Bytes of one token's features: L captured states and the final one."""
    return (layers + 1) * state_bytes(dtype, hidden_size)


def shapes(
    dtype: str, layers: int, hidden_size: int, tokens: int, finals: int
) -> dict[str, tuple[str, list[int]]]:
    """Number type, as safetensors calls it, and shape of each tensor that `encode` gives."""
    kind = {"bfloat16": "BF16", "float8": "F8_E4M3", "float32": "F32"}[dtype]
    found = {
        "context": (kind, [tokens, layers * hidden_size]),
        "final": (kind, [finals, hidden_size]),
    }
    if dtype == "float8":
        found |= {"context_scale": ("F32", [tokens, layers]), "final_scale": ("F32", [finals, 1])}
    return found


def encode(features: TargetFeatures, dtype: str, layers: int) -> dict[str, Tensor]:
    """`context` [T, L*D] and `final` [F, D] in `dtype`; with float8 `context_scale` [T, L] and
    `final_scale` [F, 1] fp32."""
    if dtype != "float8":
        kind = DTYPES[dtype]
        return {"context": features.context.to(kind), "final": features.final.to(kind)}
    context, context_scale = _scaled(features.context, layers)
    final, final_scale = _scaled(features.final, 1)
    return {
        "context": context,
        "context_scale": context_scale,
        "final": final,
        "final_scale": final_scale,
    }


def decode(tensors: dict[str, Tensor]) -> TargetFeatures:
    """What `encode` was given, rounded; of float8 in bfloat16."""
    if "context_scale" not in tensors:
        return TargetFeatures(tensors["context"], tensors["final"])
    return TargetFeatures(
        _unscaled(tensors["context"], tensors["context_scale"]),
        _unscaled(tensors["final"], tensors["final_scale"]),
    )


def _scaled(values: Tensor, layers: int) -> tuple[Tensor, Tensor]:
    parts = values.float().unflatten(-1, (layers, -1))
    scale = parts.abs().amax(-1, keepdim=True) / LARGEST
    scale = scale.clamp_min(torch.finfo(torch.float32).tiny)
    return (parts / scale).to(FLOAT8).flatten(-2), scale.squeeze(-1)


def _unscaled(values: Tensor, scale: Tensor) -> Tensor:
    parts = _float(values).unflatten(-1, (scale.shape[-1], -1))
    parts *= scale[..., None]
    return parts.flatten(-2).to(torch.bfloat16)


def _float(values: Tensor) -> Tensor:
    """`values.float()`; on processors, where torch converts float8 number by number, three times
    as fast (benchmarks/store.py)."""
    if values.device.type != "cpu":
        return values.float()
    codes = values.view(torch.uint8).flatten().int()
    return ALL_FLOAT8.index_select(0, codes).view(values.shape)
