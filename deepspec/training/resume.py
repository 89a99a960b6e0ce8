"""Where a training starts: anew, or from a checkpoint that fits."""

from __future__ import annotations

from pathlib import Path

from deepspec.config.schema import RunConfig, as_dict, dotted
from deepspec.errors import ConfigError
from deepspec.training.checkpoint import Checkpoint, list_checkpoints, read_checkpoint

# What the weights do not depend on, of the groups that they do depend on.
GROUPS = ("seed", "target", "data", "regenerate", "drafter", "objective", "training")
NEUTRAL = {
    "target.attention",
    "regenerate.batch_size",
    "regenerate.concurrency",
    "regenerate.retries",
    "regenerate.timeout",
    "objective.implementation",
    "objective.chunk_size",
    "training.micro_batch_size",
    "training.evaluate_every",
    "training.save_every",
    "training.keep_last",
    "training.log_every",
    "training.resume",
}


def starting_point(config: RunConfig, checkpoints: Path) -> Checkpoint | None:
    """The checkpoint that `training.resume` asks for, or None to begin anew.

    `auto` goes on only with the settings that the checkpoint was trained with: another learning
    rate or other data would make a run that nobody asked for. Raises ConfigError naming the key
    that differs.
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
    found = list_checkpoints(checkpoints)
    if not found:
        return None
    checkpoint = read_checkpoint(found[-1])
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
