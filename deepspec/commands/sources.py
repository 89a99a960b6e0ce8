"""Where a drafter comes from: a run, one of its checkpoints, an export, or nowhere: untrained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deepspec.config.loading import config_from, load_config
from deepspec.config.references import for_saving
from deepspec.config.schema import RunConfig
from deepspec.drafters.base import Drafter
from deepspec.drafters.registry import drafter_kind
from deepspec.errors import CheckpointError, ConfigError
from deepspec.export import is_export, num_anchors, open_export
from deepspec.targets import TargetEnds
from deepspec.training.checkpoint import (
    DESCRIPTION,
    Checkpoint,
    best_checkpoint,
    load_drafter,
    read_checkpoint,
)
from deepspec.training.metrics import read_metrics
from deepspec.training.run_folder import RunFolder


@dataclass(frozen=True)
class Source:
    """A drafter on disk: the config it was trained with, and `load`, which checks its target.

    `place` is None where nothing was trained. `step`: optimizer steps, None where unknown. `run`:
    its run folder, where that is at hand.
    """

    place: Path | None
    config: RunConfig
    kind: str
    step: int | None
    load: Callable[[TargetEnds], Drafter]
    run: RunFolder | None

    def training(self) -> list[dict[str, Any]]:
        """The run's metrics up to this step."""
        rows = read_metrics(self.run.metrics) if self.run else []
        return [row for row in rows if self.step is None or row["step"] <= self.step]

    def skipped(self) -> dict[str, dict[str, int]]:
        """Rows that the run left out, by stage and reason."""
        return self.run.read_skipped() if self.run else {}


def open_source(place: Path, overrides: Sequence[str] = (), recipe: str | None = None) -> Source:
    """The drafter at `place`; `overrides` change the config it was saved with.

    An export carries no run's config: `recipe` gives one, else the defaults hold. Raises
    CheckpointError when nothing usable is there, ConfigError for bad overrides.
    """
    place = place.expanduser()
    if is_export(place):
        return _from_export(place, overrides, recipe)
    if recipe is not None:
        raise ConfigError(
            f"recipe={recipe} goes with an export only; {place} brings the config it was trained "
            "with (change it by key=value)"
        )
    if (place / DESCRIPTION).is_file():
        return from_checkpoint(read_checkpoint(place), overrides)
    if (place / "checkpoints").is_dir():
        return from_checkpoint(best_checkpoint(place / "checkpoints"), overrides)
    raise CheckpointError(
        f"{place} is neither a run, a checkpoint nor an export; give the out= of a training, one "
        "of its checkpoints/step-... folders, or an exported drafter"
        if place.is_dir()
        else f"{place} is a file, not a folder"
        if place.exists()
        else f"{place} does not exist"
    )


def _from_export(place: Path, overrides: Sequence[str], recipe: str | None) -> Source:
    export = open_export(place)
    if recipe is not None:
        config = load_config(recipe, overrides)
    else:
        target = export.target
        if "/" not in target and not any(word.startswith("target.path=") for word in overrides):
            whose = (
                f"was made for a local target, {target}" if target else "does not say its target"
            )
            raise ConfigError(f"{place} {whose}; say where it is by target.path=DIR or by recipe=R")
        asked = {"path": target, "layer_ids": list(export.shape.target_layer_ids)}
        raw = {"recipe": place.name, "target": asked, "data": {"path": []}}
        config = config_from(for_saving(raw), overrides)  # a file of others reads no variable
    if (anchors := num_anchors(export.config)) is not None:  # a fact, whatever the recipe says
        training = replace(config.training, anchors_per_sample=anchors)
        config = replace(config, training=training)
    return Source(
        place=place, config=config, kind=export.kind, step=None, load=export.load, run=None
    )


def untrained(config: RunConfig) -> Source:
    """A drafter that needs no training, by `config` alone. Raises ConfigError for another one."""
    name, kind = config.drafter.kind, drafter_kind(config.drafter.kind)
    if kind.trained:
        raise ConfigError(
            f"recipe={config.recipe} has drafter.kind={name}, which has to be trained first; give "
            "one of run=DIR and checkpoint=DIR, or set drafter.kind=ngram"
        )
    return Source(
        place=None,
        config=config,
        kind=name,
        step=None,
        load=lambda target: kind.build(kind.resolve(config.drafter, target)),
        run=None,
    )


def from_checkpoint(checkpoint: Checkpoint, overrides: Sequence[str] = ()) -> Source:
    """A checkpoint as a source; its run folder is the one around it."""

    def load(target: TargetEnds) -> Drafter:
        checkpoint.check_target(target.identity)
        read = list(checkpoint.shape["target_layer_ids"])
        if read != list(target.layer_ids):
            raise ConfigError(
                f"target.layer_ids={list(target.layer_ids)}, but the drafter in "
                f"{checkpoint.folder} was trained to read {read}; take the override back"
            )
        return load_drafter(checkpoint)

    try:
        config_from(checkpoint.config)
    except ConfigError as error:
        raise CheckpointError(
            f"the config saved in {checkpoint.folder / DESCRIPTION} does not fit this version of "
            f"DeepSpec: {error}"
        ) from None
    run = checkpoint.folder.resolve().parent.parent  # of a folder below / that is / itself
    return Source(
        place=checkpoint.folder,
        config=config_from(checkpoint.config, overrides),
        kind=checkpoint.kind,
        step=checkpoint.step,
        load=load,
        run=RunFolder(run) if (run / "config.yaml").is_file() else None,
    )
