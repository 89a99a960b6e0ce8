"""Every kind of drafter by name: how to resolve its config, build it, and put it to work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from deepspec.config.schema import DrafterConfig
from deepspec.drafters import dspark, dspark_v4
from deepspec.drafters.base import Drafter, Proposer
from deepspec.errors import ConfigError


@dataclass(frozen=True)
class DrafterKind:
    """The three ways into a drafter.

    `resolve(DrafterConfig, target)` gives the full shape, `load(dict)` reads it back from a
    checkpoint, `build(shape)` makes the module, `proposer(module, target)` puts it in the decoder.
    """

    resolve: Callable[[DrafterConfig, Any], Any]
    load: Callable[[dict[str, Any]], Any]
    build: Callable[[Any], Drafter]
    proposer: Callable[[Any, Any], Proposer]


_DSPARK = DrafterKind(
    resolve=dspark.resolve_config,
    load=dspark.DSparkConfig.from_dict,
    build=dspark.DSparkDrafter,
    proposer=lambda drafter, target: dspark.DSparkProposer(drafter, target.embedding, target.head),
)
_DSPARK_V4 = DrafterKind(
    resolve=dspark_v4.resolve_config,
    load=dspark_v4.DSparkV4Config.from_dict,
    build=dspark_v4.DSparkV4Drafter,
    proposer=lambda drafter, target: dspark_v4.DSparkV4Proposer(
        drafter, target.embedding, target.head
    ),
)

DRAFTERS: dict[str, DrafterKind] = {
    "dspark": _DSPARK,
    "dflash": _DSPARK,
    "dspark_v4": _DSPARK_V4,
}


def drafter_kind(name: str) -> DrafterKind:
    """The drafter called `name`. Raises ConfigError listing those there are."""
    if name not in DRAFTERS:
        raise ConfigError(f"drafter.kind={name} is not one of {', '.join(sorted(DRAFTERS))}")
    return DRAFTERS[name]
