"""The drafter against naive references, and its training forward against its decoding path.

Known to be right by: attention written as loops over single keys; the head equations written
slot by slot; transformers' own rotary embedding; and the proposer, fed position by position with
changing row lengths, giving the hidden states of one packed training forward.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from deepspec.drafters.attention import block_attention, build_visibility
from deepspec.drafters.base import Observation
from deepspec.drafters.dspark import DSparkConfig, DSparkDrafter, DSparkProposer
from deepspec.drafters.dspark.heads import GatedMarkovHead, RnnMarkovHead
from deepspec.drafters.rotary import Rotary, rotate
from deepspec.drafters.shape import _rope_parameters
from deepspec.errors import CheckpointError
from deepspec.records import BlockBatch, TargetFeatures

CONFIG = DSparkConfig(
    hidden_size=32,
    vocab_size=50,
    num_target_layers=6,
    target_layer_ids=(0, 2, 4),
    num_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=48,
    block_size=4,
    mask_token_id=49,
    markov_head="vanilla",
    markov_rank=6,
    confidence_head=True,
    confidence_with_markov=True,
    confidence_detached=False,
    rms_norm_eps=1e-6,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    max_position_embeddings=128,
    initializer_range=0.3,
)


def drafter_of(config: DSparkConfig) -> DSparkDrafter:
    torch.manual_seed(0)
    drafter = DSparkDrafter(config).double()
    if drafter.markov_head is not None:
        nn.init.normal_(drafter.markov_head.markov_w2.weight)
    return drafter


def batch_of(lengths: list[int], anchors: list[list[int]], config: DSparkConfig) -> BlockBatch:
    """A pack of random tokens; labels and weights play no part in the forward."""
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randint(0, 40, (length,), generator=generator) for length in lengths]
    size = config.block_size
    previous, rows = [], []
    for index, (ids, own) in enumerate(zip(tokens, anchors, strict=True)):
        padded = torch.cat((ids, ids.new_zeros(size)))
        for anchor in own:
            previous.append(padded[anchor : anchor + size])
            rows.append(sum(lengths[:index]) + anchor)
    count = len(rows)
    return BlockBatch(
        tokens=torch.cat(tokens),
        document_ids=torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)),
        positions=torch.cat([torch.arange(length) for length in lengths]),
        block_documents=torch.tensor([i for i, own in enumerate(anchors) for _ in own]),
        anchors=torch.tensor([anchor for own in anchors for anchor in own]),
        rows=torch.tensor(rows),
        previous=torch.stack(previous),
        labels=torch.zeros(count, size, dtype=torch.int64),
        weights=torch.ones(count, size),
        followed_rows=torch.zeros(count, size, dtype=torch.int64),
        sample_ids=tuple(str(i) for i in range(len(lengths))),
    )


def of_context(context: Tensor) -> TargetFeatures:
    """Features whose final states play no part."""
    return TargetFeatures(context, context[:, :0])


LENGTHS, ANCHORS = [9, 5, 12], [[0, 3, 8], [], [2, 7]]


def naive_attention(q: Tensor, ck: Tensor, cv: Tensor, bk: Tensor, bv: Tensor, batch: BlockBatch):
    """One query at a time, over a list of the keys it may see."""
    out = torch.empty_like(q)
    group = q.shape[2] // ck.shape[1]
    for n in range(q.shape[0]):
        seen = [
            t
            for t in range(ck.shape[0])
            if batch.document_ids[t] == batch.block_documents[n]
            and batch.positions[t] < batch.anchors[n]
        ]
        keys, values = torch.cat((ck[seen], bk[n])), torch.cat((cv[seen], bv[n]))
        for k in range(q.shape[1]):
            for h in range(q.shape[2]):
                scores = keys[:, h // group] @ q[n, k, h] / q.shape[3] ** 0.5
                out[n, k, h] = scores.softmax(0) @ values[:, h // group]
    return out


@pytest.mark.parametrize("implementation", ["sdpa", "flex"])
def test_attention_equals_loops_over_visible_keys(implementation: str) -> None:
    batch = batch_of(LENGTHS, ANCHORS, CONFIG)
    total, blocks = sum(LENGTHS), batch.anchors.shape[0]
    generator = torch.Generator().manual_seed(2)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    q = draw(blocks, 4, 4, 16)
    ck, cv = draw(total, 2, 16), draw(total, 2, 16)
    bk, bv = draw(blocks, 4, 2, 16), draw(blocks, 4, 2, 16)
    got = block_attention(q, ck, cv, bk, bv, build_visibility(batch, implementation))
    torch.testing.assert_close(got, naive_attention(q, ck, cv, bk, bv, batch))


def test_flex_attends_in_the_dtype_of_values() -> None:
    """Behind norms and rotation autocast leaves queries and keys in fp32, and values in bf16."""
    batch = batch_of(LENGTHS, ANCHORS, CONFIG)
    torch.manual_seed(0)
    total, blocks = sum(LENGTHS), batch.anchors.shape[0]
    q, bk, bv = torch.randn(blocks, 4, 4, 16), *torch.randn(2, blocks, 4, 2, 16)
    ck, cv = torch.randn(2, total, 2, 16)
    seen = build_visibility(batch, "flex")
    low = [states.bfloat16() for states in (q, ck, cv, bk, bv)]
    got = block_attention(q, ck, low[2], bk, low[4], seen)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, block_attention(*low, seen))


def test_a_block_sees_nothing_at_or_behind_its_anchor() -> None:
    """Changing features at positions >= anchor, or of another sample, changes nothing."""
    drafter = drafter_of(CONFIG)
    batch = batch_of(LENGTHS, ANCHORS, CONFIG)
    context = torch.randn(sum(LENGTHS), 3 * 32, dtype=torch.float64)
    embedding = torch.randn(50, 32, dtype=torch.float64)
    before = drafter(of_context(context), batch, embedding).hidden
    changed = context.clone()
    changed[3:9] += 1  # sample 0 from its second anchor on
    after = drafter(of_context(changed), batch, embedding).hidden
    same = [0, 1, 3, 4]
    assert torch.equal(before[same], after[same])
    assert not torch.allclose(before[2], after[2])


@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn", "dflash"])
def test_decoding_path_equals_training_forward(kind: str) -> None:
    """Rows of different lengths, context arriving in pieces, rubbish behind: same numbers."""
    config = (
        replace(CONFIG, markov_rank=0, confidence_head=False, confidence_with_markov=False)
        if kind == "dflash"
        else replace(CONFIG, markov_head=kind)
    )
    drafter = drafter_of(config)
    batch = batch_of([9, 12], [[4, 8], [3, 10]], config)
    context = torch.randn(21, 96, dtype=torch.float64)
    embedding = torch.randn(50, 32, dtype=torch.float64)
    trained = drafter(of_context(context), batch, embedding)
    head = nn.Linear(32, 50, bias=False).double()
    logits = head(trained.hidden)
    if trained.latent is not None:
        logits = logits + trained.latent @ drafter.bias_weight.T

    proposer = DSparkProposer(drafter, embedding, head)
    proposer.start(2)
    rows = [context[:9], context[9:]]

    def observe(starts: list[int], width: int) -> None:
        pieces = [row[start : start + width] for row, start in zip(rows, starts, strict=True)]
        block = torch.stack(
            [torch.cat((p, torch.randn(width - len(p), 96, dtype=p.dtype))) for p in pieces]
        )
        tokens = torch.zeros(2, width, dtype=torch.int64)
        start = torch.tensor(starts)
        seen = Observation(tokens, block, block, start, start, max(starts) + width)
        proposer.observe(seen)

    observe([0, 0], 5)  # row 0 is at 4, row 1 at 3: what lies behind is rubbish
    for round_, (blocks, anchors) in enumerate([([0, 2], [4, 3]), ([1, 3], [8, 10])]):
        if round_:
            observe([4, 3], 8)
        slots = iter(range(config.block_size))

        def forced(
            logits_: Tensor, blocks: list[int] = blocks, slots=slots
        ) -> tuple[Tensor, Tensor]:
            slot = next(slots)
            if slot + 1 < config.block_size:
                return batch.previous[blocks, slot + 1], logits_
            return torch.zeros(2, dtype=torch.int64), logits_

        proposal = proposer.propose(
            batch.previous[blocks, 0], torch.tensor(anchors), max(anchors) + 1, forced
        )
        torch.testing.assert_close(proposal.probabilities, logits[blocks])
        if trained.confidence_logits is None:
            assert proposal.confidence is None
        else:
            expected = trained.confidence_logits[blocks].sigmoid().float()
            torch.testing.assert_close(proposal.confidence, expected)


def test_gated_head_is_its_equation() -> None:
    torch.manual_seed(0)
    head = GatedMarkovHead(8, 20, 5)
    hidden, previous = torch.randn(3, 4, 8), torch.randint(0, 20, (3, 4))
    latent, embedded = head(hidden, previous)
    w1 = head.markov_w1.weight[previous]
    gate = 1 / (
        1
        + torch.exp(
            -(
                hidden @ head.gate_proj.weight[:, :8].T
                + w1 @ head.gate_proj.weight[:, 8:].T
                + head.gate_proj.bias
            )
        )
    )
    torch.testing.assert_close(latent, gate * w1)
    torch.testing.assert_close(embedded, w1)


def test_rnn_head_is_its_equation_and_starts_at_zero() -> None:
    torch.manual_seed(0)
    head = RnnMarkovHead(8, 20, 5)
    hidden, previous = torch.randn(3, 4, 8), torch.randint(0, 20, (3, 4))
    latent, _ = head(hidden, previous)
    for n in range(3):
        state = torch.zeros(5)
        for k in range(4):
            z = torch.cat((state, head.markov_w1.weight[previous[n, k]], hidden[n, k]))
            joint = head.joint_proj.weight @ z + head.joint_proj.bias
            gate, candidate, output = joint[:5].sigmoid(), joint[5:10].tanh(), joint[10:]
            state = gate * state + (1 - gate) * candidate
            torch.testing.assert_close(latent[n, k], output.tanh())


def test_rotary_equals_transformers() -> None:
    from transformers import Qwen3Config
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding, apply_rotary_pos_emb

    for parameters in (
        {"rope_type": "default", "rope_theta": 1e6},
        {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "original_max_position_embeddings": 256,
            "short_factor": [1.0 + 0.1 * pair for pair in range(8)],
            "long_factor": [2.0] * 8,
        },
    ):
        config = Qwen3Config(head_dim=16, rope_parameters=parameters, max_position_embeddings=256)
        states = torch.randn(1, 2, 7, 16)  # [B, H, T, E]
        positions = torch.tensor([[0, 1, 5, 30, 31, 100, 200]])
        cos, sin = Qwen3RotaryEmbedding(config)(states, positions)
        expected, _ = apply_rotary_pos_emb(states, states, cos, sin)
        rotation = Rotary(16, parameters, 256)(positions, torch.float32)
        got = rotate(states.transpose(1, 2), rotation).transpose(1, 2)
        torch.testing.assert_close(got, expected)


def test_a_drafter_takes_no_sections_of_its_targets_rotation() -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
    sections = {"partial_rotary_factor": 0.25, "mrope_interleaved": True, "mrope_section": [1, 1]}
    for own in (yarn, {"rope_type": "default", "rope_theta": 1e7}):
        assert _rope_parameters(SimpleNamespace(rope_parameters=own | sections)) == own


@pytest.mark.parametrize("kind", ["llama3", "dynamic", "longrope"])
def test_of_scalings_that_an_engine_drops_the_base_is_taken(kind: str) -> None:
    rope = {"rope_type": kind, "rope_theta": 5e5, "factor": 8.0}
    plain = {"rope_type": "default", "rope_theta": 5e5}
    assert _rope_parameters(SimpleNamespace(rope_parameters=rope)) == plain


def test_a_block_starts_with_its_anchor_and_masks_follow() -> None:
    drafter = drafter_of(CONFIG)
    assert drafter.inputs(torch.tensor([7, 8])).tolist() == [[7, 49, 49, 49], [8, 49, 49, 49]]


def test_untrained_drafter_is_a_dflash_one() -> None:
    drafter = DSparkDrafter(CONFIG)
    assert drafter.bias_weight is not None
    assert not drafter.bias_weight.any()


def test_confidence_can_be_kept_from_the_backbone() -> None:
    for detached in (False, True):
        drafter = drafter_of(replace(CONFIG, confidence_detached=detached))
        batch = batch_of(LENGTHS, ANCHORS, CONFIG)
        context = torch.randn(sum(LENGTHS), 96, dtype=torch.float64)
        output = drafter(of_context(context), batch, torch.randn(50, 32, dtype=torch.float64))
        output.confidence_logits.sum().backward()
        assert drafter.confidence_head.proj.weight.grad is not None
        assert (drafter.fc.weight.grad is None) == detached


def test_config_round_trip_and_its_refusals() -> None:
    assert DSparkConfig.from_dict(CONFIG.to_dict()) == CONFIG
    older = {k: v for k, v in CONFIG.to_dict().items() if not k.startswith("draft_vocab")}
    assert DSparkConfig.from_dict(older) == CONFIG
    with pytest.raises(CheckpointError, match="markov_rank"):
        DSparkConfig.from_dict({k: v for k, v in CONFIG.to_dict().items() if k != "markov_rank"})
    with pytest.raises(CheckpointError, match="sample_from_anchor"):
        DSparkConfig.from_dict({**CONFIG.to_dict(), "sample_from_anchor": False})
