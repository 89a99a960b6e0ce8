"""Every kind of drafter by name: how to resolve its config, build it, and put it to work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from deepspec.config.schema import DrafterConfig
from deepspec.drafters import dspark, dspark_v4, eagle3, mtp, ngram
from deepspec.drafters.base import Drafter, Proposer
from deepspec.drafters.causal import CausalProposer
from deepspec.drafters.shape import DrafterShape
from deepspec.errors import ConfigError


@dataclass(frozen=True)
class DrafterKind:
    """The ways into a drafter.

    `resolve(DrafterConfig, target)` gives the full shape, `load(dict)` reads it back from a
    checkpoint, `build(shape)` makes the module, `proposer(module, target)` puts it in the decoder
    as it is (see `open_proposer`).
    `trained`: whether there is anything to train. `all_finals`: whether the drafter itself reads
    the target's final states, so that training needs them of all tokens; the objective reads them
    only where a supervised token follows.
    """

    resolve: Callable[[DrafterConfig, Any], Any]
    load: Callable[[dict[str, Any]], Any]
    build: Callable[[Any], Drafter]
    proposer: Callable[[Any, Any], Proposer]
    trained: bool = True
    all_finals: bool = False


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


def _causal_proposer(drafter: Any, target: Any) -> Proposer:
    return CausalProposer(drafter, target.embedding, target.head)


_EAGLE3 = DrafterKind(
    resolve=eagle3.resolve_config,
    load=eagle3.Eagle3Config.from_dict,
    build=eagle3.Eagle3Drafter,
    proposer=_causal_proposer,
)
_MTP = DrafterKind(
    resolve=mtp.resolve_config,
    load=DrafterShape.from_dict,
    build=mtp.MtpDrafter,
    proposer=_causal_proposer,
    all_finals=True,
)
_NGRAM = DrafterKind(
    resolve=ngram.resolve_config,
    load=ngram.NgramConfig.from_dict,
    build=ngram.NgramDrafter,
    proposer=lambda drafter, target: ngram.NgramProposer(drafter.config),
    trained=False,
)

DRAFTERS: dict[str, DrafterKind] = {
    "dspark": _DSPARK,
    "dflash": _DSPARK,
    "dspark_v4": _DSPARK_V4,
    "eagle3": _EAGLE3,
    "mtp": _MTP,
    "ngram": _NGRAM,
}


def drafter_kind(name: str) -> DrafterKind:
    """The drafter called `name`. Raises ConfigError listing those there are."""
    if name not in DRAFTERS:
        raise ConfigError(f"drafter.kind={name} is not one of {', '.join(sorted(DRAFTERS))}")
    return DRAFTERS[name]


def open_proposer(name: str, drafter: Drafter, target: Any) -> Proposer:
    """The `drafter` called `name` inside the decoding loop, on the device of `target` and in its
    dtype, as engines serve it: in fp32 beside a bf16 target it would be another drafter, a slower
    one, and would have the whole LM head cast for every use. The module itself is changed."""
    drafter.to_serve(target.device, target.dtype)
    return drafter_kind(name).proposer(drafter, target)
