"""What target families differ in, and the generic way that covers most Hugging Face causal LMs.

Legend: B rows, T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deepspec.errors import TargetError

ROWS, SNAPSHOT = "rows", "snapshot"
PLAIN_ATTENTION = {"full_attention", "sliding_attention"}

# Config keys of Hugging Face families. One that gives a key another meaning overrides the method;
# every loaded target is held to its own logits and embedding (targets/agreement.py).
MULTIPLY_LOGITS = ("logit_scale", "lm_head_multiplier")
DIVIDE_LOGITS = ("logits_scaling", "logits_mup_width_multiplier")
MULTIPLY_EMBEDDINGS = ("embedding_multiplier", "embedding_scale")
CAP_LOGITS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


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

    def embedding_scale(self, config: Any, module: nn.Module) -> float:
        """What the target multiplies embeddings by before its first layer.

        `module`: its embedding, which in some families (Gemma) scales by itself. A drafter is given
        the scaled embedding; so do serving engines with a Gemma drafter. One that shares the
        target's table with a Qwen3 drafter does not scale it, so an export in such a layout has to
        carry the scaled table itself.
        """
        scale = math.prod(_numbers(config, MULTIPLY_EMBEDDINGS))
        if getattr(config, "mup_enabled", False):
            scale *= config.hidden_size**0.5
        own = getattr(module, "scalar_embed_scale", None)
        if own is None:
            return float(scale * getattr(module, "embed_scale", 1.0))
        # such a module keeps its scale as a buffer, which it rounds to the dtype of the weight
        dtype: Any = module.weight.dtype
        return scale * torch.tensor(own, device="cpu").to(dtype).item()

    def logit_scale(self, config: Any) -> float:
        """What the target multiplies the LM head's products by."""
        divisor = math.prod(_numbers(config, DIVIDE_LOGITS))
        return math.prod(_numbers(config, MULTIPLY_LOGITS)) / divisor

    def soft_cap(self, config: Any) -> float | None:
        """Logits become cap * tanh(logits / cap)."""
        return next(iter(_numbers(config, CAP_LOGITS)), None)

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


def _numbers(config: Any, keys: Sequence[str]) -> list[float]:
    """The values of those `keys` that `config` sets."""
    found = (getattr(config, key, None) for key in keys)
    return [float(value) for value in found if isinstance(value, (int, float))]


@dataclass(frozen=True)
class Parts:
    """The pieces of one loaded model.

    `backbone` runs everything but the LM head; `layers` are its decoder layers; `embedding` and
    `head` [V, D] are the weights as the files hold them, before they are scaled; `hash_of_ends`
    gives a hash of both in those files, None where they came from none.
    """

    family: str
    rules: Family
    text_config: Any
    backbone: nn.Module
    layers: nn.ModuleList
    embedding: Tensor
    head: Tensor
    embedding_scale: float
    hash_of_ends: Callable[[], str] | None = None


def attention_kinds(config: Any) -> set[str]:
    """The kinds of attention in a text config; without a list of them Transformers goes by the
    window."""
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return set(kinds)
    windowed = getattr(config, "sliding_window", None) is not None
    return {"sliding_attention" if windowed else "full_attention"}
