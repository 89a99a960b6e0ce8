"""The drafter that a training begins with: a new one, or the one at `drafter.init_from`.

That one gives shape and weights: an export (of any layout), a checkpoint or a run of ours, in
a folder or, as owner/name[@revision], on the hub.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import httpx
import torch
from torch import Tensor

from deepspec.config.places import same_place
from deepspec.config.schema import DrafterConfig, RunConfig, as_dict
from deepspec.data.vocabulary import count_tokens, coverage, frequent_tokens
from deepspec.drafters.base import Drafter
from deepspec.drafters.dspark_v4.config import FIXED as V4_FIXED
from deepspec.drafters.mask_token import mask_token_for, mask_token_of
from deepspec.drafters.registry import drafter_kind
from deepspec.errors import CheckpointError, ConfigError, first_line
from deepspec.export import is_export, open_export, weights_to_fetch
from deepspec.export.names import HUB_NAME
from deepspec.export.tensors import misfits_of_target
from deepspec.progress import say
from deepspec.records import Sample
from deepspec.targets import TargetEnds
from deepspec.targets.identity import Identity, differing
from deepspec.training.checkpoint import (
    DESCRIPTION,
    Checkpoint,
    best_checkpoint,
    list_checkpoints,
    load_drafter,
    read_checkpoint,
    read_vocabulary,
)

# keys of DrafterConfig that another training may choose anew
FREE = ("init_from", "confidence_detached")
# what a training chose when it began, from its data or by the rules of its version
CHOSEN = ("mask_token_id", "rope_parameters")
# parts of a target's identity that a fine-tune does not change
FIRM = ("architecture", "tokenizer")


@dataclass(frozen=True)
class Origin:
    """A drafter on disk to begin with: its kind and shape, and the `identity` of its target, empty
    where nothing says it."""

    name: str
    drafter: tuple[str, Any]
    identity: Identity
    load: Callable[[], Drafter]


def open_origin(name: str) -> Origin:
    """What is at `name`, a folder or owner/name[@revision] on the hub, without its weights.

    Raises ConfigError where it is neither, CheckpointError where nothing usable is there.
    """
    place = _local(name)
    if is_export(place):
        export = open_export(place)
        return Origin(name, (export.kind, export.shape), export.identity, export.load)
    if (place / DESCRIPTION).is_file():
        checkpoint = read_checkpoint(place)
    elif (place / "checkpoints").is_dir():
        checkpoint = best_checkpoint(place / "checkpoints")
    else:
        raise CheckpointError(
            f"drafter.init_from={name} is neither an exported drafter nor a checkpoint or a run of "
            "this library"
        )
    return Origin(
        name, _drafter_of(checkpoint), checkpoint.identity, lambda: load_drafter(checkpoint)
    )


def _drafter_of(checkpoint: Checkpoint) -> tuple[str, Any]:
    return checkpoint.kind, drafter_kind(checkpoint.kind).load(checkpoint.shape)


def _local(name: str) -> Path:
    """The folder that `name` stands for; of the hub, config and drafter are fetched."""
    place = Path(name).expanduser()
    if place.exists():
        return place
    repository, _, revision = name.partition("@")
    if name.startswith((".", "/", "~")) or not HUB_NAME.fullmatch(repository):
        raise ConfigError(
            f"drafter.init_from={name}: no such folder, and no owner/name[@revision] on the hub"
        )
    from huggingface_hub import snapshot_download

    try:
        place = Path(
            snapshot_download(repository, revision=revision or None, allow_patterns="*.json")
        )
        weights = weights_to_fetch(place)
        snapshot_download(repository, revision=place.name, allow_patterns=weights)  # that commit
    except (OSError, ValueError, httpx.HTTPError) as error:
        raise CheckpointError(
            f"drafter.init_from={name} could not be fetched from the hub ({type(error).__name__}: "
            f"{first_line(error)}); check its name and revision, the network, and HF_TOKEN if it "
            "is private"
        ) from None
    return place


# ------------------------------------------------------------------------------------ the config


def adopt_origin(config: RunConfig, given: Collection[str], checkpoints: Path) -> RunConfig:
    """`config` with the shape of `drafter.init_from`, which is what will be trained.

    `given`: keys on the command line. A key that says otherwise, there or in the recipe, is a
    ConfigError that names it. Of a run that goes on, its `checkpoints` tell the shape: the place
    that it once began from may be gone.
    """
    name = config.drafter.init_from
    if name is None:
        return config
    kind, shape = _known(config, checkpoints) or open_origin(name).drafter
    changes: dict[str, Any] = {}
    defaults = DrafterConfig()
    for key in (field.name for field in fields(DrafterConfig)):
        fixed = kind == "dspark_v4" and key in V4_FIXED  # by its format: not to be set
        if key in FREE or fixed or not (key == "kind" or hasattr(shape, key)):
            continue
        its = kind if key == "kind" else getattr(shape, key)
        wished = getattr(config.drafter, key)
        chosen = f"drafter.{key}" in given or wished != getattr(defaults, key)
        if chosen and wished is not None and wished != its:
            raise ConfigError(
                f"drafter.{key}={wished}, but drafter.init_from={name} has {its}; leave it out, or "
                "set it to that"
            )
        changes[key] = its
    layers, its_layers = config.target.layer_ids, list(shape.target_layer_ids)
    if layers is not None and list(layers) != its_layers:
        raise ConfigError(
            f"target.layer_ids={list(layers)}, but drafter.init_from={name} reads {its_layers}; "
            "leave it out, or set it to that"
        )
    return replace(
        config,
        drafter=replace(config.drafter, **changes),
        target=replace(config.target, layer_ids=its_layers),
    )


def _known(config: RunConfig, checkpoints: Path) -> tuple[str, Any] | None:
    """Kind and shape as the newest checkpoint of a run with this `init_from` has them."""
    for folder in reversed(list_checkpoints(checkpoints)):
        try:
            checkpoint = read_checkpoint(folder)
        except CheckpointError:
            continue  # `starting_point` says what is wrong with it
        began = checkpoint.config.get("drafter", {}).get("init_from")
        if same_place(began, as_dict(config.drafter)["init_from"]):
            return _drafter_of(checkpoint)
    return None


# ----------------------------------------------------------------------------------- the drafter


def first_drafter(
    config: RunConfig, target: TargetEnds, samples: Sequence[Sample], start: Checkpoint | None
) -> Drafter:
    """The drafter to train; one that goes on from `start` gets its weights from there later.

    Raises CheckpointError where the one at `drafter.init_from` is for another target.
    """
    kind, origin = drafter_kind(config.drafter.kind), config.drafter.init_from
    torch.manual_seed(config.seed)
    if origin is not None and start is None:
        return _continued(open_origin(origin), config, target, samples)
    shape = kind.resolve(config.drafter, target)
    if origin is not None and start is not None:
        shape = kind.load(start.shape)  # not all of it is in the config
    elif start is not None:
        free = {key for key in CHOSEN if getattr(config.drafter, key, None) is None}
        both = free & start.shape.keys() & shape.to_dict().keys()
        shape = replace(shape, **{key: start.shape[key] for key in both})
    elif hasattr(shape, "mask_token_id") and config.drafter.mask_token_id is None:
        shape = replace(shape, mask_token_id=_mask_token(target, samples))
    size = getattr(shape, "draft_vocab_size", None)
    if size is None:
        return kind.build(shape)
    ids, covered = _vocabulary(size, config, target, samples, start)
    drafter = kind.build(replace(shape, draft_vocab_coverage=covered))
    drafter.restrict(ids)
    return drafter


def _mask_token(target: TargetEnds, samples: Sequence[Sample]) -> int:
    """The one for `target` and `samples`; printed where it is one of the target's tokens."""
    chosen = mask_token_for(target, samples)
    if mask_token_of(target) is None:
        name = target.tokenizer.convert_ids_to_tokens(chosen)
        say(
            f"mask token: {name} (id {chosen}), a special token that neither the chat template nor "
            "the data uses"
        )
    return chosen


def _vocabulary(
    size: int,
    config: RunConfig,
    target: TargetEnds,
    samples: Sequence[Sample],
    start: Checkpoint | None,
) -> tuple[Tensor, float | None]:
    """The tokens to draft and the share of the answers that they cover: those of `start`, which
    were fixed when the training began, else counted."""
    ids = None if start is None else read_vocabulary(start)
    if start is not None and ids is not None and len(ids) == size:
        return ids, start.shape["draft_vocab_coverage"]
    counts = count_tokens(samples, target.vocab_size)
    ids = frequent_tokens(
        counts, size, [*target.stop_token_ids, *(config.decoding.stop_token_ids or [])]
    )
    covered = coverage(counts, ids)
    say(f"draft vocabulary: {size} tokens, {covered:.1%} of those in the training answers")
    return ids, covered


def _continued(
    origin: Origin, config: RunConfig, target: TargetEnds, samples: Sequence[Sample]
) -> Drafter:
    recorded = {key: value for key, value in origin.identity.items() if key in target.identity}
    others = differing(recorded, target.identity)
    different = [key for key in others if key in FIRM]
    different += misfits_of_target(origin.drafter[1], target)
    if different:
        raise CheckpointError(
            f"drafter.init_from={origin.name} was made for another target than {target.name}: the "
            f"{', '.join(different)} differ(s); it goes on with its own target or a fine-tune of it"
        )
    if others:
        say(
            f"drafter.init_from={origin.name} was made for a target of other {', '.join(others)}: "
            "fine where this is a fine-tune of that"
        )
    drafter = origin.load()
    changes: dict[str, Any] = {"num_target_layers": target.num_layers}
    if hasattr(drafter.config, "confidence_detached"):
        changes["confidence_detached"] = config.drafter.confidence_detached
    ids = drafter.vocabulary
    if ids is not None:
        covered = coverage(count_tokens(samples, target.vocab_size), ids)
        changes["draft_vocab_coverage"] = covered
        say(f"draft vocabulary: that of {origin.name}, {covered:.1%} of the answers' tokens")
    drafter.config = replace(drafter.config, **changes)
    say(f"beginning with the weights of {origin.name}")
    return drafter.train()
