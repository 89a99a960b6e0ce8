"""The target captures features for the proposers that read them, and for no others."""

from __future__ import annotations

from typing import Any

import pytest

from deepspec.decoding import ContinuousBatch, Decoder, Sampling, plain_decode
from deepspec.decoding.skipping import SkippingProposer
from deepspec.targets import Target
from tests.decoding.test_lossless import prompts_of
from tests.serving.proposers import PROPOSERS


@pytest.fixture
def captured(target: Target, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of every forward of the target, whether its hooks kept features."""
    forward, found = target.forward, []

    def watched(*args: Any, **options: Any) -> Any:
        output = forward(*args, **options)
        found.append(output.context is not None)
        return output

    monkeypatch.setattr(target, "forward", watched)
    return found


@pytest.mark.parametrize(
    ("name", "expected"),
    [("plain", {False}), ("ngram", {False}), ("dspark", {True}), ("eagle3", {True})],
)
def test_features_are_captured_for_those_who_read_them(
    target: Target, captured: list[bool], name: str, expected: set[bool]
) -> None:
    decoder = Decoder(target, PROPOSERS[name](target), 2, [])
    found = decoder.generate(prompts_of(3), Sampling(), 6)
    batch = ContinuousBatch(decoder, Sampling(), 6)
    batch.join(["a"], prompts_of(1))
    while len(batch):
        batch.round()
    assert set(captured) == expected
    plain = plain_decode(target, prompts_of(3), Sampling(), 6, stop_token_ids=[])
    assert found.completions == plain.completions


def test_a_drafter_that_skips_rounds_reads_features_afterwards(
    target: Target, captured: list[bool]
) -> None:
    rounds = iter([False, False, True, False, True])
    proposer = SkippingProposer(PROPOSERS["dspark"](target), lambda rows: next(rounds, True))
    Decoder(target, proposer, 2, []).generate(prompts_of(2), Sampling(), 6)
    assert set(captured) == {True}
