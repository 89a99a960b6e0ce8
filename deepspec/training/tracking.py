"""Trackers besides metrics.jsonl, through Accelerate: wandb and tensorboard."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from deepspec.config.schema import TrackingConfig, dotted
from deepspec.errors import MissingDependencyError
from deepspec.secrets import mask_streams, masked


def check_trackers(config: TrackingConfig) -> None:
    """Raises MissingDependencyError for a tracker whose package is not installed."""
    for name in config.trackers:
        if importlib.util.find_spec(name) is None:
            raise MissingDependencyError(
                f"tracking.trackers names {name}, which is not installed; run: "
                f"pip install 'deepspec[{name}]', or take it off the list"
            )


def start_trackers(
    accelerator: Accelerator, config: TrackingConfig, settings: Mapping[str, Any], folder: Path
) -> None:
    """Open a run in every tracker. wandb writes below `folder` and, offline, needs no network."""
    if config.trackers:
        options = {"wandb": {"mode": config.wandb_mode, "dir": str(folder), "name": folder.name}}
        # tensorboard takes scalars only
        scalars = {
            key: value if isinstance(value, str | int | float | bool) else str(value)
            for key, value in dotted(settings).items()
        }
        sys.argv[1:] = [masked(word) for word in sys.argv[1:]]  # wandb keeps the command,
        accelerator.init_trackers(config.project, scalars, options)
        mask_streams()  # and what is printed
