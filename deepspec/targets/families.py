"""Where a model keeps what DeepSpec needs. The generic path covers most Hugging Face causal LMs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from deepspec.errors import TargetError
from deepspec.targets.head import FrozenHead


@dataclass(frozen=True)
class Parts:
    """The pieces of one loaded model.

    `backbone` runs everything but the LM head; `layers` are its decoder layers; `embedding`
    [V, D] is frozen and shared with the drafter.
    """

    family: str
    text_config: Any
    backbone: nn.Module
    layers: nn.ModuleList
    embedding: Tensor
    head: FrozenHead


def find_parts(model: Any) -> Parts:
    """The parts of a Hugging Face causal LM. Raises TargetError when they are not found."""
    text_config = model.config.get_text_config()
    family = text_config.model_type
    backbone = model.get_decoder() if hasattr(model, "get_decoder") else None
    layers = getattr(backbone, "layers", None)
    output = model.get_output_embeddings()
    if backbone is None or not isinstance(layers, nn.ModuleList) or output is None:
        raise TargetError(
            f"target family {family!r} ({type(model).__name__}): no decoder layers or LM head "
            "found where Hugging Face causal LMs keep them; is target.path a causal language model?"
        )
    if getattr(output, "bias", None) is not None:
        raise TargetError(
            f"target family {family!r}: its LM head has a bias, which no draft layout can carry"
        )
    return Parts(
        family=family,
        text_config=text_config,
        backbone=backbone,
        layers=layers,
        embedding=model.get_input_embeddings().weight.detach(),
        head=FrozenHead(output.weight, getattr(text_config, "final_logit_softcapping", None)),
    )


def require_croppable(model: Any, family: str) -> None:
    """Refuse families whose cache cannot be rolled back a row at a time by position.

    Recurrent state (`_is_stateful`) keeps no positions; decoding such a target here would be
    silently wrong, so it is an error.
    """
    layer_types = getattr(model.config.get_text_config(), "layer_types", None)
    kinds = set(layer_types or ["full_attention"])
    if getattr(model, "_is_stateful", False) or kinds - {"full_attention", "sliding_attention"}:
        raise TargetError(
            f"target family {family!r} keeps a recurrent or compressed state "
            f"({', '.join(sorted(kinds))}) that cannot be rolled back by position; the "
            "verifying decoder supports full and sliding-window attention. Training a drafter "
            "for it works: set evaluation.enabled=false"
        )
