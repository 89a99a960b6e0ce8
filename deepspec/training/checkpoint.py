"""Checkpoints: atomic, versioned, self-describing, free of any world size.

    checkpoints/step-00000400/
        drafter.safetensors     parameters, fp32, names of the flat layout; a draft vocabulary's d2t
        optimizer.safetensors   exp_avg/<name>, exp_avg_sq/<name>
        checkpoint.json         format, step, shape, target identity, config, sha256 of the files
        calibration.json        where deepspec calibrate was run; see scheduling.calibration_file

Written beside, synced, renamed: a half-written one never has a name that is looked at. Only
safetensors and JSON are read; no pickle.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from deepspec.atomic import atomic_folder, room, sha256
from deepspec.config.places import located, places_of
from deepspec.drafters.base import Drafter
from deepspec.drafters.registry import drafter_kind
from deepspec.errors import CheckpointError, TrainingError
from deepspec.json_files import as_kind, read_json
from deepspec.progress import say
from deepspec.targets.identity import differing
from deepspec.training.decisive import changed

FORMAT = 1
WEIGHTS, OPTIMIZER, DESCRIPTION = "drafter.safetensors", "optimizer.safetensors", "checkpoint.json"
NAME = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder's description: its `config` with paths that lead to where they led when
    it was saved; `metrics` of the validation at its step, where there was one; hashes of files."""

    folder: Path
    step: Annotated[int, Field(ge=0, lt=10**8)]
    kind: str
    shape: dict[str, Any]
    identity: dict[str, str]
    target: str
    config: dict[str, Any]
    metrics: dict[str, float]
    sha256: dict[str, str]

    @property
    def acceptance(self) -> float:
        """Expected accepted length on the validation samples, by which the best is kept; below all
        others where its step was not validated."""
        return self.metrics.get("validation_accept_length", float("-inf"))

    def check_target(self, identity: dict[str, str]) -> None:
        """Raises CheckpointError unless `identity` is the target this was trained for."""
        if different := differing(self.identity, identity):
            raise CheckpointError(
                f"{self.folder} was trained for another target than this one: the "
                f"{', '.join(different)} differ(s) (it was trained for {self.target}); set "
                "target.path to that target, or train a drafter for this one"
            )


def save_checkpoint(
    folder: Path,
    weights: dict[str, Tensor],
    optimizer: dict[str, Tensor],
    description: dict[str, Any],
) -> Path:
    """Write `folder`/step-N whole or not at all. `description` needs the fields of Checkpoint;
    with its config goes where the paths in it lead, to be found from other working folders.

    Raises TrainingError when it cannot be written (a full disk); older checkpoints stay as they
    are.
    """
    final = step_folder(folder, description["step"])
    try:
        with atomic_folder(final) as partial:
            save_file(weights, partial / WEIGHTS)
            if optimizer:
                save_file(optimizer, partial / OPTIMIZER)
            hashes = {file.name: sha256(file) for file in sorted(partial.iterdir())}
            own = {"format": FORMAT, "places": places_of(description["config"]), "sha256": hashes}
            text = json.dumps({**description, **own}, indent=2)
            (partial / DESCRIPTION).write_text(text + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        need = sum(tensor.nbytes for tensor in (*weights.values(), *optimizer.values()))
        raise TrainingError(
            f"could not save {final}: {error}{room(final, need)}; earlier checkpoints are "
            "untouched. Free disk space and start the same command again: it resumes from the last "
            "one"
        ) from error
    return final


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies among those of `folder`."""
    return folder / f"step-{step:08d}"


def read_checkpoint(folder: Path) -> Checkpoint:
    """The description in `folder`. Raises CheckpointError when it is not a checkpoint."""
    file, another = folder / DESCRIPTION, f"use another checkpoint of {folder.parent}"
    try:
        raw = read_json(file, CheckpointError, another)
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} holds no checkpoint ({DESCRIPTION} is missing); give a step-... folder"
        ) from None
    if raw.get("format") != FORMAT:
        raise CheckpointError(
            f"{file} has format {raw.get('format')!r:.40}, this version reads {FORMAT}; install "
            "the DeepSpec version that wrote it"
        )
    try:
        found = as_kind(Checkpoint, {**raw, "folder": folder})
        named = NAME.fullmatch(folder.name)
        if named and int(named[1]) != found.step:
            raise ValueError(f"step: found {found.step} in the folder of another step")
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged ({error}); {another}") from None
    if isinstance(places := raw.get("places"), dict):  # earlier versions kept none
        return replace(found, config=located(found.config, places))
    return found


def check_files(checkpoint: Checkpoint) -> None:
    """Raises CheckpointError for a missing, truncated or altered file."""
    for name in (WEIGHTS, OPTIMIZER):
        _checked(checkpoint, name)


def read_tensors(checkpoint: Checkpoint, name: str) -> dict[str, Tensor]:
    """Tensors of file `name`, checked against the recorded hash.

    Raises CheckpointError for a missing, truncated or altered file.
    """
    return load_file(_checked(checkpoint, name))


def read_vocabulary(checkpoint: Checkpoint) -> Tensor | None:
    """Ids [V_draft] of the tokens that its drafter drafts, None where these are all."""
    with safe_open(_checked(checkpoint, WEIGHTS), "pt") as opened:
        if "d2t" not in opened.keys():  # noqa: SIM118
            return None
        d2t: Tensor = opened.get_tensor("d2t")
    return d2t + torch.arange(len(d2t))


def _checked(checkpoint: Checkpoint, name: str) -> Path:
    file = checkpoint.folder / name
    recorded = checkpoint.sha256.get(name)
    if not file.is_file() or recorded is None:
        raise CheckpointError(f"{file} is missing; the checkpoint is incomplete")
    if sha256(file) != recorded:
        raise CheckpointError(
            f"{file} is corrupt: its sha256 is not the recorded one; use another checkpoint of "
            f"{checkpoint.folder.parent}"
        )
    return file


def load_drafter(checkpoint: Checkpoint) -> Drafter:
    """The trained drafter, fp32, in evaluation mode. Raises CheckpointError."""
    kind = drafter_kind(checkpoint.kind)
    try:
        shape = kind.load(checkpoint.shape)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.folder / DESCRIPTION}: {error}") from None
    with torch.device("meta"):  # takes no memory, whatever sizes a damaged description has
        expected = {name: tuple(t.shape) for name, t in kind.build(shape).state_dict().items()}
    found = _shapes(_checked(checkpoint, WEIGHTS))
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise CheckpointError(
                f"{checkpoint.folder / WEIGHTS} does not fit {DESCRIPTION}: {name} has shape "
                f"{found.get(name)}, expected {expected.get(name)}; use another checkpoint"
            )
    drafter = kind.build(shape)
    drafter.load_state_dict(read_tensors(checkpoint, WEIGHTS))
    return drafter.eval()


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(file, "pt") as opened:
        return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoint folders, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(entry for entry in folder.iterdir() if NAME.fullmatch(entry.name))


def best_checkpoint(folder: Path) -> Checkpoint:
    """The one with the largest validation acceptance; the newer of equals.

    Only of those with the newest's settings: under others, validation may have been of other
    samples. One that is unreadable is passed over. Raises CheckpointError where none is left.
    """
    found, problem = [], f"{folder} holds no checkpoint; train first"
    for entry in list_checkpoints(folder):
        try:
            found.append(read_checkpoint(entry))
        except CheckpointError as error:
            problem = str(error)
            say(f"passed over: {problem}")
    if not found:
        raise CheckpointError(problem)
    newest = found[-1].config
    alike = [checkpoint for checkpoint in found if not changed(newest, checkpoint.config)]
    return max(alike, key=lambda checkpoint: (checkpoint.acceptance, checkpoint.step))


def prune(folder: Path, keep_last: int, start: Path | None = None) -> None:
    """Remove all but the newest `keep_last`, the best and `start`, and what a killed process left.

    `start`: what `training.resume` names, of this folder or of another.
    """
    for remains in folder.glob(".step-*"):
        if remains.is_dir():  # no lock of a checkpoint that is being calibrated
            shutil.rmtree(remains)
    entries = list_checkpoints(folder)
    if entries:
        kept = {place.resolve() for place in (best_checkpoint(folder).folder, start) if place}
        for entry in entries[: -max(keep_last, 1)]:
            if entry.resolve() not in kept:
                # renamed first: a process killed half way leaves no checkpoint that lacks files
                shutil.rmtree(entry.rename(entry.with_name(f".{entry.name}.removed")))
