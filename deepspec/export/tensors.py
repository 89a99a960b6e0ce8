"""A drafter's tensors: written, held against its shape, and read back; the same for every kind.

Two profiles: `serving` leaves the embedding and LM head out, because engines share the target's
(but those that the target scales are inside); `full` carries both. With a draft vocabulary the LM
head's rows for it are always inside (an engine cannot know which), and so are `d2t` [V_draft],
offsets (draft id i is the target's i + d2t[i]), and `t2d` [V], true where a token of the target can
be drafted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepspec.drafters.base import Drafter
from deepspec.errors import CheckpointError
from deepspec.export.files import (
    CONFIG,
    WEIGHTS,
    as_saved,
    deepspec_of,
    identity_in,
    read_headers,
    read_weights,
)
from deepspec.targets import TargetEnds
from deepspec.targets.identity import differing

EMBEDDING, HEAD, D2T, T2D = "embed_tokens.weight", "lm_head.weight", "d2t", "t2d"


@dataclass(frozen=True)
class Form:
    """How drafters of one kind are put into a file: `build` makes one of a shape, `rename` turns
    the name of a parameter into that of its tensor."""

    build: Callable[[Any], Drafter]
    rename: Callable[[str], str] = str


def tensors_of(form: Form, drafter: Drafter, target: TargetEnds, profile: str) -> dict[str, Tensor]:
    """All tensors of an export, bf16; see the head of this file."""
    tensors = {form.rename(name): tensor for name, tensor in drafter.state_dict().items()}
    ids = drafter.vocabulary
    # engines that share the target's tables do not scale them as some families do
    if profile == "full" or target.embedding_scale != 1:
        tensors[EMBEDDING] = target.embedding
    if profile == "full" or target.logit_scale != 1:
        tensors[HEAD] = target.head.weight
    if ids is not None:
        tensors |= {HEAD: target.head.rows(ids).weight, T2D: as_t2d(ids, drafter.config.vocab_size)}
    return {name: as_saved(tensor) for name, tensor in tensors.items()}


def as_t2d(ids: Tensor, vocab_size: int) -> Tensor:
    """`ids` [V_draft] as a mask over the target's vocabulary [V]."""
    return torch.zeros(vocab_size, dtype=torch.bool).index_fill_(0, ids.cpu(), True)


def misfits(form: Form, found: Mapping[str, Sequence[int]], shape: Any) -> Iterator[str]:
    """How tensors of these names and shapes differ from those of a drafter of `shape`.

    Raises CheckpointError where there can be no drafter of that shape.
    """
    if shape.num_layers > len(found):  # before so many are built
        yield f"{shape.num_layers} layers, but {len(found)} tensors"
        return
    with torch.device("meta"):
        parameters = build(form, shape).state_dict()
    needed = {form.rename(name): tuple(tensor.shape) for name, tensor in parameters.items()}
    size, rows = shape.vocab_size, shape.draft_vocab_size or shape.vocab_size
    optional: dict[str, tuple[int, ...]] = {
        EMBEDDING: (size, shape.hidden_size),
        HEAD: (rows, shape.hidden_size),
    }
    if D2T in needed:
        optional[T2D] = (size,)
    known = optional | needed
    yield from (f"{name} is missing" for name in needed if name not in found)
    yield from (f"{name} is not called for" for name in found if name not in known)
    for name, own in found.items():
        if name in known and tuple(own) != known[name]:
            yield f"{name} is {list(own)}, expected {list(known[name])}"


def vocabulary_faults(d2t: Tensor, t2d: Tensor | None, vocab_size: int) -> Iterator[str]:
    """What is wrong with a draft vocabulary's tables."""
    ids = d2t.long() + torch.arange(len(d2t))
    if not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        yield f"d2t leads to the ids {int(ids.min())} to {int(ids.max())} of {vocab_size} tokens"
    elif bool((ids[1:] <= ids[:-1]).any()):
        # engines that take the head's rows by t2d have no other order
        yield "d2t leads to ids that do not ascend"
    elif t2d is not None and not torch.equal(t2d.bool(), as_t2d(ids, vocab_size)):
        yield "t2d is true at other tokens than those that d2t leads to"


# --------------------------------------------------------------------------------------- reading


def load_tensors(
    form: Form, folder: Path, config: dict[str, Any], shape: Any, target: TargetEnds | None
) -> Drafter:
    """The exported drafter of `shape`, fp32 (of bf16 values), in evaluation mode; either profile.

    With a `target`, checks that the export was made for it and that it captures the drafter's
    layers. Raises CheckpointError for files that are missing, corrupt or do not fit each other, and
    for another target.
    """
    if target is not None:
        _check_target(folder, config, shape, target)
    _check_fit(form, folder, shape)
    tensors = read_weights(folder, config)
    drafter = build(form, shape)
    own = {name: tensors.pop(form.rename(name)) for name in drafter.state_dict()}
    if D2T in own:
        for fault in vocabulary_faults(own[D2T], tensors.get(T2D), shape.vocab_size):
            raise CheckpointError(f"{folder / WEIGHTS}: {fault}; export again")
    drafter.load_state_dict(own)
    if target is not None:
        _check_shared(folder / WEIGHTS, tensors, drafter, target)
    return drafter.eval()


def build(form: Form, shape: Any) -> Drafter:
    """A drafter of this shape. Raises CheckpointError where none can be."""
    try:
        return form.build(shape)
    except Exception as error:  # torch and Transformers look at sizes and rotations in many ways
        raise CheckpointError(
            f"describes no drafter that can be built ({type(error).__name__}: {error}); "
            "compare its sizes, markov_head_type and rope_parameters with those it was trained with"
        ) from error


def _check_target(folder: Path, config: dict[str, Any], shape: Any, target: TargetEnds) -> None:
    different = differing(identity_in(config), target.identity)
    different += misfits_of_target(shape, target)
    if different:
        whose = deepspec_of(config).get("target", "the one it was trained for")
        raise CheckpointError(
            f"{folder} was made for another target than {target.name}: the {', '.join(different)} "
            f"differ(s); set target.path to {whose}, or train a drafter for this one"
        )
    if list(target.layer_ids) != list(shape.target_layer_ids):
        raise CheckpointError(
            f"{folder} reads the target's layers {list(shape.target_layer_ids)}, but the target "
            f"captures {list(target.layer_ids)}; set target.layer_ids to the former"
        )


def misfits_of_target(shape: Any, target: TargetEnds) -> list[str]:
    """Sizes of a drafter's shape that are not those of `target`; 0 is one that is not said."""
    sizes = {
        "hidden_size": (shape.hidden_size, target.hidden_size),
        "vocab_size": (shape.vocab_size, target.vocab_size),
        "num_target_layers": (shape.num_target_layers, target.num_layers),
    }
    return [f"{key} ({own}, not {its})" for key, (own, its) in sizes.items() if own not in (0, its)]


def _check_fit(form: Form, folder: Path, shape: Any) -> None:
    """Raise CheckpointError where config.json is of other sizes than the tensors that are there."""
    found = {name: info.shape for name, info in read_headers(folder).items()}
    try:
        problems = list(misfits(form, found, shape))
    except CheckpointError as error:
        raise CheckpointError(f"{folder / CONFIG} {error}") from error
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(
            f"{folder / WEIGHTS} does not fit {CONFIG} beside it: {'; '.join(problems[:5])}{more}. "
            "Export again"
        )


def _check_shared(
    file: Path, shared: dict[str, Tensor], drafter: Drafter, target: TargetEnds
) -> None:
    """An embedding and a head inside must be the target's: drafting here uses the latter."""
    ids = drafter.vocabulary
    head = target.head if ids is None else target.head.rows(ids)
    for name, own in ((EMBEDDING, target.embedding), (HEAD, head.weight)):
        if name in shared and not torch.equal(shared[name].to(torch.bfloat16), as_saved(own)):
            raise CheckpointError(
                f"{file}: {name} is not that of {target.name}; set target.path to the target this "
                "was exported for, or export again"
            )
