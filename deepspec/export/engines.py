"""Which engines load an export (checkpoint-formats.md, the table of exports).

An engine that refuses says so at start; one that loads the wrong profile or head drafts rubbish
without an error, so the answer belongs beside the files. The model card of our own exports and
`deepspec check export=DIR` both ask here. As of vLLM 0.33.0, SGLang 0.5.23, llama.cpp 0c1e57098 and
DeepSpec afdfa7c.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

SERVING = ("vLLM", "SGLang", "llama.cpp")
UNTIED = {
    True: None,
    False: "the target's LM head is untied: use serving",
    None: "nothing tells whether the target's LM head is tied: use serving, or give target.path",
}
SCALED = "the target scales its embedding, which is then not its LM head; no layout avoids that"

# scalings of the rotation that llama.cpp's converter drops from a drafter, without an error
DROPPED_ROTATIONS = ("llama3", "dynamic")


@dataclass(frozen=True)
class Eagle3Traits:
    """What the answer depends on besides where the drafter is EAGLE-3. `captured`: hidden states of
    the target, counted from the embedding, empty where the config leaves them to engines;
    `num_target_layers`: 0 where nothing tells; `unread`: why this library does not read it.
    `named`: the engines that find the captured layers in the config; `counted`: whether a layer
    without normed heads learns how many there are; `sglang`: why that engine does not load it."""

    qk_norm: bool
    captured: tuple[int, ...]
    num_target_layers: int
    unread: str | None
    named: tuple[str, ...] = ("vLLM",)
    counted: bool = False
    sglang: str | None = "reads EAGLE-3 in the flat layout only: use flat (drafter.qk_norm=false)"


@dataclass(frozen=True)
class Traits:
    """What the answer depends on. `reduced`: a draft vocabulary smaller than the target's.
    `embedding`, `lm_head`: whether these are inside. `tied`: whether the target's LM head is its
    embedding, None where no file records it; `scaled`: whether the target scales the latter.
    `rope_type`: how the drafter rotates. `eagle3`: None of the other drafters."""

    layout: str
    markov_head: str
    markov_rank: int
    reduced: bool
    embedding: bool
    lm_head: bool
    tied: bool | None
    scaled: bool = False
    rope_type: str = "default"
    eagle3: Eagle3Traits | None = None

    @property
    def drops_rotation(self) -> bool:
        """Whether llama.cpp drafts with another rotation than this drafter was trained with."""
        ours = self.layout != "deepseek_v4" and self.eagle3 is None
        return ours and self.rope_type in DROPPED_ROTATIONS


class Support(NamedTuple):
    """Whether `engine` loads an export, and `why` (or why not)."""

    engine: str
    loads: bool
    why: str


def loads_in(traits: Traits, faults: Sequence[str] = ()) -> list[Support]:
    """The answer of every engine; an export with `faults` is for none of them."""
    answers = {
        **{engine: _serving(engine, traits) for engine in SERVING},
        "deepseek-ai/DeepSpec": _reference(traits),
        "this library": _own(traits),
    }
    if faults:
        answers = dict.fromkeys(answers, (False, "the export is broken"))
    return [Support(engine, *answer) for engine, answer in answers.items()]


def _serving(engine: str, traits: Traits) -> tuple[bool, str]:
    head = traits.markov_head
    if traits.layout == "deepseek_v4":
        return True, "reads mtp.* tensors; embedding and LM head are the target's"
    if traits.eagle3 is not None:
        why = _no_eagle3(engine, traits.eagle3)
        return (False, why) if why else (True, _inside(traits))
    if traits.layout == "speculators" and engine == "SGLang":
        return False, "does not read the speculators layout: use flat"
    if traits.markov_rank == 0:
        return False, "knows no drafter of this kind without a Markov head (rank 0)"
    if head != "vanilla" and engine != "SGLang":
        return False, f"reads vanilla Markov heads only, not {head} ones"
    if traits.reduced and traits.layout != "speculators":
        return False, "reads a reduced draft vocabulary in the speculators layout only"
    if engine == "llama.cpp" and traits.drops_rotation:
        return False, f"its converter drops the drafter's {traits.rope_type} rotation: drafts badly"
    apart = SCALED if traits.scaled else UNTIED[traits.tied]
    if engine == "llama.cpp" and traits.embedding and apart:
        return False, f"goes wrong with embed_tokens inside where {apart}"
    return True, _inside(traits)


def _inside(traits: Traits) -> str:
    parts = {"embedding": traits.embedding, "LM head": traits.lm_head}
    inside = [name for name, there in parts.items() if there]
    if not inside:
        return "takes embedding and LM head from the target"
    return f"carries {' and '.join(inside)} of its own"


def _no_eagle3(engine: str, traits: Eagle3Traits) -> str | None:
    """Why `engine` does not load an EAGLE-3 drafter; None where it does."""
    count, layers = len(traits.captured), traits.num_target_layers
    if engine == "SGLang" and traits.sglang:
        return traits.sglang
    if engine == "llama.cpp" and traits.qk_norm:
        return "knows no normed heads: train with drafter.qk_norm=false"
    if count not in (0, 3) and not traits.qk_norm and not traits.counted:
        return f"reads three captured layers without normed heads, not {count}"
    if engine in traits.named or not count:
        return None
    if not layers:
        return (
            "captures layers of its own choice, and nothing tells whether these: give target.path"
        )
    own = (2, layers // 2, layers - 3)
    if traits.captured == own:
        return None
    ids = ",".join(str(state - 1) for state in own)
    return f"captures the target's layers [{ids}] alone: train with target.layer_ids=[{ids}]"


def _own(traits: Traits) -> tuple[bool, str]:
    why = traits.eagle3 and traits.eagle3.unread
    return (False, why) if why else (True, "reads it beside its target")


def _reference(traits: Traits) -> tuple[bool, str]:
    if traits.layout != "flat":
        return False, "reads the flat layout only"
    if traits.eagle3 is not None:
        return False, "is not known to read EAGLE-3 in this layout"
    if traits.reduced:
        return False, "knows no reduced draft vocabulary"
    if traits.embedding and traits.lm_head:
        return True, "evaluates it with the embedding and LM head inside"
    return False, "needs embed_tokens and lm_head inside: use the full profile"
