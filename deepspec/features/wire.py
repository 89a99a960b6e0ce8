"""The bodies that cross the wire, checked before any of their numbers is used.

Both sides read what the other one sent as if it were hostile: a header of few bytes, the tensors
that were agreed on and no others, in their data types and shapes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from deepspec.features.encoding import DTYPES
from deepspec.records import Sample

IDENTITY = "x-target-weights"  # in every answer: a server may be started again with another model
ALL_WEIGHTS = "x-target-all-weights"  # the same of all values, where the server knows it
PATIENCE = "x-seconds-left"  # in every request: how long its client will wait for the answer
MAX_HEADER = 4096  # bytes of a safetensors header; ours are of a few hundred
INTEGERS = (torch.int32, torch.int64)
SHOWN = 60
Looks = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # data type and shape by name


class TooManyTokensError(ValueError):
    """A request that is well formed, and larger than the server computes at once."""


@dataclass(frozen=True)
class Wanted:
    """A request: the samples, and whether the final states of all their tokens are asked for."""

    samples: list[Sample]
    all_finals: bool


def headers_of(identity: dict[str, str]) -> list[tuple[str, str]]:
    """What answers of the server of this target carry."""
    known = {IDENTITY: identity["weights"], ALL_WEIGHTS: identity.get("all_weights", "")}
    return [(key, value) for key, value in known.items() if value]


def read_tensors(body: bytes) -> dict[str, Tensor]:
    """Return the tensors of a safetensors body. Raises ValueError for anything else."""
    length = int.from_bytes(body[:8], "little")
    if len(body) < 8 or length > MAX_HEADER:
        raise ValueError(f"no safetensors with a header of at most {MAX_HEADER} bytes")
    try:
        return load(body)
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"no safetensors that can be read: {error}") from None


def read_request(body: bytes, vocab_size: int, max_tokens: int) -> Wanted:
    """Return what `body` asks for.

    Raises ValueError for a request that is malformed, and TooManyTokensError for one that exceeds
    `max_tokens`, padding counted.
    """
    tensors = read_tensors(body)
    if not {"input_ids", "lengths"} <= set(tensors) <= {"input_ids", "lengths", "loss_mask"}:
        names = ", ".join(sorted(tensors))[:SHOWN]
        raise ValueError(f"found the tensors {names!a}, expected input_ids, lengths, loss_mask")
    ids = _vector(tensors, "input_ids", INTEGERS).long()
    sizes: list[int] = _vector(tensors, "lengths", INTEGERS).tolist()
    mask = torch.ones_like(ids, dtype=torch.bool)
    if "loss_mask" in tensors:
        mask = _vector(tensors, "loss_mask", (torch.bool,))
        if int(mask.view(torch.uint8).max()) > 1:
            raise ValueError("loss_mask has bytes other than 0 and 1")
    if min(sizes) < 1 or sum(sizes) != len(ids) or len(mask) != len(ids):
        raise ValueError("lengths do not add up to those of input_ids and loss_mask")
    if not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        raise ValueError(f"a token id is outside the vocabulary, 0 to {vocab_size - 1}")
    padded = max(sizes) * len(sizes)
    if padded > max_tokens:
        raise TooManyTokensError(f"{padded} tokens, padding counted, exceed serve.max_tokens")
    parts = zip(ids.split(sizes), mask.split(sizes), strict=True)
    samples = [Sample(own, its, str(index)) for index, (own, its) in enumerate(parts)]
    return Wanted(samples, "loss_mask" not in tensors)


def expected_answer(dtype: str, tokens: int, finals: int, layers: int, width: int) -> Looks:
    """Return data type and shape of every tensor of an answer, as `encoding.encode` gives them."""
    kind = DTYPES[dtype]
    expected: Looks = {
        "context": (kind, (tokens, layers * width)),
        "final": (kind, (finals, width)),
    }
    if dtype != "float8":
        return expected
    scales = {"context_scale": (tokens, layers), "final_scale": (finals, 1)}
    return expected | {name: (torch.float32, shape) for name, shape in scales.items()}


def largest_answer(expected: Looks) -> int:
    """Return the most bytes that an answer of the tensors `expected` can have."""
    sizes = (kind.itemsize * torch.Size(shape).numel() for kind, shape in expected.values())
    return 8 + MAX_HEADER + sum(sizes)


def read_answer(body: bytes, expected: Looks) -> dict[str, Tensor]:
    """Return the tensors of an answer. Raises ValueError where they are not as `expected`."""
    tensors = read_tensors(body)
    found: Looks = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    if found != expected:
        raise ValueError(f"found {_in_words(found)}, expected {_in_words(expected)}")
    return tensors


def _vector(tensors: Mapping[str, Tensor], name: str, kinds: Sequence[torch.dtype]) -> Tensor:
    tensor = tensors[name]
    if tensor.dtype not in kinds or tensor.dim() != 1 or not len(tensor):
        raise ValueError(
            f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}, expected one dimension of "
            f"{' or '.join(map(str, kinds))}, not empty"
        )
    return tensor


def _in_words(tensors: Looks) -> str:
    parts = [f"{name[:SHOWN]!a} {kind} {shape}" for name, (kind, shape) in sorted(tensors.items())]
    more = f" and {len(parts) - 4} more" if len(parts) > 4 else ""
    return ", ".join(parts[:4]).replace("torch.", "") + more
