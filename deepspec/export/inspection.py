"""What is wrong with an export as its files describe it, without a target and without values.

A loader stops at the first fault; here all of them are found, also those that a loader does not
mind and an engine does.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from deepspec.drafters.dspark.config import DSparkConfig
from deepspec.errors import CheckpointError
from deepspec.export.engines import Traits
from deepspec.export.files import Headers, deepspec_of
from deepspec.export.flat import DSPARK, conventions, rotation_in, shape_of, size_faults
from deepspec.export.tensors import D2T, EMBEDDING, HEAD, T2D, Form, misfits

INTEGERS = {D2T: "I64", T2D: "BOOL"}


def dspark_faults(flat: dict[str, Any], headers: Headers | None) -> Iterator[str]:
    """Faults of a flat config and of the tensors beside it (None: they are unreadable)."""
    yield from conventions(flat)
    if "is_causal" not in flat:
        yield "is_causal is missing; write false: slots of a block see each other"
    shape = None
    try:
        shape = shape_of(flat, DSparkConfig)
        yield from layer_faults(shape.target_layer_ids, shape.num_target_layers)
        yield from size_faults(shape)
        if shape.confidence_with_markov and not shape.markov_rank:
            yield "confidence_head_with_markov is true, but there is no Markov head (rank 0)"
    except CheckpointError as error:
        yield str(error)
    if headers is not None:
        yield from tensor_faults(DSPARK, headers, shape)


def tensor_faults(form: Form, headers: Headers, shape: Any) -> Iterator[str]:
    """Faults of the tensors beside a config that describes `shape` (None: nothing that can be)."""
    yield from _name_faults(headers)
    for name, info in headers.items():
        expected = INTEGERS.get(name, "BF16")
        if info.dtype != expected:
            yield f"{name} is {info.dtype}, expected {expected}"
    if shape is not None:
        try:
            found = {name: info.shape for name, info in headers.items()}
            yield from misfits(form, found, shape)
        except CheckpointError as error:
            yield str(error)
        if shape.draft_vocab_size is not None and HEAD not in headers:
            yield f"{HEAD} is missing: a draft vocabulary needs the head's rows for it"


def traits_of(layout: str, flat: dict[str, Any], headers: Headers) -> Traits:
    """What engines' answers depend on; a key that is missing is a fault anyway."""
    size, whole, rank = (flat.get(k) for k in ("draft_vocab_size", "vocab_size", "markov_rank"))
    tied, scaled = (deepspec_of(flat).get(key) for key in ("target_tied", "scaled_embedding"))
    rope = rotation_in(flat)
    return Traits(
        layout=layout,
        markov_head=str(flat.get("markov_head_type", "vanilla")),
        markov_rank=rank if isinstance(rank, int) else 0,
        reduced=D2T in headers or (size is not None and size != whole),
        embedding=EMBEDDING in headers,
        lm_head=HEAD in headers,
        tied=tied if isinstance(tied, bool) else None,
        scaled=scaled is True,
        rope_type=str(rope["rope_type"]) if isinstance(rope, dict) else "default",
    )


def layer_faults(
    layer_ids: tuple[int, ...], num_target_layers: int, last: bool = False
) -> Iterator[str]:
    """Captured layers that a target of so many (0: not said) does not have, or not to give: the
    `last` one is captured of DeepSeek V4 alone."""
    ids = list(layer_ids)
    if not ids or ids != sorted(set(ids)):
        yield f"the target's layers {ids} are not distinct and ascending"
        return
    if ids[0] < -1:
        yield f"the target's layers {ids} begin below -1, the embedding"
    most = num_target_layers - 1 if last else num_target_layers - 2
    beyond = [layer_id for layer_id in ids if layer_id > most]
    if num_target_layers and beyond:
        whose = "the last layer's" if beyond == [num_target_layers - 1] else "no layer's"
        yield (
            f"the target's layers {ids} of {num_target_layers} have {beyond}, {whose} output to "
            f"capture: an id names a block's output, of 0 to {most}, and engines add 1 themselves"
        )


def _name_faults(headers: Headers) -> Iterator[str]:
    if any(name.startswith("model.") for name in headers):
        yield "tensor names begin with model.; the layout has no prefix"
    if any(name.endswith("inv_freq") for name in headers):
        yield "rotary frequencies (inv_freq) are inside: readers make them, and bf16 ones are wrong"
