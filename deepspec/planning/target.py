"""The target of a plan: of files here, of the hub, or of the shape that came with the recipes.

`recipes/targets/OWNER/NAME/config.json` holds those facts of a published target's config.json that
shapes, memory and work depend on, so that every shipped recipe can be planned without a network.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from deepspec.config.resources import resource
from deepspec.config.schema import TargetConfig
from deepspec.errors import TargetError, first_line
from deepspec.hub import look_at_hub
from deepspec.targets import Target, load_target
from deepspec.targets.checkpoint import (
    checked_path,
    explained,
    layers_of,
    load_tokenizer,
    meta_model,
)

CONFIG = "config.json"


def plan_target(config: TargetConfig) -> tuple[Target, str | None]:
    """The target of `config` on the meta device, and where its shape is from if that needs saying.

    A folder, the hub and the hub's cache come before the shipped shape. The target has no tokenizer
    (None) where only its config is here. Raises TargetError.
    """
    if Path(os.path.expanduser(checked_path(config))).is_dir():
        return load_target(config, "meta"), None
    shape, hub = shipped_shape(config), look_at_hub()
    if hub.answers:
        try:
            return load_target(config, "meta"), None
        except TargetError as error:
            if shape is None:
                raise
            reason = first_line(error.__cause__ or error)
            return _target_of(config, shape), f"shipped with the recipes: {hub.found}, but {reason}"
    if (cached := _cached(config)) is not None:
        return _target_of(config, cached), f"from the hub's cache: {hub.found}"
    if shape is not None:
        return _target_of(config, shape), f"shipped with the recipes: {hub.found}"
    raise TargetError(
        f"target.path={config.path} is no folder here and not in the hub's cache, and the hub is "
        f"not there: {hub.found}; give the folder of a checkpoint, or plan where the hub answers"
    )


def shipped_shape(config: TargetConfig) -> Path | None:
    """The folder of the shape shipped for `target.path`; it is that of the main revision alone."""
    folder = resource("recipes") / "targets" / config.path
    return folder if config.revision is None and (folder / CONFIG).is_file() else None


def _cached(config: TargetConfig) -> Path | None:
    """The snapshot of the hub's cache that has the target's config."""
    from huggingface_hub import try_to_load_from_cache

    with explained(config):
        found = try_to_load_from_cache(config.path, CONFIG, revision=config.revision)
    return Path(found).parent if isinstance(found, str) else None


def _target_of(config: TargetConfig, folder: Path) -> Target:
    """The target `config` names, by the config.json of `folder` and the tokenizer if it has one."""
    local = replace(config, path=str(folder), revision=None)
    try:
        tokenizer = load_tokenizer(local)
    except TargetError:
        tokenizer = None  # `read_workload` prints what it assumes instead
    return Target(
        meta_model(local),
        tokenizer,
        layers_of(config),
        config.path,
        rollback=config.rollback,
        context_length=config.context_length,
    )
