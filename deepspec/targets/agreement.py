"""Whether embedding and LM head, as DeepSpec holds them, are what the target computes with.

Training, sampling and verification all take the target's distribution to be `head(final)`. A family
with a scale that DeepSpec does not know would be trained and verified with another distribution and
nothing would show it, so each target is held to its own logits when it is loaded.

Legend: B rows, T tokens, S streams, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deepspec.errors import TargetError, first_line
from deepspec.progress import say
from deepspec.records import Sample
from deepspec.targets.families import FAMILIES, attention_kinds
from deepspec.targets.families.base import MULTIPLY_EMBEDDINGS

if TYPE_CHECKING:
    from deepspec.targets.ends import TargetEnds
    from deepspec.targets.target import Target

TOKENS = 8
# relative root mean square; scaling the weight instead of the logits rounds once more
MOST_APART = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 1e-2}
LAST_NORM = "embedding_norm."  # so LFM2 calls the norm before its LM head, which is the embedding
# config keys that may scale embeddings (those of logits show when the LM head is run)
EMBEDDING_KEY = re.compile(r"(?=.*emb)(?=.*(scal|mult|norm))")


@dataclass(frozen=True)
class Gap:
    """How far two tensors differ: by the `largest` difference, and by the root mean square of all
    differences over that of the expected values."""

    largest: float
    relative: float


def gap(found: Tensor, expected: Tensor) -> Gap:
    """The gap from `expected` to `found`; infinite for other shapes and for infinite values."""
    if found.shape != expected.shape:
        return Gap(math.inf, math.inf)
    expected = expected.to(found.device, torch.float64)
    difference = found.to(torch.float64) - expected
    largest = float(difference.abs().max())
    relative = float(difference.norm() / expected.norm().clamp(min=1e-30))
    return Gap(largest, relative) if math.isfinite(largest) else Gap(math.inf, math.inf)


def variation(found: Tensor, expected: Tensor) -> float:
    """The largest total variation between the distributions of a row; `found` and `expected` are
    logits [T, V]."""
    if found.shape != expected.shape:
        return 1.0
    moved = found.float().softmax(-1) - expected.float().softmax(-1)
    return float(moved.abs().sum(-1).max()) / 2


def check_agreement(target: Target) -> None:
    """Run a few tokens through `target`. Raises TargetError where its own logits are not
    `head(final)`, or what enters its first layer is not `embedding`."""
    ids = torch.arange(1, TOKENS + 1) * (len(target.embedding) // (TOKENS + 2))
    sample = Sample(ids, torch.ones(TOKENS, dtype=torch.bool), "")
    try:
        logits, embeddings = both_logits(target, sample), both_embeddings(target, sample)
    except Exception as error:
        raise TargetError(
            f"target family {target.family!r}: a text of {TOKENS} tokens does not run through it "
            f"({type(error).__name__}: {first_line(error)}); choose another target, or add what "
            "the family differs in to deepspec/targets/families"
        ) from error
    _compare("logits", target, *logits)
    _compare("embeddings", target, *embeddings)
    _check_window(target, sample)


def _check_window(target: Target, sample: Sample) -> None:
    """Raises TargetError where an unlisted family's config has a window that its code does not
    apply: the decoder, which goes by the config, would see less of the text than training does."""
    config: Any = target.backbone.config
    bare = attention_kinds(config) == {"sliding_attention"} and not hasattr(config, "layer_types")
    masked = config._attn_implementation in ("sdpa", "eager")  # others do not read it again
    if not (bare and masked) or target.family in FAMILIES:
        return
    window = config.sliding_window
    whole = target.features([sample]).final
    try:
        config.sliding_window = 2
        windowed = target.features([sample]).final
    finally:
        config.sliding_window = window
    if torch.equal(whole, windowed):
        raise TargetError(
            f"target family {target.family!r}: its config.json has sliding_window={window}, which "
            "its code in Transformers does not apply to a whole text; decoding beyond the window "
            "would follow another distribution; choose another target"
        )


@torch.no_grad()
def both_logits(target: Target, sample: Sample) -> tuple[Tensor, Tensor]:
    """DeepSpec's logits [T, V] of `sample`, and the model's own."""
    found = target.head(target.features([sample]).final)
    ids = sample.input_ids[None].to(target.device)
    return found, target.model(input_ids=ids, use_cache=False).logits[0].to(target.device)


@torch.no_grad()
def both_embeddings(target: Target, sample: Sample) -> tuple[Tensor, Tensor]:
    """DeepSpec's embeddings [T, D] of `sample`, and what enters the first layer."""
    entered: list[Tensor] = []

    def enter(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entered.append(args[0] if args else kwargs["hidden_states"])

    ids = sample.input_ids.to(target.device)
    first: Any = target.backbone.layers
    handle = first[0].register_forward_pre_hook(enter, with_kwargs=True)
    try:
        target.backbone(input_ids=ids[None], use_cache=False)
    finally:
        handle.remove()
    state = entered[0][0].to(target.device)
    return target.embedding[ids], state.mean(dim=1) if state.dim() == 3 else state


@torch.no_grad()
def check_ends(ends: TargetEnds, model: Any) -> None:
    """As `check_agreement`, where there are no layers to run: `model` holds shapes alone.

    The family's own code makes logits of random final states with the weight of `ends`. Embeddings
    cannot be run without what precedes the first layer: an unlisted family is refused for what may
    change them.
    """
    unknown = _beside_embedding(ends, model)
    if unknown and ends.family not in FAMILIES:
        raise TargetError(
            f"target family {ends.family!r}: what {', '.join(unknown)} does to embeddings is not "
            "known, and only a whole target shows it; set features=online, and "
            "target.parallel=replicated or device_map"
        )
    generator = torch.Generator().manual_seed(0)
    final = torch.randn(TOKENS, ends.hidden_size, generator=generator).to(ends.device, ends.dtype)
    try:
        with _layerless(model, ends, final[None]):
            ids = torch.ones(1, TOKENS, dtype=torch.int64, device="meta")
            expected = model(input_ids=ids, use_cache=False).logits[0]
    except Exception as error:
        if ends.family not in FAMILIES:  # else a test holds it to its own logits
            say(
                f"target family {ends.family!r}: its LM head does not run without layers "
                f"({type(error).__name__}), so its scale was not checked (logit_scale="
                f"{ends.logit_scale:g}); deepspec check target={ends.name} does"
            )
        return
    _compare("logits", ends, ends.head(final), expected)


def _beside_embedding(ends: TargetEnds, model: Any) -> list[str]:
    """Config keys and weights by which embeddings may be changed before the first layer."""
    module, found = model.get_input_embeddings(), []
    for key, value in ends.config.to_dict().items():
        neutral = value is not True and value in (None, False, 0, 1)
        if EMBEDDING_KEY.search(key) and key not in MULTIPLY_EMBEDDINGS and not neutral:
            found.append(f"{key}={value}")
    if hasattr(module, "embed_scale"):  # which is known, whatever key it comes from
        found = []
    for name, weight in model.get_decoder().named_parameters():
        own = name.count(".") < 2 and weight is not module.weight  # of no layer, image or sound
        if own and ("emb" in name or "pos" in name) and not name.startswith(LAST_NORM):
            found.append(name)
    return found


@contextmanager
def _layerless(model: Any, ends: TargetEnds, final: Tensor) -> Iterator[None]:
    """Inside, `model` takes `final` [B, T, D] for its backbone's output, and has an LM head."""
    backbone, head = model.get_decoder(), model.get_output_embeddings()
    weight = head.weight
    head.weight = nn.Parameter(ends.in_files[1], requires_grad=False)
    backbone.forward = lambda *_args, **_options: _Output(final)
    try:
        yield
    finally:
        del backbone.forward
        head.weight = weight


class _Output:
    """A backbone's output: final states, by name or as the first of a tuple; all else is None."""

    def __init__(self, final: Tensor) -> None:
        self.last_hidden_state = final

    def __getitem__(self, index: int) -> Tensor:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        return None


def _compare(what: str, ends: TargetEnds, found: Tensor, expected: Tensor) -> None:
    apart = gap(found, expected)
    if apart.relative <= MOST_APART.get(found.dtype, MOST_APART[torch.bfloat16]):
        return
    if found.shape != expected.shape:
        difference = f"{list(found.shape)} instead of {list(expected.shape)}"
    else:
        difference = f"up to {apart.largest:.2g} off, {100 * apart.relative:.2g} % on average"
        if what == "logits":
            difference += f", {variation(found, expected):.2g} in total variation"
    raise TargetError(
        f"target family {ends.family!r}: the {what} that DeepSpec computes are not the model's own "
        f"({difference}), so a drafter would learn and be verified against another distribution; "
        "choose another target, or add what the family does to deepspec/targets/families"
    )
