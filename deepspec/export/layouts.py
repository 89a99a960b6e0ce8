"""The layouts that drafters are exported in, as one table.

`export.format`, `evaluate checkpoint=DIR`, `check export=DIR` and `drafter.init_from` go by it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from deepspec.drafters.base import Drafter
from deepspec.errors import CheckpointError, ConfigError
from deepspec.export import deepseek_v4, flat, speculators
from deepspec.export.dspark import checked_shape, dspark_tensors, load_dspark
from deepspec.export.engines import Traits
from deepspec.export.files import (
    CONFIG,
    Headers,
    deepspec_of,
    headers_of,
    identity_in,
    read_config,
    write_folder,
)
from deepspec.export.inspection import dspark_faults, dspark_traits
from deepspec.targets import TargetEnds

Config = dict[str, Any]


@dataclass(frozen=True)
class Layout:
    """One way to put drafters into files.

    `architectures`: what its config.json may call itself; `keys` of it that tell a drafter from a
    target that calls itself so. `refusal(kind, shape)`: why it cannot
    hold such a drafter, None where it can; `shape` is a resolved one, or the settings of one.
    `config(shape, target, profile, num_anchors)` and `tensors(drafter, target, profile)` are what
    is written; `shape(config, file)` and `load(folder, config, target)` read it back, raising
    CheckpointError; `kind(shape)` names the drafter in the registry. `faults(config, headers)`:
    what no engine should be given, a sentence each; `traits(config, headers)`: what engines go by.
    """

    architectures: tuple[str, ...]
    keys: tuple[str, ...]
    refusal: Callable[[str, Any], str | None]
    config: Callable[[Any, TargetEnds, str, int], Config]
    tensors: Callable[[Any, TargetEnds, str], dict[str, Tensor]]
    shape: Callable[[Config, Path], Any]
    load: Callable[[Path, Config, TargetEnds | None], Drafter]
    kind: Callable[[Any], str]
    faults: Callable[[Config, Headers | None], Iterator[str]]
    traits: Callable[[Config, Headers], Traits]


# ------------------------------------------------------------------------------------ the table

DSPARK = ("dspark", "dflash")


def _dspark_layout(
    name: str,
    architectures: tuple[str, ...],
    refusal: Callable[[str, Any], str | None],
    config: Callable[[Any, TargetEnds, str, int], Config],
    as_flat: Callable[[Config, int | None], Config],
    more_faults: Callable[[Config], Iterator[str]],
) -> Layout:
    """A layout of DSpark drafters whose config can be put as a flat one."""

    def turned(config: Config, file: Path, num_target_layers: int | None = None) -> Config:
        try:
            return as_flat(config, num_target_layers)
        except CheckpointError as error:
            raise CheckpointError(f"{file}: {error}") from None

    def refuse(kind: str, shape: Any) -> str | None:
        return refusal(kind, shape) if kind in DSPARK else f"it holds no {kind} drafters"

    def load(folder: Path, config: Config, target: TargetEnds | None) -> Drafter:
        layers = None if target is None else target.num_layers
        return load_dspark(folder, turned(config, folder / CONFIG, layers), target)

    def faults(config: Config, headers: Headers | None) -> Iterator[str]:
        yield from more_faults(config)
        try:
            yield from dspark_faults(as_flat(config, None), headers)
        except CheckpointError as error:
            yield str(error)

    def traits(config: Config, headers: Headers) -> Traits:
        try:
            return dspark_traits(name, as_flat(config, None), headers)
        except CheckpointError:  # a fault, so no engine is asked
            return dspark_traits(name, config, headers)

    return Layout(
        architectures=architectures,
        keys=(),
        refusal=refuse,
        config=config,
        tensors=dspark_tensors,
        shape=lambda config, file: checked_shape(turned(config, file), file),
        load=load,
        kind=lambda shape: "dspark" if shape.markov_rank or shape.confidence_head else "dflash",
        faults=faults,
        traits=traits,
    )


def _flat_refusal(_kind: str, shape: Any) -> str | None:
    if shape.draft_vocab_size is not None:
        return "no engine reads a reduced draft vocabulary (drafter.draft_vocab_size) in it"
    return None


def _speculators_refusal(kind: str, shape: Any) -> str | None:
    if kind == "dflash" or not shape.markov_rank:
        return "the engines that read it know no drafter without a Markov head (rank 0)"
    if shape.markov_head != "vanilla":
        return f"the engines that read it know vanilla Markov heads, not {shape.markov_head} ones"
    return None


def _deepseek_v4_refusal(kind: str, _shape: Any) -> str | None:
    return None if kind == "dspark_v4" else f"it holds V4-native drafters, no {kind} ones"


def _deepseek_v4_traits(config: Config, _headers: Headers) -> Traits:
    rank = config.get("dspark_markov_rank")
    return Traits(
        layout="deepseek_v4",
        markov_head="vanilla",
        markov_rank=rank if isinstance(rank, int) else 0,
        reduced=False,
        embedding=False,
        lm_head=False,
        tied=None,
    )


LAYOUTS = {
    "flat": _dspark_layout(
        "flat",
        tuple(flat.ARCHITECTURES),
        _flat_refusal,
        flat.flat_config,
        lambda config, _: config,
        lambda _: iter(()),
    ),
    "speculators": _dspark_layout(
        "speculators",
        speculators.ARCHITECTURES,
        _speculators_refusal,
        speculators.speculators_config,
        speculators.as_flat,
        speculators.serving_faults,
    ),
    "deepseek_v4": Layout(
        architectures=("DeepseekV4ForCausalLM",),
        keys=tuple(deepseek_v4.OWN),
        refusal=_deepseek_v4_refusal,
        config=deepseek_v4.deepseek_v4_config,
        tensors=lambda drafter, target, profile: deepseek_v4.deepseek_v4_tensors(drafter),
        shape=lambda config, file: deepseek_v4.deepseek_v4_shape(file.parent),
        load=lambda folder, config, target: deepseek_v4.load_deepseek_v4(folder, target),
        kind=lambda shape: "dspark_v4",
        faults=deepseek_v4.deepseek_v4_faults,
        traits=_deepseek_v4_traits,
    ),
}


# ------------------------------------------------------------------------------------- going by it


def require_layout(name: str, kind: str, shape: Any) -> Layout:
    """The layout `name`. Raises ConfigError where it cannot hold the drafter: it names who can.

    `shape` is a resolved one, or the settings of one (DrafterConfig).
    """
    if name not in LAYOUTS:
        raise ConfigError(f"export.format={name} is not one of {', '.join(LAYOUTS)}")
    if why := LAYOUTS[name].refusal(kind, shape):
        able = layouts_for(kind, shape)
        instead = f"set export.format={' or '.join(able)}" if able else "no layout can hold it"
        raise ConfigError(f"export.format={name} cannot hold this drafter: {why}; {instead}")
    return LAYOUTS[name]


def layouts_for(kind: str, shape: Any) -> list[str]:
    """The layouts that can hold such a drafter."""
    return [name for name, layout in LAYOUTS.items() if not layout.refusal(kind, shape)]


def write_export(
    name: str,
    kind: str,
    drafter: Any,
    target: TargetEnds,
    out: Path,
    profile: str,
    num_anchors: int,
    card: Callable[[Config, Traits], str],
) -> Traits:
    """Write `drafter` for serving beside `target` into `out`, whole or not at all.

    `name` of the layout, `kind` of drafter, `profile` serving or full, `num_anchors` what it was
    trained with (training.anchors_per_sample); `card(config, traits)` is the text of README.md.
    Weights are rounded to bf16. An earlier export is replaced. Returns what engines go by. Raises
    ConfigError for what the layout cannot hold, CheckpointError when `out` cannot be written.
    """
    layout = require_layout(name, kind, drafter.config)
    config = layout.config(drafter.config, target, profile, num_anchors)
    tensors = layout.tensors(drafter, target, profile)
    traits = layout.traits(config, headers_of(tensors))
    write_folder(out, config, tensors, card(config, traits), _is_replaceable)
    return traits


def layout_of(config: Config) -> str | None:
    """The name of the layout that a config.json is of, None where it is of none."""
    found = config.get("architectures")
    first = found[0] if isinstance(found, list) and found else found
    for name, layout in LAYOUTS.items():
        if first in layout.architectures and set(layout.keys) <= config.keys():
            return name
    return None


def is_export(folder: Path) -> bool:
    """Whether `folder` holds an export, by its config.json; the weights are not looked at."""
    try:
        return layout_of(read_config(folder)) is not None
    except CheckpointError:
        return False


def _is_replaceable(folder: Path) -> bool:
    """An export that holds nothing else: a published V4 checkpoint is a whole target."""
    config = read_config(folder) if is_export(folder) else {}
    return bool(config) and (layout_of(config) != "deepseek_v4" or bool(deepspec_of(config)))


@dataclass(frozen=True)
class Export:
    """An export on disk, opened: `shape` and `kind` of its drafter, `target` as it is called there
    ("" where nothing says), and its `identity` where this library wrote it."""

    folder: Path
    config: Config
    layout: Layout
    shape: Any

    @property
    def kind(self) -> str:
        """The drafter's name in the registry."""
        return self.layout.kind(self.shape)

    @property
    def target(self) -> str:
        """The target it was made for, a hub name or the last part of a path; "": not said."""
        own, named = deepspec_of(self.config), speculators.verifier_of(self.config)
        if self.kind == "dspark_v4" and not own:  # a published checkpoint holds the target too
            return str(self.folder.resolve())
        return str(own.get("target") or named)

    @property
    def identity(self) -> dict[str, str]:
        """Of that target, where this library wrote the export."""
        return identity_in(self.config)

    def load(self, target: TargetEnds | None = None) -> Drafter:
        """The drafter; beside a `target` it is checked against that. Raises CheckpointError."""
        return self.layout.load(self.folder, self.config, target)


def open_export(folder: Path) -> Export:
    """The export in `folder`, without its weights.

    Raises CheckpointError when config.json is missing, incomplete or of no known layout.
    """
    config, file = read_config(folder), folder / CONFIG
    name = layout_of(config)
    if name is None:
        known = [
            architecture for layout in LAYOUTS.values() for architecture in layout.architectures
        ]
        raise CheckpointError(
            f"{file} has architectures {config.get('architectures')!r:.60}, expected one of "
            f"{', '.join(known)}; the layouts that are read are {', '.join(LAYOUTS)}"
        )
    layout = LAYOUTS[name]
    return Export(folder, config, layout, layout.shape(config, file))
