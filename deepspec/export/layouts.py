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
from deepspec.drafters.eagle3 import Eagle3Config
from deepspec.errors import CheckpointError, ConfigError
from deepspec.export import deepseek_v4, eagle3, eagle3_flat, flat, speculators
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
from deepspec.export.flat import DSPARK, checked_shape
from deepspec.export.inspection import dspark_faults, traits_of
from deepspec.export.tensors import load_tensors, tensors_of
from deepspec.targets import TargetEnds

Config = dict[str, Any]


@dataclass(frozen=True)
class Layout:
    """One way to put drafters into files.

    `is_mine(config)`: whether a config.json is of it. `refusal(kind, shape)`: why it cannot hold
    such a drafter, None where it can; `shape` is a resolved one, or the settings of one.
    `config(shape, target, profile, num_anchors)` and `tensors(drafter, target, profile)` are what
    is written; `shape(folder, config)` and `load(folder, config, target)` read it back, raising
    CheckpointError; `kind(shape)` names the drafter in the registry, `target(folder, config)` the
    target of an export that another program wrote ("": nothing does). `faults(config, headers)`:
    what no engine should be given, a sentence each; `traits(config, headers)`: what engines go by.
    `last_layer`: whether the target's last one may be captured.
    """

    is_mine: Callable[[Config], bool]
    refusal: Callable[[str, Any], str | None]
    config: Callable[[Any, TargetEnds, str, int], Config]
    tensors: Callable[[Any, TargetEnds, str], dict[str, Tensor]]
    shape: Callable[[Path, Config], Any]
    load: Callable[[Path, Config, TargetEnds | None], Drafter]
    kind: Callable[[Any], str]
    target: Callable[[Path, Config], str]
    faults: Callable[[Config, Headers | None], Iterator[str]]
    traits: Callable[[Config, Headers], Traits]
    last_layer: bool = False


# ------------------------------------------------------------------------------------ the table


def _is_of(config: Config, architectures: tuple[str, ...]) -> bool:
    found = config.get("architectures")
    return isinstance(found, list) and bool(found) and found[0] in architectures


def _dspark_layout(
    name: str,
    architectures: tuple[str, ...],
    refusal: Callable[[str, Any], str | None],
    config: Callable[[Any, TargetEnds, str, int], Config],
    as_flat: Callable[[Config, int | None], Config],
    more_faults: Callable[[Config], Iterator[str]],
) -> Layout:
    """A layout of DSpark drafters whose config can be put as a flat one."""

    def turned(folder: Path, config: Config, num_target_layers: int | None = None) -> Config:
        try:
            return as_flat(config, num_target_layers)
        except CheckpointError as error:
            raise CheckpointError(f"{folder / CONFIG}: {error}") from None

    def refuse(kind: str, shape: Any) -> str | None:
        known = kind in ("dspark", "dflash")
        return refusal(kind, shape) if known else f"it holds no {kind} drafters"

    def load(folder: Path, config: Config, target: TargetEnds | None) -> Drafter:
        layers = None if target is None else target.num_layers
        whole = turned(folder, config, layers)
        return load_tensors(DSPARK, folder, whole, checked_shape(whole, folder / CONFIG), target)

    def faults(config: Config, headers: Headers | None) -> Iterator[str]:
        yield from more_faults(config)
        try:
            yield from dspark_faults(as_flat(config, None), headers)
        except CheckpointError as error:
            yield str(error)

    def traits(config: Config, headers: Headers) -> Traits:
        try:
            return traits_of(name, as_flat(config, None), headers)
        except CheckpointError:  # a fault, so no engine is asked
            return traits_of(name, config, headers)

    return Layout(
        is_mine=lambda config: _is_of(config, architectures),
        refusal=refuse,
        config=config,
        tensors=lambda *what: tensors_of(DSPARK, *what),
        shape=lambda folder, config: checked_shape(turned(folder, config), folder / CONFIG),
        load=load,
        kind=lambda shape: "dspark" if shape.markov_rank or shape.confidence_head else "dflash",
        target=lambda _, config: speculators.verifier_of(config),
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


def _flat_eagle3_refusal(kind: str, shape: Any) -> str | None:
    if kind != "eagle3":
        return f"it holds no {kind} drafters"
    if shape.qk_norm:
        return "of EAGLE-3 it holds no normed heads (train with drafter.qk_norm=false)"
    return None


EAGLE3 = Layout(
    is_mine=lambda config: _is_of(config, eagle3.ARCHITECTURES),
    refusal=lambda kind, _: None if kind == "eagle3" else f"it holds no {kind} drafters",
    config=eagle3.eagle3_config,
    tensors=lambda *what: tensors_of(eagle3.EAGLE3, *what),
    shape=eagle3.eagle3_shape,
    load=eagle3.load_eagle3,
    kind=lambda _: "eagle3",
    target=lambda _, config: speculators.verifier_of(config),
    faults=eagle3.eagle3_faults,
    traits=eagle3.eagle3_traits,
)

FLAT_EAGLE3 = Layout(
    is_mine=lambda config: _is_of(config, eagle3_flat.ARCHITECTURES),
    refusal=_flat_eagle3_refusal,
    config=eagle3_flat.flat_eagle3_config,
    tensors=lambda *what: tensors_of(eagle3_flat.FLAT_EAGLE3, *what),
    shape=eagle3_flat.flat_eagle3_shape,
    load=eagle3_flat.load_flat_eagle3,
    kind=lambda _: "eagle3",
    target=lambda *_: "",  # others do not say it
    faults=eagle3_flat.flat_eagle3_faults,
    traits=eagle3_flat.flat_eagle3_traits,
)


def _with_eagle3(dspark: Layout, eagle: Layout) -> Layout:
    """Both algorithms of one layout: a config's architecture says which, and a drafter's shape."""

    def of(config: Config) -> Layout:
        return eagle if eagle.is_mine(config) else dspark

    def holding(shape: Any) -> Layout:
        return eagle if isinstance(shape, Eagle3Config) else dspark

    return Layout(
        is_mine=lambda config: dspark.is_mine(config) or eagle.is_mine(config),
        refusal=lambda kind, shape: (eagle if kind == "eagle3" else dspark).refusal(kind, shape),
        config=lambda shape, *more: holding(shape).config(shape, *more),
        tensors=lambda drafter, *more: holding(drafter.config).tensors(drafter, *more),
        shape=lambda folder, config: of(config).shape(folder, config),
        load=lambda folder, config, target: of(config).load(folder, config, target),
        kind=lambda shape: holding(shape).kind(shape),
        target=lambda folder, config: of(config).target(folder, config),
        faults=lambda config, headers: of(config).faults(config, headers),
        traits=lambda config, headers: of(config).traits(config, headers),
    )


LAYOUTS = {
    "flat": _with_eagle3(
        _dspark_layout(
            "flat",
            tuple(flat.ARCHITECTURES),
            _flat_refusal,
            flat.flat_config,
            lambda config, _: config,
            lambda _: iter(()),
        ),
        FLAT_EAGLE3,
    ),
    "speculators": _with_eagle3(
        _dspark_layout(
            "speculators",
            speculators.ARCHITECTURES,
            _speculators_refusal,
            speculators.speculators_config,
            speculators.as_flat,
            speculators.dspark_serving_faults,
        ),
        EAGLE3,
    ),
    "deepseek_v4": Layout(
        is_mine=deepseek_v4.is_deepseek_v4,
        refusal=lambda kind, _: None if kind == "dspark_v4" else f"it holds no {kind} drafters",
        config=deepseek_v4.deepseek_v4_config,
        tensors=lambda drafter, *_: deepseek_v4.deepseek_v4_tensors(drafter),
        shape=lambda folder, _: deepseek_v4.deepseek_v4_shape(folder),
        load=lambda folder, _, target: deepseek_v4.load_deepseek_v4(folder, target),
        kind=lambda _: "dspark_v4",
        target=lambda folder, _: str(folder.resolve()),  # a published one is its own target
        faults=deepseek_v4.deepseek_v4_faults,
        traits=lambda config, _: deepseek_v4.deepseek_v4_traits(config),
        last_layer=True,
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
    own: Config | None = None,
) -> Traits:
    """Write `drafter` for serving beside `target` into `out`, whole or not at all.

    `name` of the layout, `kind` of drafter, `profile` serving or full, `num_anchors` what it was
    trained with (training.anchors_per_sample); `card(config, traits)` is the text of README.md;
    `own` goes under config.json's key `deepspec`.
    Weights are rounded to bf16. An earlier export is replaced. Returns what engines go by. Raises
    ConfigError for what the layout cannot hold, CheckpointError when `out` cannot be written.
    """
    layout = require_layout(name, kind, drafter.config)
    config = layout.config(drafter.config, target, profile, num_anchors)
    config["deepspec"] |= own or {}
    tensors = layout.tensors(drafter, target, profile)
    traits = layout.traits(config, headers_of(tensors))
    write_folder(out, config, tensors, card(config, traits))
    return traits


def layout_of(config: Config) -> str | None:
    """The name of the layout that a config.json is of, None where it is of none."""
    return next((name for name, layout in LAYOUTS.items() if layout.is_mine(config)), None)


def is_export(folder: Path) -> bool:
    """Whether `folder` holds an export, by its config.json; the weights are not looked at."""
    try:
        return layout_of(read_config(folder)) is not None
    except CheckpointError:
        return False


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
        known = deepspec_of(self.config).get("target")
        return str(known) if known else self.layout.target(self.folder, self.config)

    @property
    def identity(self) -> dict[str, str]:
        """Of that target, where this library wrote the export."""
        return identity_in(self.config)

    def load(self, target: TargetEnds | None = None) -> Drafter:
        """The drafter; beside a `target` it is checked against that. Raises CheckpointError."""
        return self.layout.load(self.folder, self.config, target)


def num_anchors(config: Config) -> int | None:
    """What the drafter was trained with, where its config.json says it."""
    found = config.get("num_anchors", deepspec_of(config).get("num_anchors"))
    return found if type(found) is int else None


def weights_to_fetch(folder: Path) -> list[str]:
    """Patterns of the files that hold a drafter, of which `folder` has all but the weights yet."""
    files = None
    if is_export(folder) and layout_of(read_config(folder)) == "deepseek_v4":
        files = deepseek_v4.drafter_files(folder)
    return ["*.safetensors"] if files is None else sorted(files)


def open_export(folder: Path) -> Export:
    """The export in `folder`, without its weights.

    Raises CheckpointError when config.json is missing, incomplete or of no known layout.
    """
    config = read_config(folder)
    name = layout_of(config)
    if name is None:
        raise CheckpointError(
            f"{folder / CONFIG} has architectures {config.get('architectures')!r:.60}; expected "
            f"that of a drafter in one of the layouts {', '.join(LAYOUTS)}"
        )
    layout = LAYOUTS[name]
    return Export(folder, config, layout, layout.shape(folder, config))
