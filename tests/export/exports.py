"""Exports on disk, changed as another program would; and what a drafter computes, to compare."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from deepspec.checks.export import check_export
from deepspec.data.blocks import build_blocks
from deepspec.drafters.base import Observation
from deepspec.drafters.dspark import DSparkDrafter, DSparkProposer
from deepspec.errors import CheckpointError
from deepspec.export import open_export
from deepspec.records import Sample
from deepspec.targets import Target


def edit(folder: Path, **changes: Any) -> None:
    """Change keys of config.json; None removes one."""
    config = json.loads((folder / "config.json").read_text()) | changes
    kept = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors as another program would: without the recorded hash."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    del config["deepspec"]["sha256"]
    (folder / "config.json").write_text(json.dumps(config))


def library_part(algorithm: str, target: Target) -> dict[str, Any]:
    """`speculators_config` of a drafter of 4 tokens, as the layout's description has it."""
    return {
        "algorithm": algorithm,
        "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 4}],
        "default_proposal_method": "greedy",
        "verifier": {
            "name_or_path": Path(target.name).name,
            "architectures": ["Qwen3ForCausalLM"],
        },
    }


def observed(target: Target, drafter: DSparkDrafter) -> tuple[Any, Any]:
    """Two samples, and blocks of the first at two anchors, of the second at one."""
    generator = torch.Generator().manual_seed(3)
    samples = [
        Sample(torch.randint(4, 260, (n,), generator=generator), torch.ones(n).bool(), str(n))
        for n in (12, 12)
    ]
    anchors = [torch.tensor([3, 9]), torch.tensor([6])]
    shape = drafter.config
    batch = build_blocks(samples, anchors, shape.block_size, 4.0)
    return target.features(samples), batch


def draft(drafter: DSparkDrafter, target: Target, features: Any, batch: Any) -> Any:
    """One proposal for both samples after position 8, from the proposer."""
    proposer = DSparkProposer(drafter, target.embedding, target.head)
    proposer.start(2)
    context, final = features.context.unflatten(0, (2, 12)), features.final.unflatten(0, (2, 12))
    starts, counts = torch.zeros(2, dtype=torch.int64), torch.full((2,), 8)
    tokens = torch.zeros(2, 8, dtype=torch.int64)
    proposer.observe(Observation(tokens, context[:, :8], final[:, :8], starts, counts, 8))

    def greedy(logits: Tensor) -> tuple[Tensor, Tensor]:
        return logits.argmax(-1), logits.softmax(-1)

    return proposer.propose(torch.tensor([17, 40]), torch.tensor([8, 8]), 9, greedy)


def logits_of(drafter: DSparkDrafter, target: Target, output: Any) -> Tensor:
    ids = drafter.vocabulary
    logits = (target.head if ids is None else target.head.rows(ids))(output.hidden)
    if output.latent is None:
        return logits
    return logits + output.latent @ drafter.bias_weight.T


def in_bf16(drafter: DSparkDrafter) -> DSparkDrafter:
    """The same drafter with its weights rounded, as every export has them."""
    rounded = copy.deepcopy(drafter)
    with torch.no_grad():
        for parameter in rounded.parameters():
            parameter.copy_(parameter.bfloat16().float())
    return rounded


def assert_same_logits(found: Any, expected: Any, target: Target) -> None:
    """Those of the training forward, bit for bit."""
    features, batch = observed(target, expected)
    outputs = [drafter(features, batch, target.embedding) for drafter in (found, expected)]
    assert torch.equal(*(logits_of(expected, target, output) for output in outputs))


def assert_same_numbers(found: DSparkDrafter, expected: DSparkDrafter, target: Target) -> None:
    """Logits and confidences of the training forward, and a proposal, bit for bit."""
    assert_same_logits(found, expected, target)
    features, batch = observed(target, expected)
    outputs = [drafter(features, batch, target.embedding) for drafter in (found, expected)]
    assert torch.equal(*(output.confidence_logits for output in outputs))
    proposed, wanted = (draft(drafter, target, features, batch) for drafter in (found, expected))
    assert torch.equal(proposed.tokens, wanted.tokens)
    assert torch.equal(proposed.probabilities, wanted.probabilities)
    assert torch.equal(proposed.confidence, wanted.confidence)


def assert_a_head_of_its_own_is_for_engines(folder: Path, target: Target) -> None:
    """They draft with it; here it is doubted, and not loaded."""
    rewrite(folder, lambda found: found["lm_head.weight"].mul_(2))
    found = check_export(folder, target)
    assert (found.faults, found.fine) == ([], True)
    assert "engines draft with it, but this library" in found.doubts[0]
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is not that of"):
        open_export(folder).load(target)
