"""Where a training starts: anew, or from a checkpoint that fits."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path

from deepspec.config.places import same_place
from deepspec.config.references import variables_of
from deepspec.config.schema import RunConfig, TrainingConfig, as_dict, dotted
from deepspec.errors import CheckpointError, ConfigError
from deepspec.progress import say
from deepspec.training.checkpoint import (
    Checkpoint,
    check_files,
    list_checkpoints,
    read_checkpoint,
)
from deepspec.training.decisive import changed, decides


def starting_point(config: RunConfig, checkpoints: Path) -> Checkpoint | None:
    """The checkpoint that `training.resume` asks for, or None to begin anew.

    `auto` goes on from the newest whose files are what was written, and only with the settings that
    it was trained with: another learning rate or other data would make a run that nobody asked for.
    A path begins there, unless that newest one is by the same command, which then goes on.
    Raises ConfigError naming the key that differs, CheckpointError where none is sound.
    """
    resume = config.training.resume
    if resume == "never":
        return None
    newest = next(_sound(checkpoints), None)
    different = {} if newest is None else changed(as_dict(config), newest.config)
    if (named := named_start(config.training)) is not None:
        if (
            newest is not None
            and not different
            and same_place(_resumed_by(newest), as_dict(config.training)["resume"])
        ):
            return newest
        if not named.is_dir():
            raise ConfigError(
                f"training.resume={resume} is neither auto, never, nor the folder of a checkpoint"
            )
        return read_checkpoint(named)
    if newest is None:
        if list_checkpoints(checkpoints):
            raise CheckpointError(
                f"no checkpoint in {checkpoints} is sound, as said above; training.resume=never "
                "begins anew"
            )
        return None
    if different:
        key, value = next(iter(different.items()))
        was = dotted(newest.config).get(key)
        raise ConfigError(
            f"{key}={value}, but {newest.folder} was trained with {was}; set "
            "out= to a new folder, training.resume=never to begin anew in this one, or "
            f"training.resume={newest.folder} to go on with the new settings"
        )
    return newest


def say_uncompared(config: RunConfig) -> None:
    """Name the settings that a resumed run may have otherwise than before, without being noticed:
    of those from the environment only the names are saved."""
    settings = dotted(as_dict(config)).items()
    found = [f"{key}={value}" for key, value in settings if decides(key) and variables_of(value)]
    if found:
        say(f"not compared with the checkpoint, because only the name is saved: {', '.join(found)}")


def named_start(config: TrainingConfig) -> Path | None:
    """The folder that `resume` names; None for `auto` and `never`."""
    return None if config.resume in ("auto", "never") else Path(config.resume).expanduser()


def _resumed_by(checkpoint: Checkpoint) -> str | None:
    return dotted(checkpoint.config).get("training.resume")


def _sound(checkpoints: Path) -> Iterator[Checkpoint]:
    """Those whose files are what was written, newest first; what is wrong with others is said.

    A disk may spoil a checkpoint, and a job that restarts by itself has to get past it.
    """
    for folder in reversed(list_checkpoints(checkpoints)):
        try:
            checkpoint = read_checkpoint(folder)
            check_files(checkpoint)
        except CheckpointError as error:
            say(f"passed over: {error}")
        else:
            yield checkpoint


def set_aside(checkpoints: Path, start: Checkpoint) -> None:
    """Move away what does not lead to `start`, so that nothing takes it for the newest or the best.

    Those are the newer ones, which are damaged or which a path went back behind, or all where
    `start` lies elsewhere.
    """
    others = list_checkpoints(checkpoints)
    places = [folder.resolve() for folder in others]
    if start.folder.resolve() in places:
        del others[: places.index(start.folder.resolve()) + 1]
    if not others:
        return
    aside = next(p for n in count(1) if not (p := checkpoints / f"aside-{n}").exists())
    aside.mkdir()
    for folder in others:
        folder.rename(aside / folder.name)
    say(f"set aside, in {aside}: {', '.join(folder.name for folder in others)}")
