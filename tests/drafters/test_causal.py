"""EAGLE-3 and MTP against their equations, and their training forward against decoding.

Known to be right by: one block at a time and one key at a time, written from the definition of a
pair with the drafter's raw weights, for values and for gradients (nothing between the steps is
detached); and by the proposer, fed pieces of text by rows of different lengths with rubbish behind
them, giving the logits of the packed training forward.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deepspec.config.schema import DrafterConfig
from deepspec.data.blocks import build_blocks
from deepspec.drafters.base import Observation
from deepspec.drafters.causal import CausalDrafter, CausalProposer
from deepspec.drafters.registry import drafter_kind
from deepspec.drafters.shape import DrafterShape
from deepspec.errors import CheckpointError, ConfigError
from deepspec.records import BlockBatch, Sample, TargetFeatures
from deepspec.targets import Target

KINDS = ("eagle3", "mtp")
SHAPE = DrafterShape(
    hidden_size=16,
    vocab_size=50,
    num_target_layers=6,
    target_layer_ids=(0, 2, 4),
    num_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=24,
    block_size=4,
    rms_norm_eps=1e-6,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    max_position_embeddings=128,
    initializer_range=0.3,
)
LENGTHS, ANCHORS = [9, 5, 12], [[0, 1, 4, 8], [], [2, 7, 10]]


def drafter_of(kind: str, **changes: Any) -> CausalDrafter:
    """Random weights, norms included, in fp64; of SHAPE with `changes`."""
    torch.manual_seed(0)
    shape = drafter_kind(kind).load(SHAPE.to_dict() | changes)
    drafter = drafter_kind(kind).build(shape).double()
    assert isinstance(drafter, CausalDrafter)
    for name, parameter in drafter.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, mean=1.0, std=0.3)
    return drafter


def pack_of(
    lengths: list[int], anchors: list[list[int]], size: int = SHAPE.block_size
) -> tuple[BlockBatch, TargetFeatures]:
    """Random tokens and features."""
    generator = torch.Generator().manual_seed(1)
    samples = []
    for index, length in enumerate(lengths):
        ids = torch.randint(0, 50, (length,), generator=generator)
        samples.append(Sample(ids, torch.ones(length).bool(), str(index)))
    batch = build_blocks(samples, [torch.tensor(a, dtype=torch.int64) for a in anchors], size, 4.0)
    total = sum(lengths)
    context = torch.randn(total, 3 * 16, generator=generator, dtype=torch.float64)
    final = torch.randn(total, 16, generator=generator, dtype=torch.float64)
    return batch, TargetFeatures(context, final)


@pytest.fixture
def embedding() -> Tensor:
    return torch.randn(50, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


# ----------------------------------------------------------------------------- naive reference


def rms(states: Tensor, weight: Tensor) -> Tensor:
    return states / torch.sqrt((states * states).mean() + 1e-6) * weight


def turned(head: Tensor, position: int) -> Tensor:
    """One head of 8 numbers, turned by `position`: i and i + 4 are a plane."""
    out = list(head.unbind())
    for i in range(4):
        angle = position * 10000.0 ** (-i / 4)
        a, b = head[i], head[i + 4]
        out[i] = a * math.cos(angle) - b * math.sin(angle)
        out[i + 4] = b * math.cos(angle) + a * math.sin(angle)
    return torch.stack(out)


def naive_block(
    kind: str,
    w: dict[str, Tensor],
    tokens: list[int],
    context: Tensor,
    final: Tensor,
    embedding: Tensor,
    anchor: int,
    forced: list[int],
) -> Tensor:
    """Hidden states [K, D] of one block: `tokens`, `context`, `final` of its own sample."""

    def feature(t: int) -> Tensor:
        return w["fc.weight"] @ context[t] if kind == "eagle3" else final[t]

    def pair(token: int, g: Tensor) -> tuple[Tensor, Tensor]:
        e = embedding[token]
        if kind == "eagle3":
            both = rms(e, w["input_layernorm.weight"]), rms(g, w["hidden_norm.weight"])
            return torch.cat(both), g
        both = rms(e, w["enorm.weight"]), rms(g, w["hnorm.weight"])
        x = w["eh_proj.weight"] @ torch.cat(both)
        return rms(x, w["input_layernorm.weight"]), x

    def heads(name: str, x: Tensor, position: int | None) -> list[Tensor]:
        split = (w[f"self_attn.{name}_proj.weight"] @ x).view(-1, 8).unbind()
        if position is None:
            return list(split)
        if f"self_attn.{name}_norm.weight" in w:
            split = [rms(h, w[f"self_attn.{name}_norm.weight"]) for h in split]
        return [turned(h, position) for h in split]

    keys, values = [], []
    for t in range(anchor - 1):
        x, _ = pair(tokens[t + 1], feature(t))
        keys.append(heads("k", x, t))
        values.append(heads("v", x, None))
    state = feature(anchor - 1) if anchor else torch.zeros(16, dtype=torch.float64)
    hidden = []
    for slot, token in enumerate(forced):
        x, residual = pair(token, state)
        place = anchor - 1 + slot
        keys.append(heads("k", x, place))
        values.append(heads("v", x, None))
        attended = []
        for h, query in enumerate(heads("q", x, place)):
            scores = torch.stack([query @ key[h // 2] / math.sqrt(8) for key in keys])
            shares = scores.exp() / scores.exp().sum()
            attended.append(sum(s * value[h // 2] for s, value in zip(shares, values, strict=True)))
        state = residual + w["self_attn.o_proj.weight"] @ torch.cat(attended)
        x = rms(state, w["post_attention_layernorm.weight"])
        gate, up = w["mlp.gate_proj.weight"] @ x, w["mlp.up_proj.weight"] @ x
        state = state + w["mlp.down_proj.weight"] @ (gate / (1 + torch.exp(-gate)) * up)
        hidden.append(rms(state, w["norm.weight"]))
    return torch.stack(hidden)


def naive_forward(
    kind: str,
    drafter: CausalDrafter,
    batch: BlockBatch,
    features: TargetFeatures,
    embedding: Tensor,
    lengths: list[int],
) -> Tensor:
    blocks = []
    for n in range(len(batch.anchors)):
        document = int(batch.block_documents[n])
        own = slice(sum(lengths[:document]), sum(lengths[: document + 1]))
        blocks.append(
            naive_block(
                kind,
                dict(drafter.named_parameters()),
                batch.tokens[own].tolist(),
                features.context[own],
                features.final[own],
                embedding,
                int(batch.anchors[n]),
                batch.previous[n].tolist(),
            )
        )
    return torch.stack(blocks)


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize(
    ("kind", "changes"), [("eagle3", {}), ("eagle3", {"qk_norm": False}), ("mtp", {})]
)
def test_training_forward_is_the_equations(
    kind: str, changes: dict[str, Any], size: int, embedding: Tensor
) -> None:
    """Anchors at 0 and 1 see themselves only; a sample without a block is in the pack."""
    drafter = drafter_of(kind, block_size=size, **changes)
    named = "self_attn.q_norm.weight" in dict(drafter.named_parameters())
    assert named == changes.get("qk_norm", True)
    batch, features = pack_of(LENGTHS, ANCHORS, size)
    direction = torch.randn(len(batch.anchors), size, 16, dtype=torch.float64)

    output = drafter(features, batch, embedding)
    assert (output.latent, output.confidence_logits) == (None, None)
    (output.hidden * direction).sum().backward()
    found = {name: parameter.grad for name, parameter in drafter.named_parameters()}
    drafter.zero_grad(set_to_none=True)
    expected = naive_forward(kind, drafter, batch, features, embedding, LENGTHS)
    torch.testing.assert_close(output.hidden, expected, rtol=1e-6, atol=1e-6)
    (expected * direction).sum().backward()
    for name, parameter in drafter.named_parameters():
        assert parameter.grad is not None, name
        # angles are fp32
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_flex_attention_gives_the_same(kind: str, embedding: Tensor) -> None:
    drafter = drafter_of(kind).float()
    batch, features = pack_of(LENGTHS, ANCHORS)
    single = TargetFeatures(features.context.float(), features.final.float())
    with torch.no_grad():
        flex, sdpa = (
            drafter(single, batch, embedding.float(), attention=name).hidden
            for name in ("flex", "sdpa")
        )
    torch.testing.assert_close(flex, sdpa)


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_path_equals_training_forward(kind: str, embedding: Tensor) -> None:
    """Rows of different lengths, text arriving in pieces, rubbish behind, then one row alone."""
    lengths, anchors = [12, 15], [[4, 7], [1, 10]]
    drafter = drafter_of(kind)
    batch, features = pack_of(lengths, anchors)
    head = nn.Linear(16, 50, bias=False).double()
    with torch.no_grad():
        logits = head(drafter(features, batch, embedding).hidden)
    proposer = CausalProposer(drafter, embedding, head)
    proposer.start(2)
    seen = [0, 0]

    def observe(rows: list[int], ends: list[int]) -> None:
        """Each row's text up to its anchor; what is behind it is of another text."""
        starts, width = [seen[row] for row in rows], 2 + max(map(int.__sub__, ends, seen))
        tokens = torch.randint(0, 50, (len(rows), width))
        context = torch.randn(len(rows), width, 48, dtype=torch.float64)
        final = torch.randn(len(rows), width, 16, dtype=torch.float64)
        for index, (row, start, end) in enumerate(zip(rows, starts, ends, strict=True)):
            own = slice(row * lengths[0] + start, row * lengths[0] + end)
            tokens[index, : end - start] = batch.tokens[own]
            context[index, : end - start] = features.context[own]
            final[index, : end - start] = features.final[own]
            seen[row] = end
        counts = torch.tensor(ends) - torch.tensor(starts)
        end = max(starts) + width
        proposer.observe(Observation(tokens, context, final, torch.tensor(starts), counts, end))

    def check(blocks: list[int]) -> None:
        slots = iter(range(SHAPE.block_size))

        def forced(found: Tensor) -> tuple[Tensor, Tensor]:
            following = min(next(slots) + 1, SHAPE.block_size - 1)
            return batch.previous[blocks, following], found

        places = batch.anchors[blocks]
        proposal = proposer.propose(
            batch.previous[blocks, 0], places, int(places.max()) + 1, forced
        )
        torch.testing.assert_close(proposal.probabilities, logits[blocks])

    with torch.no_grad():
        observe([0, 1], [4, 1])
        check([0, 2])
        observe([0, 1], [6, 8])  # a piece after which nothing is proposed
        observe([0, 1], [7, 10])
        check([1, 3])
        proposer.select(torch.tensor([1]))
        check([3])


def test_a_prompt_of_one_token_is_enough(embedding: Tensor) -> None:
    drafter = drafter_of("eagle3")
    batch, features = pack_of([6], [[1]])
    head = nn.Linear(16, 50, bias=False).double()
    proposer = CausalProposer(drafter, embedding, head)
    proposer.start(1)
    one, zero = torch.tensor([1]), torch.tensor([0])
    first = batch.tokens[:1][None]
    with torch.no_grad():
        proposer.observe(
            Observation(first, features.context[:1][None], features.final[:1][None], zero, one, 1)
        )
        proposal = proposer.propose(
            batch.tokens[1:2], one, 2, lambda found: (batch.tokens[2:3], found)
        )
        expected = head(drafter(features, batch, embedding).hidden)[:, 0]
    torch.testing.assert_close(proposal.probabilities[:, 0], expected)


@pytest.mark.parametrize("kind", KINDS)
def test_shape_is_the_targets_and_one_layer(kind: str, target: Target) -> None:
    config = DrafterConfig(kind=kind, num_layers=1, block_size=3)
    shape = drafter_kind(kind).resolve(config, target)
    assert (shape.hidden_size, shape.vocab_size, shape.block_size) == (32, 260, 3)
    assert drafter_kind(kind).load(shape.to_dict()) == shape
    with pytest.raises(CheckpointError, match="head_dim"):
        DrafterShape.from_dict({k: v for k, v in shape.to_dict().items() if k != "head_dim"})
    with pytest.raises(ConfigError, match=rf"num_layers=2.*kind={kind} is one decoder layer"):
        drafter_kind(kind).resolve(replace(config, num_layers=2), target)
