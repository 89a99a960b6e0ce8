"""The records that cross rooms: frozen, plain, and the only shapes other rooms may rely on.

Legend: B rows, T context tokens, N blocks (one an anchor), K block size, D hidden size,
L captured layers, V vocabulary, R Markov rank.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor


class _Movable:
    """Gives a record of tensors `.to(device)`; fields that are not tensors stay as they are."""

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        """The same record with every tensor on `device`."""
        moved: dict[str, Any] = {
            field.name: value.to(device, non_blocking=non_blocking)
            for field in fields(self)  # type: ignore[arg-type]
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **moved)  # type: ignore[type-var]


@dataclass(frozen=True)
class Sample(_Movable):
    """One tokenised conversation.

    `input_ids` [T] int64; `loss_mask` [T] bool, true where the assistant wrote the token (end of
    turn included); `sample_id` is stable across runs, processes and epochs. `conversation_id`:
    where several samples are of one conversation, which.
    """

    input_ids: Tensor
    loss_mask: Tensor
    sample_id: str
    conversation_id: str | None = None

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def followed(self) -> Tensor:
        """[T] bool, true where a supervised token follows: there its prediction is learnt from."""
        return torch.cat((self.loss_mask[1:], self.loss_mask.new_zeros(1)))


@dataclass(frozen=True)
class TargetFeatures(_Movable):
    """What the frozen target computed for one sample, or for several packed end to end.

    `context` [T, L*D]: outputs of the captured layers, concatenated in the order of the layer ids.
    `final` [F, D]: the LM head's input (post-norm); of all tokens, or of those alone that a
    supervised one follows (`Sample.followed`), where the objective reads it.
    """

    context: Tensor
    final: Tensor

    @property
    def all_finals(self) -> bool:
        """Whether `final` is of all tokens. Else it is shorter: no token follows the last one."""
        return len(self.final) == len(self.context)


@dataclass(frozen=True)
class BlockBatch(_Movable):
    """Blocks of several samples, packed: sample after sample in both context and blocks.

    context side
        `tokens` [T] int64: the samples' tokens
        `document_ids` [T] int64: which sample a context token belongs to (0, 1, ...)
        `positions` [T] int64: a context token's position inside its sample
    block side (blocks of a sample are contiguous, samples in order)
        `block_documents` [N] int64: which sample a block belongs to
        `anchors` [N] int64: the anchor's position inside its sample; the block sees context < it
        `rows` [N] int64: the anchor's index into the packed context [T]
        `previous` [N, K] int64: the true token before each label (teacher forcing); the anchor's
        own token in slot 0
        `labels` [N, K] int64: slot j is the token at anchor + j + 1; 0 where weight is 0
        `weights` [N, K] float32: exp(-j / decay) while supervised, else 0
        `followed_rows` [N, K] int64: like `slot_rows`, among the tokens that a supervised one
        follows; any of them where the weight is 0
    `sample_ids`: names of the samples, by document id.
    """

    tokens: Tensor
    document_ids: Tensor
    positions: Tensor
    block_documents: Tensor
    anchors: Tensor
    rows: Tensor
    previous: Tensor
    labels: Tensor
    weights: Tensor
    followed_rows: Tensor
    sample_ids: tuple[str, ...]

    @property
    def block_size(self) -> int:
        """K."""
        return self.labels.shape[1]

    @property
    def slot_rows(self) -> Tensor:
        """[N, K] packed row of the position whose target distribution slot j is held against.

        Slot j predicts the token at anchor + j + 1, so the target's prediction of it stands at
        anchor + j. Rows past the end of the pack (weight 0) are clamped.
        """
        steps = torch.arange(self.block_size, device=self.rows.device)
        return (self.rows[:, None] + steps).clamp(max=self.document_ids.shape[0] - 1)


@dataclass(frozen=True)
class Proposal:
    """At most K draft tokens a row.

    `tokens` [B, K] int64. `probabilities` [B, K, V] the distribution each token was drawn from, or
    None where the draft is deterministic (a point mass). `confidence` [B, K] probability that a
    draft survives given that all earlier ones did, or None. `lengths`: a row's drafts, where it has
    fewer than K; what stands behind them in `tokens` is no draft. On the host: it decides how wide
    the target's forward is.
    """

    tokens: Tensor
    probabilities: Tensor | None
    confidence: Tensor | None
    lengths: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Verification:
    """`accepted` [B] int64 drafts accepted; `next_token` [B] int64 the bonus or corrected token."""

    accepted: Tensor
    next_token: Tensor


@dataclass(frozen=True)
class DecodeTrace:
    """One decoding round of one request. Metrics, calibration and the simulator read only these.

    `position`: the anchor's position. `proposed` drafts made, `scheduled` of them verified,
    `accepted` of those kept (the round emits accepted + 1 tokens before stop tokens cut it).
    `emitted`: tokens of this round that reached the output. `confidences`: one a proposed draft,
    empty without a confidence head. `seconds`: the round's wall time divided by its batch size.
    """

    request: str
    round: int
    position: int
    proposed: int
    scheduled: int
    accepted: int
    emitted: int
    confidences: tuple[float, ...]
    seconds: float
