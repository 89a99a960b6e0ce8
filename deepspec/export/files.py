"""An export's folder, whatever its layout: written whole or not at all, read with suspicion.

    out/
        model.safetensors   weights; above 5 GB, in files of that size with an index, as
                            Transformers cuts them
        config.json
        README.md           the model card

What only this library needs (whose target, which files) is under the one key `deepspec` of
config.json.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from deepspec.atomic import atomic_folder, room, sha256
from deepspec.errors import CheckpointError
from deepspec.model_files import read_model_config, read_weight_map
from deepspec.scheduling.calibration_file import NAME as CALIBRATION

WEIGHTS, INDEX, CONFIG, CARD = (
    "model.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "README.md",
)
AGAIN = "copy it again or export again"
SHARD_BYTES = 5 * 10**9  # what the hub's libraries cut at
_NAMES = "|".join(re.escape(name) for name in (WEIGHTS, INDEX, CONFIG, CARD, CALIBRATION))
OWN_FILES = re.compile(rf"{_NAMES}|model-\d+-of-\d+\.safetensors")


class TensorInfo(NamedTuple):
    """A tensor as a safetensors header names it: dtype such as BF16, and shape."""

    dtype: str
    shape: tuple[int, ...]


Headers = dict[str, TensorInfo]


def write_folder(out: Path, config: dict[str, Any], tensors: dict[str, Tensor], card: str) -> None:
    """Write or replace the export `out`; the hash of each file of weights is put into `config`.

    Raises CheckpointError when `out` holds anything but an export of ours, or cannot be written.
    """
    require_replaceable(out)
    try:
        with atomic_folder(out) as folder:
            files = _write_weights(folder, tensors)
            config["deepspec"]["sha256"] = {file.name: sha256(file) for file in files}
            (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            (folder / CARD).write_text(card, encoding="utf-8")
    except (OSError, SafetensorError) as error:
        need = sum(tensor.nbytes for tensor in tensors.values())
        raise CheckpointError(
            f"could not write the export {out}: {error}{room(out, need)}; free disk space or "
            "export to another folder. What was there is untouched"
        ) from error


def _write_weights(folder: Path, tensors: dict[str, Tensor]) -> list[Path]:
    """The files, sorted; an index beside them where there are several."""
    parts = split_torch_state_dict_into_shards(tensors, max_shard_size=SHARD_BYTES)
    for file, names in parts.filename_to_tensors.items():
        part = {name: tensors[name] for name in names}
        save_file(part, folder / file, metadata={"format": "pt"})
    if parts.is_sharded:
        index = {"metadata": parts.metadata, "weight_map": parts.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return sorted(folder / file for file in parts.filename_to_tensors)


def as_saved(tensor: Tensor) -> Tensor:
    """As the layouts want it: bf16, integers and booleans as they are, in storage of its own."""
    dtype = torch.bfloat16 if tensor.is_floating_point() else tensor.dtype
    # a copy: tied weights share storage, which safetensors refuses
    return tensor.detach().to("cpu", dtype, copy=True).contiguous()


def headers_of(tensors: dict[str, Tensor]) -> Headers:
    """What the header of a file of `tensors` will say."""
    names = {torch.bfloat16: "BF16", torch.float32: "F32", torch.int64: "I64", torch.bool: "BOOL"}
    return {name: TensorInfo(names[t.dtype], tuple(t.shape)) for name, t in tensors.items()}


def require_replaceable(out: Path) -> None:
    """Raises CheckpointError where `out` holds anything but an earlier export of ours."""
    if not out.exists():
        return
    found = sorted(entry.name for entry in out.iterdir()) if out.is_dir() else [out.name]
    foreign = [name for name in found if not OWN_FILES.fullmatch(name)]
    if foreign or (found and not _is_ours(out)):
        raise CheckpointError(
            f"{out} is not just an earlier export (it holds {', '.join((foreign or found)[:3])}) "
            "and is not overwritten; choose another folder, or move its files away"
        )


def _is_ours(folder: Path) -> bool:
    """Whether it was written here: others may hold the same files, and a whole target."""
    try:
        return bool(deepspec_of(read_config(folder)))
    except CheckpointError:
        return False


def read_config(folder: Path) -> dict[str, Any]:
    """config.json. Raises CheckpointError where it is missing or no JSON object."""
    try:
        return read_model_config(folder / CONFIG, CheckpointError, AGAIN, finite=True)
    except FileNotFoundError:
        raise CheckpointError(f"{folder} holds no export ({CONFIG} is missing)") from None


def read_headers(folder: Path) -> Headers:
    """Names, dtypes and shapes of all tensors, without their values.

    Raises CheckpointError for files that are missing or whose length is not what they say.
    """
    found: Headers = {}
    for file in _weight_files(folder):
        try:
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    values = opened.get_slice(name)
                    found[name] = TensorInfo(values.get_dtype(), tuple(values.get_shape()))
        except (SafetensorError, OSError) as error:
            raise _broken(file, str(error)) from None
    return found


def check_hash(folder: Path, config: dict[str, Any]) -> None:
    """Raises CheckpointError where the weights are not those that the export recorded."""
    recorded = deepspec_of(config).get("sha256")
    for name, digest in recorded.items() if isinstance(recorded, dict) else ():
        file = folder / Path(str(name)).name
        if file.is_file() and sha256(file) != digest:
            raise _broken(file, f"its sha256 is not the one in {CONFIG}")


def read_weights(folder: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    """All tensors. Raises CheckpointError for files that are missing, corrupt or incomplete."""
    files = _weight_files(folder)
    check_hash(folder, config)
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            tensors |= load_file(file)
        except (SafetensorError, OSError, LookupError) as error:  # the last: a type of no torch
            raise _broken(file, str(error)) from None
    return tensors


def read_tensor(folder: Path, name: str) -> Tensor:
    """One tensor of a folder whose headers were read."""
    for file in _weight_files(folder):
        with safe_open(file, "pt") as opened:
            if name in opened.keys():  # noqa: SIM118
                return opened.get_tensor(name)
    raise KeyError(name)


def deepspec_of(config: dict[str, Any]) -> dict[str, Any]:
    """What this library wrote into config.json for itself; empty in the exports of others."""
    own = config.get("deepspec")
    return own if isinstance(own, dict) else {}


def identity_in(config: dict[str, Any]) -> dict[str, str]:
    """Of the target, where this library wrote the export."""
    found = deepspec_of(config).get("identity")
    return found if isinstance(found, dict) else {}


def weight_map(folder: Path) -> dict[str, str] | None:
    """The file of every tensor, where there are several files. Raises CheckpointError."""
    try:
        return read_weight_map(folder / INDEX, CheckpointError, AGAIN)
    except FileNotFoundError:
        return None


def _weight_files(folder: Path) -> list[Path]:
    several = weight_map(folder)
    names = [WEIGHTS] if several is None else sorted(set(several.values()))
    files = [folder / name for name in names]
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file} is missing; the export is incomplete")
    return files


def _broken(file: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{file} is corrupt or incomplete: {why}; {AGAIN}")
