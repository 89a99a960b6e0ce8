"""A checkpoint's safetensors, read one tensor at a time: never a whole target for two of them.

A hub name stands for its files in the hub's cache; what is not there is fetched file by file.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from deepspec.config.schema import TargetConfig
from deepspec.errors import TargetError
from deepspec.json_files import parse_json
from deepspec.model_files import read_weight_map
from deepspec.targets.hashes import HashedFiles, Span, Spans

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
SAMPLED_ROWS, SAMPLED_COLUMNS = 4, 64


class WeightFiles(HashedFiles):
    """Tensors of the checkpoint at `target.path`, by the names they have in its files.

    Raises TargetError where there are no safetensors.
    """

    def __init__(self, config: TargetConfig) -> None:
        self._path, self._revision = os.path.expanduser(config.path), config.revision
        index = self._find(INDEX)
        if index is not None:
            self._files = read_weight_map(index, TargetError, "fetch it again")
            return
        single = self._find(SINGLE)
        if single is None:
            raise TargetError(
                f"target.path={config.path} has neither {SINGLE} nor {INDEX}; save the model with "
                "safe_serialization=True, or give a GGUF file (no other format is read)"
            )
        with safe_open(single, "pt") as opened:
            self._files = dict.fromkeys(opened.keys(), SINGLE)

    def names(self) -> set[str]:
        """All tensors."""
        return set(self._files)

    def read(self, name: str) -> Tensor:
        """The tensor `name`, on the CPU."""
        with safe_open(self._local(self._files[name]), "pt") as opened:
            return opened.get_tensor(name)

    def fingerprint(self) -> str:
        """A hash of names, shapes and a few values of every tensor; reads some pages of each. All
        that older versions recorded of a target's weights."""
        digest = hashlib.sha256()
        for name, values in sorted(self._slices(), key=lambda pair: pair[0]):
            update_digest(digest, name, list(values.get_shape()), values)
        return digest.hexdigest()[:32]

    def spans(self, names: Collection[str] | None = None) -> Iterator[Spans]:
        """See `HashedFiles.spans`. Every tensor of a file counts, also one the index leaves out."""
        wanted = self._files if names is None else {name: self._files[name] for name in names}
        for file in sorted(set(wanted.values())):
            path = self._local(file)
            try:
                with safe_open(path, "pt"), path.open("rb") as stream:  # safe_open checks offsets
                    size = int.from_bytes(stream.read(8), "little")
                    header = parse_json(stream.read(size))
            except (SafetensorError, OSError, ValueError) as error:
                raise TargetError(f"{path} is damaged ({error}); fetch it again") from None
            header.pop("__metadata__", None)
            yield path, {name: _span(own, 8 + size) for name, own in header.items()}

    def _slices(self) -> Iterator[tuple[str, Any]]:
        for file in sorted(set(self._files.values())):
            with safe_open(self._local(file), "pt") as opened:
                yield from ((name, opened.get_slice(name)) for name in opened.keys())  # noqa: SIM118

    def _local(self, file: str) -> Path:
        found = self._find(file)
        if found is None:
            raise TargetError(f"target.path={self._path}: {file} is missing; fetch it again")
        return found

    def _find(self, file: str) -> Path | None:
        from transformers.utils import cached_file

        found = cached_file(
            self._path,
            file,
            revision=self._revision,
            _raise_exceptions_for_missing_entries=False,
        )
        return None if found is None else Path(found)


def _span(entry: dict[str, Any], data: int) -> Span:
    """A tensor's entry in the header of a file with values from byte `data` on."""
    start, stop = entry["data_offsets"]
    return Span(entry["dtype"], entry["shape"], data + start, stop - start)


def update_digest(digest: Any, name: str, shape: list[int], values: Any) -> None:
    """Take a few values of evenly spaced rows of a tensor into `digest`.

    `values`: a tensor, or a safetensors slice of one. A fine-tune changes nearly every value of
    what it trains, so few tell two apart.
    """
    digest.update(f"{name}{tuple(shape)}".encode())
    rows = shape[0] if shape else 0
    for index in range(SAMPLED_ROWS if rows else 0):
        first = index * (rows - 1) // (SAMPLED_ROWS - 1)
        last = first + (SAMPLED_COLUMNS if len(shape) == 1 else 1)
        sample = values[first:last].flatten()[:SAMPLED_COLUMNS]
        if sample.is_floating_point():
            sample = sample.to(torch.bfloat16)  # loaded in fp32 or bf16, it is the same target
        digest.update(sample.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes())
