"""Where a training starts: anew, or from a checkpoint that fits."""

from __future__ import annotations

import shutil
from pathlib import Path

from deepspec.config.schema import RunConfig, as_dict, dotted
from deepspec.errors import CheckpointError, ConfigError
from deepspec.progress import say
from deepspec.training.checkpoint import (
    Checkpoint,
    check_files,
    list_checkpoints,
    read_checkpoint,
    step_folder,
)

# What the weights do not depend on, of the groups that they do depend on.
GROUPS = ("seed", "target", "data", "regenerate", "drafter", "objective", "training")
NEUTRAL = {
    "target.attention",
    "target.parallel",
    "target.max_memory",
    "target.offload_folder",
    "drafter.ngram_max",
    "drafter.ngram_min",
    "regenerate.batch_size",
    "regenerate.concurrency",
    "regenerate.retries",
    "regenerate.timeout",
    "objective.implementation",
    "objective.chunk_size",
    "objective.compile",
    "training.micro_batch_size",
    "training.compile",
    "training.activation_checkpointing",
    "training.evaluate_every",
    "training.save_every",
    "training.keep_last",
    "training.log_every",
    "training.resume",
}


def starting_point(config: RunConfig, checkpoints: Path) -> Checkpoint | None:
    """The checkpoint that `training.resume` asks for, or None to begin anew.

    `auto` goes on from the newest whose files are what was written, and only with the settings that
    it was trained with: another learning rate or other data would make a run that nobody asked for.
    Raises ConfigError naming the key that differs, CheckpointError where none is sound.
    """
    resume = config.training.resume
    if resume == "never":
        return None
    if resume != "auto":
        folder = Path(resume).expanduser()
        if not folder.is_dir():
            raise ConfigError(
                f"training.resume={resume} is neither auto, never, nor the folder of a checkpoint"
            )
        return read_checkpoint(folder)
    checkpoint = _newest_sound(checkpoints)
    if checkpoint is None:
        return None
    before, now = dotted(checkpoint.config), dotted(as_dict(config))
    for key, value in now.items():
        decisive = key.partition(".")[0] in GROUPS and key not in NEUTRAL
        if decisive and before.get(key) != value:
            raise ConfigError(
                f"{key}={value}, but {checkpoint.folder} was trained with {before.get(key)}; set "
                "out= to a new folder, training.resume=never to begin anew in this one, or "
                f"training.resume={checkpoint.folder} to go on with the new settings"
            )
    return checkpoint


def _newest_sound(checkpoints: Path) -> Checkpoint | None:
    """The newest whose files are what was written; what is wrong with newer ones is said.

    A disk may spoil a checkpoint, and a job that restarts by itself has to get past it.
    """
    problem = ""
    for folder in reversed(list_checkpoints(checkpoints)):
        try:
            checkpoint = read_checkpoint(folder)
            check_files(checkpoint)
            return checkpoint
        except CheckpointError as error:
            problem = str(error)
            say(f"passed over: {problem}")
    if problem:
        raise CheckpointError(
            f"no checkpoint in {checkpoints} is sound; the last problem: {problem}. "
            "training.resume=never begins anew"
        )
    return None


def set_aside_newer(checkpoints: Path, start: Checkpoint) -> None:
    """Rename what `auto` passed over, so that nothing takes it for the newest or the best."""
    for folder in list_checkpoints(checkpoints):
        if folder.name > step_folder(checkpoints, start.step).name:
            aside = folder.with_name(f"damaged-{folder.name}")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
