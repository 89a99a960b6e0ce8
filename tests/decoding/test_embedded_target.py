"""The embedded target's greedy output against Transformers' own `generate`, token by token.

One drafter was never trained (a rejection in every round), the other is right for four drafts and
then wrong.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from deepspec.checks.proposers import Rehearsed
from deepspec.config.resources import resource
from deepspec.config.schema import DrafterConfig, TargetConfig
from deepspec.decoding import Decoder, Sampling
from deepspec.drafters.registry import drafter_kind
from deepspec.targets import Target, load_target

DOMAINS = ("code", "chat", "math")


@pytest.fixture(scope="module")
def embedded() -> Target:
    return load_target(TargetConfig(path=str(resource("data/tiny_target")), dtype="float32"), "cpu")


def held_out(target: Target, count: int | None) -> list[list[int]]:
    prompts = []
    for domain in DOMAINS:
        path = Path(resource(f"data/prompts/{domain}.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()[:count]:
            rendered = target.tokenizer.apply_chat_template(
                json.loads(line)["messages"], add_generation_prompt=True, return_dict=True
            )
            prompts.append(list(rendered["input_ids"]))
    return prompts


def check(target: Target, count: int | None, length: int) -> None:
    prompts = held_out(target, count)
    expected = []
    for prompt in prompts:
        out = target.model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=length,
            do_sample=False,
        )
        expected.append(tuple(out[0, len(prompt) :].tolist()))
    kind = drafter_kind("dspark")
    torch.manual_seed(0)
    shape = kind.resolve(DrafterConfig(num_layers=1, markov_rank=16), target)
    untrained = kind.proposer(kind.build(shape).eval(), target)
    known = {tuple(prompt): more for prompt, more in zip(prompts, expected, strict=True)}
    for proposer in (untrained, Rehearsed(known, target.vocab_size, 7, good=4)):
        for batch_size in (1, 8):
            decoder = Decoder(target, proposer, batch_size)
            result = decoder.generate(prompts, Sampling(), length)
            assert [completion.tokens for completion in result.completions] == expected


def test_greedy_equals_generate(embedded: Target) -> None:
    check(embedded, 2, 24)


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_greedy_equals_generate_on_every_held_out_prompt(embedded: Target) -> None:
    check(embedded, None, 160)


def test_prompts_do_not_overlap() -> None:
    """Neither ids nor texts are shared between training and evaluation."""
    rows = {
        name: [
            json.loads(line)
            for line in Path(resource(f"data/prompts/{name}.jsonl")).read_text().splitlines()
        ]
        for name in ("train", *DOMAINS)
    }
    texts = {name: {row["messages"][0]["content"] for row in own} for name, own in rows.items()}
    for domain in DOMAINS:
        assert len(texts[domain]) >= 60
        assert not texts[domain] & texts["train"]
    assert len(rows["train"]) >= 2000
