"""Rotary frequencies that depend on the length of a text (longrope, dynamic), fixed for one length.

Transformers takes them from the longest position in a forward. A text's features would then depend
on its neighbours in the batch, and a block that is verified would rotate otherwise than the same
tokens one by one. Engines decide once, by the longest text that they are started for (vLLM's
--max-model-len, llama.cpp's -c), and so do we: training, plain decoding and verification compute
one and the same model.
"""

from __future__ import annotations

from typing import Any

import torch

from deepspec.errors import TargetError
from deepspec.progress import say_once

DEPENDENT = ("longrope", "dynamic")


def kinds_of(config: Any) -> set[str]:
    """The rotations in a text config, those of all kinds of layers, that depend on the length."""
    parameters = getattr(config, "rope_parameters", None) or {}
    each = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    return {str(one["rope_type"]) for one in each if "rope_type" in one} & set(DEPENDENT)


def checked_length(wanted: int | None, config: Any, name: str) -> int | None:
    """`target.context_length` for the target `name`; the target's own where that is null.

    Raises TargetError for more than the target has positions for.
    """
    own = getattr(config, "max_position_embeddings", None)
    if (
        wanted is not None
        and own is not None
        and wanted > own
        and "dynamic" not in kinds_of(config)
    ):
        raise TargetError(
            f"target.context_length={wanted}, but target.path={name} is for at most {own} tokens"
        )
    return wanted or own


def fix_rotation(model: Any, kinds: set[str], length: int) -> None:
    """Make the frequencies of `model` those that it takes for a text of `length` tokens.

    Its own code computes them; then its rotations are marked as fixed.
    """
    fixed = 0
    for module in model.modules():
        rope_type = getattr(module, "rope_type", None)
        several = rope_type if isinstance(rope_type, dict) else {None: rope_type}
        if not kinds & set(several.values()):
            continue
        device = next(module.buffers()).device
        last = torch.full((1, 1), length - 1, device=device)
        for layer_type in several:
            options = {} if layer_type is None else {"layer_type": layer_type}
            module(torch.zeros(1, 1, 1, device=device), last, **options)
        plain = dict.fromkeys(several, "default")
        module.rope_type = plain if isinstance(rope_type, dict) else "default"
        fixed += 1
    if not fixed:
        raise TargetError(
            f"target family {type(model).__name__} rotates by {', '.join(sorted(kinds))}, but not "
            "where Transformers' families do: its texts would depend on their neighbours in a batch"
        )
    say_once(
        f"target: {', '.join(sorted(kinds))} rotation as for texts of {length} tokens, whatever a "
        "text's own length, as engines do; target.context_length sets it"
    )
