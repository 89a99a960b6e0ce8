"""An export against what serving engines require, also one that another program wrote.

The files alone are read; a target, where one is given, tells more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from deepspec.errors import CheckpointError
from deepspec.export.engines import SERVING, Support, Traits, loads_in
from deepspec.export.files import (
    CONFIG,
    Headers,
    as_saved,
    check_hash,
    deepspec_of,
    identity_in,
    read_config,
    read_headers,
    read_tensor,
)
from deepspec.export.inspection import layer_faults
from deepspec.export.layouts import LAYOUTS, layout_of
from deepspec.export.tensors import D2T, EMBEDDING, HEAD, T2D, vocabulary_faults
from deepspec.targets import TargetEnds, default_layer_ids
from deepspec.targets.identity import differing


@dataclass(frozen=True)
class Findings:
    """`faults` break the export for every engine, `doubts` are for a person to settle; `support`:
    who loads it."""

    layout: str | None
    faults: list[str]
    doubts: list[str]
    support: list[Support]

    @property
    def fine(self) -> bool:
        """Nothing is broken, and a serving engine loads it."""
        return any(entry.loads for entry in self.support if entry.engine in SERVING)


def check_export(folder: Path, target: TargetEnds | None = None) -> Findings:
    """What `folder` holds. Raises CheckpointError where there is no config.json at all."""
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder} holds no export ({CONFIG} is missing)")
    try:
        config = read_config(folder)
    except CheckpointError as error:
        return Findings(None, [str(error)], [], [])
    name = layout_of(config)
    if name is None:
        found = f"architectures is {config.get('architectures')!r:.60}"
        return Findings(None, [f"{found}, which no layout calls itself"], [], [])
    layout, faults, headers = LAYOUTS[name], [], None
    try:
        headers = read_headers(folder)
        check_hash(folder, config)
    except CheckpointError as error:
        faults.append(str(error))
    faults += layout.faults(config, headers)
    traits = layout.traits(config, headers or {})
    doubts: list[str] = []
    unread = traits.eagle3 is not None and traits.eagle3.unread is not None
    if headers is not None and not faults and not unread:  # so there is a shape, and values
        shape = layout.shape(folder, config)
        faults += _table_faults(folder, headers, shape)
        traits = _with_ties(folder, headers, traits, target)
        if target is not None and not faults:
            its_own = () if traits.eagle3 is None else (HEAD,)
            faults += _target_faults(folder, config, headers, shape, target, its_own)
            faults += layer_faults(shape.target_layer_ids, target.num_layers, layout.last_layer)
        doubts += _rotation_doubts(traits)
        if not layout.last_layer:
            doubts += _layer_doubts(config, shape, target)
        if target is not None:
            doubts += _scale_doubts(traits, target)
            if traits.eagle3 is not None and not faults:
                doubts += _head_doubts(folder, headers, target)
    return Findings(name, faults, doubts, loads_in(traits, faults))


def _table_faults(folder: Path, headers: Headers, shape: Any) -> Iterator[str]:
    if D2T in headers:
        t2d = read_tensor(folder, T2D) if T2D in headers else None
        yield from vocabulary_faults(read_tensor(folder, D2T), t2d, shape.vocab_size)


def _with_ties(folder: Path, headers: Headers, traits: Traits, target: TargetEnds | None) -> Traits:
    """Whether the LM head is the embedding: the target tells, or both are inside and whole. Of how
    many layers it has, an export may say nothing."""
    if target is not None and traits.eagle3 is not None:
        eagle3 = replace(traits.eagle3, num_target_layers=target.num_layers)
        traits = replace(traits, eagle3=eagle3)
    if target is not None:
        return replace(traits, tied=target.tied, scaled=target.embedding_scale != 1)
    inside = EMBEDDING in headers and HEAD in headers
    if not inside or headers[EMBEDDING].shape != headers[HEAD].shape:
        return traits
    same = torch.equal(read_tensor(folder, EMBEDDING), read_tensor(folder, HEAD))
    return replace(traits, tied=same)


def _target_faults(
    folder: Path,
    config: dict[str, Any],
    headers: Headers,
    shape: Any,
    target: TargetEnds,
    its_own: Sequence[str],
) -> Iterator[str]:
    """What only a look at the target tells; tensors that are `its_own` need not be the target's."""
    own, its = (shape.hidden_size, shape.vocab_size), (target.hidden_size, target.vocab_size)
    if own != its:
        yield (
            f"it is for a target of hidden size {own[0]} and {own[1]} tokens, but {target.name} "
            f"has {its[0]} and {its[1]}"
        )
        return
    layers = _recorded_layers(config)
    if layers is not None and layers != target.num_layers:
        yield f"num_target_layers is {layers}, but {target.name} has {target.num_layers}"
    here = {key: value for key, value in identity_in(config).items() if key in target.identity}
    if others := differing(here, target.identity):
        yield f"it was made for another target than {target.name}: {', '.join(others)} differ(s)"
    for name in _other_tables(folder, headers, target):
        if name not in its_own:
            yield f"{name} is not that of {target.name}"


def _other_tables(folder: Path, headers: Headers, target: TargetEnds) -> Iterator[str]:
    """Those of embedding and LM head that are inside and not the target's."""
    head = target.head.weight
    if D2T in headers:
        d2t = read_tensor(folder, D2T)
        head = head[(d2t + torch.arange(len(d2t))).to(head.device)]
    for name, tensor in ((EMBEDDING, target.embedding), (HEAD, head)):
        if name in headers and not torch.equal(read_tensor(folder, name), as_saved(tensor)):
            yield name


def _head_doubts(folder: Path, headers: Headers, target: TargetEnds) -> Iterator[str]:
    """EAGLE-3 of others has a head that was trained with it."""
    if HEAD in _other_tables(folder, headers, target):
        yield (
            f"{HEAD} is not that of {target.name}: engines draft with it, but this library with "
            "the target's and does not load the export"
        )


def _layer_doubts(config: dict[str, Any], shape: Any, target: TargetEnds | None) -> Iterator[str]:
    layers = _recorded_layers(config) if target is None else target.num_layers
    ids = list(shape.target_layer_ids)
    if layers is None or len(ids) > layers - 3:
        return
    usual = default_layer_ids(layers, len(ids))
    for step, word in ((1, "plus"), (-1, "minus")):
        if ids == [layer_id + step for layer_id in usual]:
            yield (
                f"the target's layers {ids} of {layers} are the evenly spaced ones {word} one: "
                "were they counted otherwise than by a block's output?"
            )


def _rotation_doubts(traits: Traits) -> Iterator[str]:
    if traits.drops_rotation:
        yield (
            f"the drafter rotates by {traits.rope_type}, which llama.cpp's converter drops: it "
            "drafts badly there, without an error; vLLM and SGLang draft as it was trained. A "
            "drafter that is trained anew takes the plain rotation, which all of them keep"
        )


def _scale_doubts(traits: Traits, target: TargetEnds) -> Iterator[str]:
    """A target's own factors, which are in what drafters are trained with."""
    ends = (
        ("embedding", target.embedding_scale, traits.embedding),
        ("LM head", target.logit_scale, traits.lm_head),
    )
    for what, scale, inside in ends:
        if scale != 1 and not inside:
            yield (
                f"{target.name} scales its {what} by {scale:g}, and drafters are trained with the "
                "scaled one, which is not inside: does the engine scale what it shares?"
            )


def _recorded_layers(config: dict[str, Any]) -> int | None:
    found = config.get("num_target_layers", deepspec_of(config).get("num_target_layers"))
    return found if type(found) is int else None
