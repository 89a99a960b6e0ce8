"""The V4-native drafter.

Known to be right by: its equations (checkpoint-formats.md, "Forward" 1-8) written out in fp64 with
loops, one slot at a time; Transformers' modules of the V4 target, which share the equations of a
stage, with the same weights; the proposer, fed in pieces with rubbish behind, giving the numbers of
one packed training forward; and a loss that falls on a real tiny V4.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DeepseekV4Config
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as v4

from deepspec.cli import main
from deepspec.config.schema import DrafterConfig
from deepspec.decoding import Decoder, Sampling, plain_decode
from deepspec.drafters.base import Observation
from deepspec.drafters.dspark import resolve_config as resolve_dense
from deepspec.drafters.dspark_v4 import (
    DSparkV4Config,
    DSparkV4Drafter,
    DSparkV4Proposer,
    resolve_config,
    shape_for,
)
from deepspec.drafters.dspark_v4.attention import attend
from deepspec.drafters.dspark_v4.experts import ExpertGroup, Routed
from deepspec.drafters.rotary import Rotary, rotate_pairs
from deepspec.errors import CheckpointError, ConfigError
from deepspec.evaluation.results import read_report
from deepspec.records import BlockBatch
from deepspec.targets import Target
from deepspec.training.checkpoint import load_drafter, read_checkpoint
from tests.deepseek_v4 import LAYER_IDS, load_v4, make_native, save_v4, shake, v4_config
from tests.drafters.naive_v4 import Naive
from tests.drafters.test_dspark import batch_of, of_context
from tests.recipes.small import small, words, write_prompts
from tests.trainers import build_trainer

OWN = {
    "target_layer_ids": (0, 2, 3),
    "num_layers": 3,
    "block_size": 4,
    "mask_token_id": 49,
    "markov_rank": 6,
    "confidence_detached": False,
}
# a window of 3 is shorter than the text; a limit of 1 clamps
CONFIG = shape_for(v4_config(vocab_size=50, hidden_size=32, sliding_window=3), **OWN)
LENGTHS, ANCHORS = [9, 5, 12], [[0, 2, 8], [], [1, 7]]


def native(config: DSparkV4Config) -> DSparkV4Drafter:
    drafter = DSparkV4Drafter(config).double()
    shake(drafter)
    return drafter


def inputs(config: DSparkV4Config) -> tuple[BlockBatch, Tensor, Tensor]:
    """Blocks, context and embedding."""
    generator = torch.Generator().manual_seed(2)
    batch = batch_of(LENGTHS, ANCHORS, config)  # type: ignore[arg-type]
    width = len(config.target_layer_ids) * config.hidden_size
    context = torch.randn(sum(LENGTHS), width, dtype=torch.float64, generator=generator)
    embedding = torch.randn(
        config.vocab_size, config.hidden_size, dtype=torch.float64, generator=generator
    )
    return batch, context, embedding


# ---------------------------------------------------------------------------- from the equations


def test_forward_is_its_equations() -> None:
    drafter = native(CONFIG)
    batch, context, embedding = inputs(CONFIG)
    got = drafter(of_context(context), batch, embedding)
    naive = Naive(drafter, embedding)
    starts = [0, 9, 14]
    for n, anchor in enumerate(batch.anchors.tolist()):
        own = context[starts[int(batch.block_documents[n])] :]
        states = naive.block(own, int(batch.previous[n, 0]), anchor)
        for k, state in enumerate(states):
            w1 = drafter.markov_head.markov_w1.weight[batch.previous[n, k]]
            joined = torch.cat((state, w1))  # the state before the norm
            close = {"atol": 1e-9, "rtol": 1e-9}
            torch.testing.assert_close(got.hidden[n, k], naive.rms(state, "norm.weight"), **close)
            assert torch.equal(got.latent[n, k], w1)
            torch.testing.assert_close(
                got.confidence_logits[n, k],
                (drafter.confidence_head.proj.weight @ joined)[0],
                **close,
            )


@pytest.mark.parametrize(
    "change",
    [
        {"sliding_window": 4},
        {"swiglu_limit": 1e9},
        {"hc_sinkhorn_iters": 19},
        {"rope_theta": 500.0},
        {"routed_scaling_factor": 1.0},
        {"gate.bias": 0.0},
        {"attn_sink": -1e9},
        {"hc_attn.base": 0.0},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_part_has_its_say_there(change: dict[str, Any]) -> None:
    """What the test above holds: each of these alone gives other numbers."""
    drafter = native(CONFIG)
    batch, context, embedding = inputs(CONFIG)
    before = drafter(of_context(context), batch, embedding).hidden
    (key, value), own = next(iter(change.items())), drafter.state_dict()
    if "." in key or key == "attn_sink":
        for name in own:
            if name.endswith(key):
                own[name].fill_(value)
    else:
        other = DSparkV4Drafter(replace(CONFIG, **change)).double()
        other.load_state_dict(own)
        drafter = other
    after = drafter(of_context(context), batch, embedding).hidden
    assert (before - after).abs().max() > 1e-8


# ------------------------------------------------------------------- from the target's own modules


@pytest.fixture(scope="module")
def text() -> DeepseekV4Config:
    """A V4 of one sliding-window layer with routed experts: what a stage is made of."""
    found = v4_config(hidden_size=32, vocab_size=50, num_hidden_layers=1)
    found.layer_types, found.mlp_layer_types = ["sliding_attention"], ["moe"]
    found._attn_implementation = "eager"
    return found


@pytest.fixture(scope="module")
def alike(text: DeepseekV4Config) -> DSparkV4Drafter:
    return native(shape_for(text, **{**OWN, "num_layers": 1}))


def draw(*size: int) -> Tensor:
    return torch.randn(*size, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def test_hyper_connections_are_the_targets(text: DeepseekV4Config, alike: DSparkV4Drafter) -> None:
    mine, streams, output = alike.draft_stages[0].hc_attn, draw(2, 5, 4, 32), draw(2, 5, 32)
    theirs = v4.DeepseekV4HyperConnection(text).double()
    theirs.load_state_dict(mine.state_dict())
    post, comb, entered = theirs(streams)
    expected = post[..., None] * output[..., None, :] + comb.transpose(-1, -2) @ streams
    seen: list[Tensor] = []
    got = mine(streams, lambda states: seen.append(states) or output)
    close = {"atol": 1e-5, "rtol": 1e-5}  # Transformers mixes in fp32
    torch.testing.assert_close(seen[0], entered, **close)
    torch.testing.assert_close(got, expected, **close)
    head = v4.DeepseekV4HyperHead(text).double()
    head.load_state_dict({f"hc_{name}": t for name, t in alike.hc_head.state_dict().items()})
    torch.testing.assert_close(alike.hc_head(streams), head(streams), **close)


def test_experts_are_the_targets(text: DeepseekV4Config, alike: DSparkV4Drafter) -> None:
    mine, states = alike.draft_stages[0].ffn, draw(2, 5, 32)
    own = mine.state_dict()

    def stacked(matrix: int) -> Tensor:
        return torch.cat([own[f"experts.{group}.w{matrix}"] for group in (0, 1)])

    theirs = v4.DeepseekV4SparseMoeBlock(text, 0).double()
    theirs.load_state_dict(
        {
            "gate.weight": own["gate.weight"],
            "gate.e_score_correction_bias": own["gate.bias"],
            "experts.gate_up_proj": torch.cat((stacked(1), stacked(3)), dim=1),
            "experts.down_proj": stacked(2),
            "shared_experts.gate_proj.weight": own["shared_experts.w1.weight"],
            "shared_experts.up_proj.weight": own["shared_experts.w3.weight"],
            "shared_experts.down_proj.weight": own["shared_experts.w2.weight"],
        }
    )
    torch.testing.assert_close(mine(states), theirs(states))


def test_attention_is_the_targets(text: DeepseekV4Config, alike: DSparkV4Drafter) -> None:
    """There context and block in a row: three positions and four, of which the four see all."""
    mine, rows, positions = alike.draft_stages[0].attn, draw(1, 7, 32), torch.arange(20, 27)
    names = {
        "q_a_proj": "wq_a",
        "q_a_norm": "q_norm",
        "q_b_proj": "wq_b",
        "kv_proj": "wkv",
        "kv_norm": "kv_norm",
        "o_a_proj": "wo_a",
        "o_b_proj": "wo_b",
    }
    own = mine.state_dict()
    theirs = v4.DeepseekV4Attention(text, 0).double()
    theirs.load_state_dict(
        {f"{name}.weight": own[f"{short}.weight"] for name, short in names.items()}
        | {"sinks": own["attn_sink"]}
    )
    tables = v4.DeepseekV4RotaryEmbedding(text)(rows, positions[None], layer_type="main")
    all_seen = torch.zeros(1, 1, 7, 7).double()
    expected, _ = theirs(rows, {"main": tables}, positions[None], all_seen)

    rotation = alike.rotary(positions, torch.float64)
    context = mine.latent(rows[0, :3], (rotation[0][:3], rotation[1][:3]))

    def see(block: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat((context[None], block), dim=1), torch.ones(1, 7, dtype=torch.bool)

    got = mine(rows[:, 3:], (rotation[0][None, 3:], rotation[1][None, 3:]), see)
    torch.testing.assert_close(got, expected[:, 3:], atol=1e-6, rtol=1e-6)


def test_pairs_are_turned_as_in_transformers() -> None:
    states, positions = torch.randn(1, 3, 7, 20), torch.tensor([[0, 1, 5, 30, 31, 100, 200]])
    rotation = Rotary(8, {"rope_type": "default", "rope_theta": 1e4}, 0)(positions, torch.float32)
    cos, sin = (table[..., :4] for table in rotation)
    expected = v4.apply_rotary_pos_emb(states, cos, sin)
    got = rotate_pairs(states.transpose(1, 2), rotation)
    torch.testing.assert_close(got.transpose(1, 2), expected)
    torch.testing.assert_close(
        rotate_pairs(got, rotation, inverse=True), states.transpose(1, 2), atol=1e-6, rtol=1e-5
    )


def test_gradients_of_experts_are_those_of_their_values() -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, dtype=torch.float64, generator=generator, requires_grad=True)

    rows, loads = torch.tensor([0, 2, 4, 0, 1, 3, 4, 1, 2]), [3, 4, 0, 2]  # slots of each expert
    assert torch.autograd.gradcheck(
        lambda *tensors: Routed.apply(*tensors, rows, loads, 0.5, torch.float64),
        (draw(5, 4), draw(9), draw(4, 6, 4), draw(4, 4, 6), draw(4, 6, 4)),
    )


def test_experts_under_autocast_round_products_alone() -> None:
    group, rows = ExpertGroup(CONFIG, 4), torch.tensor([0, 2, 4, 0, 1, 3, 4, 1, 2])
    shake(group)
    states, weights = torch.randn(5, 32), torch.rand(9, requires_grad=True)
    exact = group(states, weights, rows, [3, 4, 0, 2])
    with torch.autocast("cpu", torch.bfloat16):
        rounded = group(states, weights, rows, [3, 4, 0, 2])
    assert not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, atol=0.1, rtol=0.05)
    found = [torch.autograd.grad(y.sum(), (weights, group.w2)) for y in (exact, rounded)]
    for one, other in zip(*found, strict=True):
        assert one.dtype == other.dtype == torch.float32
        torch.testing.assert_close(other, one, atol=0.1, rtol=0.05)


def test_gradients_of_attention_reach_the_sinks() -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, dtype=torch.float64, generator=generator, requires_grad=True)

    visible = torch.tensor([[True] * 5, [False, False, True, True, True]])
    assert torch.autograd.gradcheck(attend, (draw(2, 3, 2, 4), draw(2, 5, 4), visible, draw(2)))


# ---------------------------------------------------------------------------- training, decoding


def test_a_block_sees_its_window_and_nothing_else() -> None:
    drafter = native(CONFIG)
    batch, context, embedding = inputs(CONFIG)
    before = drafter(of_context(context), batch, embedding).hidden
    for changed, seen_by in (
        (range(8, 14), []),  # at the anchor of block 2 and behind it, and another text
        (range(5), [1]),  # before the window of block 2
        ([5], [2]),  # its first position
        ([14], [3]),
        (range(15, 18), []),
        ([20], [4]),  # the last before an anchor
    ):
        other = context.clone()
        other[list(changed)] += 1
        after = drafter(of_context(other), batch, embedding).hidden
        # not bitwise: another block's experts change the sizes of products
        differs = (before - after).abs().amax((1, 2)) > 1e-12
        assert differs.nonzero().flatten().tolist() == seen_by


@pytest.mark.parametrize("window", [3, 8, 128])
def test_decoding_path_equals_training_forward(window: int) -> None:
    """Rows of different lengths, context arriving in pieces, rubbish behind: same numbers."""
    config = replace(CONFIG, sliding_window=window)
    drafter = native(config)
    batch = batch_of([9, 12], [[4, 8], [3, 10]], config)  # type: ignore[arg-type]
    context = torch.randn(21, 96, dtype=torch.float64)
    embedding = torch.randn(50, 32, dtype=torch.float64)
    trained = drafter(of_context(context), batch, embedding)
    head = nn.Linear(32, 50, bias=False).double()
    logits = head(trained.hidden) + trained.latent @ drafter.bias_weight.T

    proposer = DSparkV4Proposer(drafter, embedding, head)
    proposer.start(2)
    rows = [context[:9], context[9:]]

    def observe(starts: list[int], width: int) -> None:
        pieces = [row[start : start + width] for row, start in zip(rows, starts, strict=True)]
        block = torch.stack(
            [torch.cat((p, torch.randn(width - len(p), 96, dtype=p.dtype))) for p in pieces]
        )
        start = torch.tensor(starts)
        tokens = torch.zeros(2, width, dtype=torch.int64)
        proposer.observe(Observation(tokens, block, block, start, start, max(starts) + width))

    def compare(blocks: list[int]) -> None:
        slots = iter(range(config.block_size))

        def forced(given: Tensor) -> tuple[Tensor, Tensor]:
            slot = next(slots)
            following = batch.previous[blocks, min(slot + 1, config.block_size - 1)]
            return following, given

        anchors = batch.anchors[blocks]
        proposal = proposer.propose(
            batch.previous[blocks, 0], anchors, int(anchors.max()) + 1, forced
        )
        torch.testing.assert_close(proposal.probabilities, logits[blocks])
        expected = trained.confidence_logits[blocks].sigmoid().float()
        torch.testing.assert_close(proposal.confidence, expected)

    observe([0, 0], 5)  # row 0 is at 4, row 1 at 3: what lies behind is rubbish
    compare([0, 2])
    observe([4, 3], 8)
    compare([1, 3])
    proposer.select(torch.tensor([1]))
    compare([3])


def test_a_request_of_one_token_has_no_context() -> None:
    drafter = native(CONFIG)
    batch, context, embedding = inputs(CONFIG)
    head = nn.Linear(32, 50, bias=False).double()
    proposer = DSparkV4Proposer(drafter, embedding, head)
    proposer.start(1)
    first = head(drafter(of_context(context), batch, embedding).hidden)[0, 0]
    seen: list[Tensor] = []

    def draw(logits: Tensor) -> tuple[Tensor, None]:
        seen.append(logits)
        return logits.argmax(-1), None

    anchor = batch.previous[:1, 0]
    proposer.propose(anchor, torch.tensor([0]), 1, draw)
    bias = drafter.bias_weight @ drafter.markov_head.markov_w1.weight[anchor[0]]
    torch.testing.assert_close(seen[0][0], first + bias)


def test_rows_of_a_batch_draft_alike(target: Target) -> None:
    """In the decoding loop, where rows have their own lengths and leave when they are done. The
    target is a small Qwen3, because V4 decodes row by row."""
    shape = shape_for(v4_config(hidden_size=32), **{**OWN, "mask_token_id": 3})
    drafter = DSparkV4Drafter(shape)
    shake(drafter)
    generator = torch.Generator().manual_seed(4)
    prompts = [torch.randint(4, 260, (n,), generator=generator).tolist() for n in (1, 4, 9, 20)]
    names = [str(i) for i in range(len(prompts))]
    proposer = DSparkV4Proposer(drafter, target.embedding, target.head)
    plain = plain_decode(target, prompts, Sampling(), 12, batch_size=1, stop_token_ids=[])
    seen = []
    for batch in (1, 3):
        decoder = Decoder(target, proposer, batch, [])
        result = decoder.generate(prompts, Sampling(), 12, requests=names)
        assert [c.tokens for c in result.completions] == [c.tokens for c in plain.completions]
        traces = sorted(result.traces, key=lambda trace: (trace.request, trace.round))
        seen.append(
            (
                [(trace.request, trace.position, trace.accepted) for trace in traces],
                torch.tensor([trace.confidences for trace in traces]),
            )
        )
    assert seen[0][0] == seen[1][0]
    torch.testing.assert_close(seen[0][1], seen[1][1], atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def v4_target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return load_v4(save_v4(tmp_path_factory.mktemp("v4")))


NATIVE = (
    "drafter.kind=dspark_v4",
    "export.format=deepseek_v4",
    "drafter.num_layers=3",
    "training.learning_rate=0.01",
    "training.epochs=4",
)


def test_loss_falls_on_a_tiny_v4_and_its_checkpoint_holds_all(
    v4_target: Target, tmp_path: Path
) -> None:
    trainer = build_trainer(v4_target, tmp_path / "run", *NATIVE)
    gates = {n: b.fill_(0.1) for n, b in trainer.distillation.drafter.named_buffers()}
    assert len(gates) == 3
    losses = [trainer.train_step()["loss"] for _ in range(12)]
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4]), losses
    assert all(bias.eq(0.1).all() for bias in gates.values()), "nothing moves the bias"

    checkpoint = read_checkpoint(trainer.save())
    trained, loaded = trainer.distillation.drafter.state_dict(), load_drafter(checkpoint)
    assert all(torch.equal(t, trained[name]) for name, t in loaded.state_dict().items())
    again = build_trainer(v4_target, tmp_path / "again", *NATIVE)
    again.resume(checkpoint)
    assert again.train_step()["loss"] == trainer.train_step()["loss"]
    for one in (trainer, again):
        one.folder.__exit__(None, None, None)


def test_micro_batches_and_recomputing_change_nothing(v4_target: Target, tmp_path: Path) -> None:
    steps = []
    for change in ("micro_batch_size=1", "micro_batch_size=4", "activation_checkpointing=true"):
        trainer = build_trainer(v4_target, tmp_path / change, *NATIVE, f"training.{change}")
        rows = [trainer.train_step() for _ in range(2)]
        steps.append([row[key] for row in rows for key in ("loss", "gradient_norm")])
        trainer.folder.__exit__(None, None, None)
    assert steps[1] == pytest.approx(steps[0], rel=1e-4)
    assert steps[2] == pytest.approx(steps[0], rel=1e-4)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_v4_decodes_with_it_what_it_decodes_alone(v4_target: Target, batch: int) -> None:
    drafter = make_native(v4_target)
    proposer = DSparkV4Proposer(drafter, v4_target.embedding, v4_target.head)
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(4, 260, (n,), generator=generator).tolist() for n in (2, 17, 5)]
    plain = plain_decode(v4_target, prompts, Sampling(), 10, batch_size=1, stop_token_ids=[])
    drafted = Decoder(v4_target, proposer, batch, []).generate(prompts, Sampling(), 10)
    assert [c.tokens for c in drafted.completions] == [c.tokens for c in plain.completions]
    assert any(trace.accepted < trace.scheduled for trace in drafted.traces)


@pytest.mark.slow  # a V4 decodes slowly; the parts are tested one by one
def test_from_the_command_line(v4_target: Target, tmp_path: Path) -> None:
    """Trained, evaluated losslessly, exported, and the export evaluated: the same drafts."""
    settings = small(Path(v4_target.name), write_prompts(tmp_path / "prompts.jsonl"))
    del settings["target.num_layer_ids"]
    settings |= {"target.layer_ids": str(LAYER_IDS), "drafter.mask_token_id": "3"}
    settings |= {"export.format": "deepseek_v4", "training.max_steps": "1"}
    out = tmp_path / "run"
    main(["train", "recipe=tiny", "drafter=dspark_v4", f"out={out}", *words(settings)])
    report = read_report(out / "report.json")
    assert report.drafter["kind"] == "dspark_v4"
    assert all(result.baseline.unexplained == 0 for result in report.results if result.baseline)
    evaluated = ("decoding.max_new_tokens", "evaluation.limit", "evaluation.benchmarks")
    own = {key: settings[key] for key in (*evaluated, "target.path", "target.layer_ids")}
    main(["evaluate", f"run={out / 'export'}", f"out={tmp_path / 'again'}", *words(own)])
    again = read_report(tmp_path / "again" / "report.json")
    assert again.drafter["kind"] == "dspark_v4"
    assert again.results[0].rounds > 0


# --------------------------------------------------------------------------------------- config


def test_shape_is_the_targets_own(v4_target: Target) -> None:
    shape = resolve_config(
        DrafterConfig(kind="dspark_v4", num_layers=3, block_size=5, markov_rank=8), v4_target
    )
    text = v4_target.config
    assert shape == DSparkV4Config(
        hidden_size=64,
        vocab_size=260,
        num_target_layers=5,
        target_layer_ids=tuple(LAYER_IDS),
        num_layers=3,
        num_attention_heads=4,
        head_dim=16,
        qk_rope_head_dim=8,
        rope_theta=10000.0,
        q_lora_rank=20,
        o_groups=2,
        o_lora_rank=12,
        sliding_window=8,
        hc_mult=4,
        hc_sinkhorn_iters=20,
        hc_eps=1e-6,
        n_routed_experts=18,
        num_experts_per_tok=2,
        moe_intermediate_size=8,
        routed_scaling_factor=1.5,
        swiglu_limit=1.0,
        block_size=5,
        mask_token_id=3,
        markov_rank=8,
        confidence_detached=False,
        rms_norm_eps=1e-6,
        initializer_range=0.2,
    )
    assert text.rope_parameters["compress"]["rope_theta"] != shape.rope_theta
    assert DSparkV4Config.from_dict(shape.to_dict()) == shape
    with pytest.raises(CheckpointError, match="q_lora_rank"):
        DSparkV4Config.from_dict({k: v for k, v in shape.to_dict().items() if k != "q_lora_rank"})


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"markov_head": "rnn"}, "drafter.markov_head=rnn .* set drafter.markov_head=vanilla"),
        ({"head_dim": 8}, "drafter.head_dim=8 .* set drafter.head_dim=null, or drafter=dspark"),
        ({"confidence_head": False}, "set drafter.confidence_head=true"),
        ({"markov_rank": 0}, "drafter.markov_rank=0"),
        ({"mask_token_id": 128799}, "drafter.mask_token_id=128799 is outside"),
    ],
)
def test_what_the_format_fixes(v4_target: Target, change: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        resolve_config(DrafterConfig(kind="dspark_v4", **change), v4_target)


def test_other_families_are_sent_to_the_dense_kind(target: Target) -> None:
    with pytest.raises(ConfigError, match=r"target\.path is a qwen3 one; set drafter=dspark"):
        resolve_config(DrafterConfig(kind="dspark_v4"), target)


def test_the_dense_kind_drafts_for_v4_too(v4_target: Target, tmp_path: Path) -> None:
    shape = resolve_dense(DrafterConfig(num_layers=1, num_key_value_heads=2), v4_target)
    assert shape.rope_parameters["rope_theta"] == 10000.0
    assert shape.rope_parameters["rope_type"] == "default"
    trainer = build_trainer(v4_target, tmp_path / "dense", *NATIVE[3:])
    losses = [trainer.train_step()["loss"] for _ in range(12)]
    trainer.folder.__exit__(None, None, None)
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4]), losses


def test_untrained_drafter_adds_no_bias() -> None:
    assert not DSparkV4Drafter(CONFIG).bias_weight.any()


def test_published_sizes_make_the_published_number_of_weights() -> None:
    """Flash, by the shapes that the layout lists (checkpoint-formats.md), stage by stage."""
    text = DeepseekV4Config()
    shape = shape_for(text, **{**OWN, "markov_rank": 256, "target_layer_ids": (40, 41, 42)})
    with torch.device("meta"):
        drafter = DSparkV4Drafter(shape)
    attention = 1024 * 4096 + 32768 * 1024 + 512 * 4096 + 8192 * 4096 + 4096 * 8192
    attention += 1024 + 512 + 64
    experts = 257 * 3 * 2048 * 4096 + 256 * 4096
    hyper = 2 * (24 * 16384 + 24 + 3)
    heads = 4096 + 2 * 129280 * 256 + 4352 + 4 * 16384 + 4 + 1
    expected = 3 * (attention + experts + hyper + 2 * 4096) + 4096 * 12288 + 4096 + heads
    assert sum(parameter.numel() for parameter in drafter.parameters()) == expected
