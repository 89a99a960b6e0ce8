"""Whether a drafter decodes as it was trained: the same text through both of its paths.

A few prompts are decoded greedily, by the decoder as it is: rows of different lengths, drafts
rejected, rows that leave. What the proposer was asked and what it answered is kept. Then the text
that came out goes through the training forward, with blocks at the anchors of every round and the
drafts as their previous tokens, so both must give the same numbers.
Legend: N blocks (one a round and row), K block size, D hidden size, V_draft tokens that can be
drafted.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from deepspec.data.blocks import build_blocks
from deepspec.data.chat_template import ChatEncoder
from deepspec.data.conversations import Conversation
from deepspec.decoding import Decoder, Sampling
from deepspec.drafters.base import Drafter, Draw, Observation, Proposer
from deepspec.drafters.registry import DrafterKind
from deepspec.errors import ConfigError, TemplateRefusal
from deepspec.records import Proposal, Sample
from deepspec.targets import Target

# A difference over the largest value of its kind. fp32 paths differ by the order of their sums: by
# 1e-6 on a tiny target, where paths broken on purpose differ by 0.06 to 1. In bf16 the target's own
# features differ, by its rounding in forwards of other widths: by 0.005 there.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.02}


@dataclass(frozen=True)
class Comparison:
    """`differences`: by what is compared (hidden, logits, confidence) the largest one at each of
    the K positions of a block, over the largest value; all are at most `tolerance`, or it fails.
    `apart`: how many of the `blocks` are above it. A few of many may come from a router or an index
    of the target, where a tie goes another way in a forward of another width."""

    differences: dict[str, list[float]]
    tolerance: float
    apart: int
    blocks: int
    rows: int

    @property
    def fine(self) -> bool:
        """Whether training and decoding agree."""
        found = [value for values in self.differences.values() for value in values]
        return all(value <= self.tolerance for value in found)  # NaN is not


@torch.inference_mode()
def compare_paths(
    target: Target,
    drafter: Drafter,
    kind: DrafterKind,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
) -> Comparison:
    """Decode `prompts` (token ids) by `new_tokens` each, and compare as the head of the file says.
    The `drafter` stays in its dtype: rounded to its target's, a small break would not show.

    Raises ConfigError for a drafter that has no training forward.
    """
    if not kind.trained:
        raise ConfigError("this drafter is not trained: there is no training forward to compare")
    prompts = sorted(prompts, key=len)  # the decoder's order, so a row is a prompt
    tapped = _Tap(target.head)
    beside: Any = copy.copy(target)
    beside.head = tapped
    recorder = _Recorder(kind.proposer(drafter, beside), tapped)
    decoder = Decoder(target, recorder, batch_size=len(prompts), stop_token_ids=[])
    result = decoder.generate(prompts, Sampling(), new_tokens)
    texts = [
        torch.tensor([*prompt, *completion.tokens])
        for prompt, completion in zip(prompts, result.completions, strict=True)
    ]
    rounds = recorder.rounds()
    expected = _train_path(target, drafter, texts, rounds)
    found = {name: _apart(getattr(rounds, name), values) for name, values in expected.items()}
    tolerance = TOLERANCE[target.dtype]
    beyond = ~(torch.stack(list(found.values())) <= tolerance)  # NaN too
    return Comparison(
        differences={name: apart.amax(dim=0).tolist() for name, apart in found.items()},
        tolerance=tolerance,
        apart=int(beyond.any(dim=2).any(dim=0).sum()),
        blocks=len(rounds.rows),
        rows=len(prompts),
    )


def some_prompts(
    conversations: Iterable[Conversation], encoder: ChatEncoder, count: int
) -> list[list[int]]:
    """At most `count` first questions as token ids: the shortest, the longest, and some between."""
    asked: set[tuple[int, ...]] = set()
    for conversation in conversations:
        roles = [message["role"] for message in conversation.messages]
        if "user" not in roles:
            continue
        try:
            tokens = encoder.prompt(
                conversation.messages[: roles.index("user") + 1], conversation.tools
            )
        except TemplateRefusal:
            continue
        if len(tokens) < encoder.max_length:
            asked.add(tuple(tokens))
    ordered = sorted(asked, key=lambda tokens: (len(tokens), tokens))
    count = min(count, len(ordered))
    last = len(ordered) - 1
    return [list(ordered[i * last // max(1, count - 1)]) for i in range(count)]


def _apart(found: Tensor, expected: Tensor) -> Tensor:
    """[N, K, ..] both -> [N, K] the largest difference, over the largest value of all."""
    difference = (found.double() - expected.double()).abs()
    largest = difference.reshape(*difference.shape[:2], -1).amax(dim=2)
    return largest / expected.double().abs().amax()


# ------------------------------------------------------------------------------------- two paths


@dataclass(frozen=True)
class Rounds:
    """What was drafted: a block a round and row, ascending by row and position.

    `rows` [N], `anchors` [N] (positions), `previous` [N, K] the tokens before each slot, `hidden`
    [N, K, D], `logits` [N, K, V_draft], `confidence` [N, K] or None.
    """

    rows: Tensor
    anchors: Tensor
    previous: Tensor
    hidden: Tensor
    logits: Tensor
    confidence: Tensor | None


class _Tap(nn.Module):
    """The target's head, which keeps what it is given: the drafter's hidden states."""

    def __init__(self, head: Any, kept: list[Tensor] | None = None) -> None:
        super().__init__()
        self.inner, self.kept = head, [] if kept is None else kept

    def rows(self, ids: Tensor) -> _Tap:
        """See `FrozenHead.rows`."""
        return _Tap(self.inner.rows(ids), self.kept)

    def forward(self, hidden: Tensor) -> Tensor:
        """See `FrozenHead.forward`."""
        self.kept.append(hidden)
        return self.inner(hidden)


class _Recorder:
    """A proposer that passes everything on, and keeps what was drafted."""

    def __init__(self, inner: Proposer, tap: _Tap) -> None:
        self._inner, self._tap = inner, tap
        self.block_size = inner.block_size
        self._blocks: list[tuple[Tensor, ...]] = []
        self._confidences: list[Tensor] = []

    def start(self, rows: int) -> None:
        """See `Proposer.start`."""
        self._rows, self._count = torch.arange(rows), rows
        self._inner.start(rows)

    def observe(self, seen: Observation) -> None:
        """See `Proposer.observe`."""
        self._inner.observe(seen)

    def select(self, rows: Tensor) -> None:
        """See `Proposer.select`."""
        self._rows = self._rows[rows.cpu()]
        self._inner.select(rows)

    def join(self, other: _Recorder) -> None:
        """See `Proposer.join`; newcomers are numbered on."""
        self._rows = torch.cat((self._rows, other._rows + self._count))
        self._count += other._count
        self._inner.join(other._inner)

    def propose(self, anchors: Tensor, positions: Tensor, end: int, draw: Draw) -> Proposal:
        """See `Proposer.propose`."""
        logits: list[Tensor] = []

        def recorded(values: Tensor) -> tuple[Tensor, Tensor | None]:
            logits.append(values.clone())
            return draw(values)

        self._tap.kept.clear()
        proposal = self._inner.propose(anchors, positions, end, recorded)
        rows = len(anchors)
        hidden = torch.cat([kept.reshape(rows, -1, kept.shape[-1]) for kept in self._tap.kept], 1)
        previous = torch.cat((anchors[:, None], proposal.tokens[:, :-1]), dim=1)
        block = (positions, previous, hidden, torch.stack(logits, dim=1))
        self._blocks.append((self._rows, *(tensor.cpu() for tensor in block)))
        if proposal.confidence is not None:
            self._confidences.append(proposal.confidence.cpu())
        return proposal

    def rounds(self) -> Rounds:
        """All that was drafted."""
        rows, anchors, previous, hidden, logits = map(torch.cat, zip(*self._blocks, strict=True))
        order = torch.argsort(rows * (int(anchors.max()) + 1) + anchors)
        confidence = torch.cat(self._confidences)[order] if self._confidences else None
        return Rounds(
            rows[order], anchors[order], previous[order], hidden[order], logits[order], confidence
        )


def _train_path(
    target: Target, drafter: Drafter, texts: Sequence[Tensor], rounds: Rounds
) -> dict[str, Tensor]:
    """Hidden states, logits and confidences of the same blocks by the training forward."""
    samples = [
        Sample(text, torch.ones(len(text), dtype=torch.bool), str(row))
        for row, text in enumerate(texts)
    ]
    anchors = [rounds.anchors[rounds.rows == row] for row in range(len(texts))]
    batch = build_blocks(samples, anchors, drafter.config.block_size, decay=1.0)
    batch = replace(batch, previous=rounds.previous).to(target.device)
    output = drafter(target.features(samples), batch, target.embedding)
    ids = drafter.vocabulary
    logits = (target.head if ids is None else target.head.rows(ids))(output.hidden)
    if output.latent is not None and drafter.bias_weight is not None:
        logits = logits + output.latent @ drafter.bias_weight.T
    found = {"hidden": output.hidden, "logits": logits}
    if output.confidence_logits is not None:
        found["confidence"] = output.confidence_logits.float().sigmoid()
    return {name: tensor.cpu() for name, tensor in found.items()}


# ------------------------------------------------------------------------------------- an export


def differing_tensors(checkpoint: Drafter, exported: Drafter) -> dict[str, float]:
    """Tensors of an export that are not the checkpoint's rounded to bf16: by how much at most."""
    found, expected = exported.state_dict(), checkpoint.state_dict()
    different = {name: float("inf") for name in found.keys() ^ expected.keys()}
    for name in found.keys() & expected.keys():
        own, its = found[name].cpu(), expected[name].cpu()
        its = its.bfloat16().float() if its.is_floating_point() else its
        if own.shape != its.shape:
            different[name] = float("inf")
        elif not torch.equal(own, its):
            different[name] = float((own.double() - its.double()).abs().max())
    return different
