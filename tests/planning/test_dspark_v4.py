"""The V4-native drafter in a plan, against what autograd keeps and what torch's counter counts."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import DeepseekV4Config

from deepspec.cli import main
from deepspec.config.loading import load_config
from deepspec.drafters.dspark_v4 import DSparkV4Config, DSparkV4Drafter, shape_for
from deepspec.planning.dspark_v4 import v4_flops
from deepspec.planning.memory import activations
from deepspec.planning.shapes import Job, MicroBatch, Shapes
from deepspec.planning.states import engine_states
from deepspec.records import BlockBatch
from tests.conftest import make_tokenizer
from tests.deepseek_v4 import v4_config
from tests.drafters.test_dspark import batch_of, of_context

WIDE = shape_for(
    v4_config(
        hidden_size=256,
        num_attention_heads=8,
        head_dim=64,
        q_lora_rank=48,
        o_groups=4,
        o_lora_rank=40,
        n_routed_experts=16,
        num_experts_per_tok=3,
        moe_intermediate_size=112,
        sliding_window=32,
        initializer_range=0.02,
    ),
    target_layer_ids=(0, 2, 3),
    num_layers=2,
    block_size=5,
    mask_token_id=49,
    markov_rank=24,
    confidence_detached=False,
)
BATCH = MicroBatch((100, 60), (16, 12), 5)
ANCHORS = [list(range(40, 88, 3)), list(range(33, 57, 2))]  # behind a whole window


def made(shape: DSparkV4Config) -> tuple[DSparkV4Drafter, BlockBatch, Tensor, Tensor]:
    torch.manual_seed(0)
    batch = batch_of([100, 60], ANCHORS, shape)  # type: ignore[arg-type]
    context = torch.randn(160, 3 * shape.hidden_size)
    return DSparkV4Drafter(shape), batch, context, torch.randn(260, shape.hidden_size)


def job_of(drafter: DSparkV4Drafter, precision: str, *words: str) -> Job:
    config = load_config("tiny", [f"training.precision={precision}", *words])
    linear = [m.weight for m in drafter.modules() if isinstance(m, torch.nn.Linear)]
    casts = sum(w.numel() for w in linear if w is not drafter.bias_weight)
    value = {"bf16": 2, "fp32": 4}[precision]
    shapes = Shapes(
        drafter=drafter.config,
        drafted=drafter.config.vocab_size,
        parameters=(),
        largest=0,
        casts=casts,
        target_parameters=0,
        target_active=0,
        ends=0,
        scaled_ends=0,
        saved_value=value,
        soft_cap=False,
        by_token=True,
        text=None,
    )
    config.target.dtype = "auto"
    return Job(config, shapes, 1, cuda=False)


@pytest.mark.parametrize(("precision", "within"), [("fp32", 0.01), ("bf16", 0.08)])
@pytest.mark.parametrize(
    "changes", [{}, {"num_layers": 3}, {"num_attention_heads": 16, "head_dim": 128}]
)
def test_activations_are_what_autograd_keeps(
    precision: str, within: float, changes: dict[str, Any]
) -> None:
    """bf16: what autocast caches without autograd's keeping it, main_proj, is in the plan alone."""
    drafter, batch, context, embedding = made(replace(WIDE, **changes))
    if precision == "bf16":
        context, embedding = context.bfloat16(), embedding.bfloat16()
    known = {*drafter.parameters(), context, embedding}
    kept: dict[int, tuple[int, Tensor]] = {}
    outside = {tensor.untyped_storage().data_ptr() for tensor in known}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in outside:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    enabled = precision == "bf16"
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=enabled),
    ):
        drafter(of_context(context), batch, embedding)
    planned = activations(job_of(drafter, precision), BATCH).total
    assert planned == pytest.approx(sum(size for size, _ in kept.values()), rel=within)


def test_operations_are_those_that_torch_counts() -> None:
    drafter, batch, context, embedding = made(WIDE)
    with FlopCounterMode(display=False) as counter:
        output = drafter(of_context(context), batch, embedding)
        (output.hidden.sum() + output.latent.sum() + output.confidence_logits.sum()).backward()
    assert v4_flops(WIDE, BATCH) == pytest.approx(counter.get_total_flops(), rel=0.03)


def test_a_v4_is_planned_by_its_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    DeepseekV4Config().save_pretrained(tmp_path / "flash")
    make_tokenizer().save_pretrained(tmp_path / "flash")
    words = [f"target.path={tmp_path / 'flash'}", "target.layer_ids=[39,40,41]", "data.limit=100"]
    main(["plan", "recipe=deepseek_v4", *words, "gpus=64"])
    shown = capsys.readouterr().out
    assert re.search(r"drafter +19,845,850,215 +trainable parameters", shown), shown
    assert re.search(r"target's forward .* not modelled", shown), shown


def test_zero3_gathers_a_module_at_least() -> None:
    job = job_of(made(WIDE)[0], "fp32", "engine=zero3")
    for largest, numbers in ((3 * 10**8, 10**9), (2 * 10**9, 2 * 10**9)):
        shapes = replace(job.shapes, parameters=(largest,) * 50, largest=largest)
        assert engine_states(replace(job, shapes=shapes, world=4)).gathered == 4 * numbers
