"""What target families differ in, and the generic way that covers most Hugging Face causal LMs.

Legend: B rows, T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from deepspec.errors import TargetError

ROWS, SNAPSHOT = "rows", "snapshot"
PLAIN_ATTENTION = {"full_attention", "sliding_attention"}


class Family:
    """A family like any other: its file overrides what differs, and nothing else.

    `rollback` says how decoding takes back what the target refused: ROWS (keys and values with a
    length a row; forgetting is enough) or SNAPSHOT (a state that keeps no positions is saved before
    and restored after). `needs`: keys that config.json must hold for it. `last_layer`: whether the
    last layer may be captured; mostly `final` is its output but for a norm.
    """

    rollback: str = ROWS
    needs: tuple[str, ...] = ()
    last_layer: bool = False

    def embedding_scale(self, config: Any) -> float:
        """What the target multiplies embeddings by before its first layer."""
        return 1.0

    def logit_scale(self, config: Any) -> float:
        """What the target multiplies the LM head's products by."""
        return 1.0

    def soft_cap(self, config: Any) -> float | None:
        """Logits become cap * tanh(logits / cap)."""
        return getattr(config, "final_logit_softcapping", None)

    def feature(self, output: Tensor) -> Tensor:
        """A decoder layer's output (or the first one's input) as a feature [B, T, D]."""
        return output

    def check(self, config: Any) -> None:
        """Raises TargetError where `config` lacks what the family needs, or is no causal model."""
        lacking = [key for key in self.needs if getattr(config, key, None) is None]
        if lacking:
            raise TargetError(
                f"target family {config.model_type!r} needs {', '.join(lacking)}, which the "
                "config.json of target.path does not hold; take it from the original checkpoint"
            )
        if getattr(config, "use_bidirectional_attention", None) in (True, "all"):
            raise TargetError(
                f"target family {config.model_type!r}: use_bidirectional_attention="
                f"{config.use_bidirectional_attention!r} makes it an encoder; a target must see "
                "only what stands before"
            )


@dataclass(frozen=True)
class Parts:
    """The pieces of one loaded model.

    `backbone` runs everything but the LM head; `layers` are its decoder layers; `embedding` and
    `head` [V, D] are the weights as the files hold them, before what `rules` says of scales.
    """

    family: str
    rules: Family
    text_config: Any
    backbone: nn.Module
    layers: nn.ModuleList
    embedding: Tensor
    head: Tensor


def attention_kinds(config: Any) -> set[str]:
    """The kinds of attention in a text config; without a list of them Transformers goes by the
    window."""
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return set(kinds)
    windowed = getattr(config, "sliding_window", None) is not None
    return {"sliding_attention" if windowed else "full_attention"}
