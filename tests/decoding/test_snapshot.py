"""States that take no padding: rows in step share a forward, and part where they must."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deepspec.checks.proposers import Rehearsed
from deepspec.decoding import Decoder, Sampling, plain_decode
from deepspec.drafters.base import Draw
from deepspec.records import Proposal
from deepspec.targets import Target
from tests.targets.tiny import make_target

GREEDY, COUNT = Sampling(), 24
FAMILIES = ("qwen3_next", "deepseek_v4")  # linear attention, and compressed


class Uneven(Rehearsed):
    """Right in as many slots as a row's first token says: rows in step accept differently."""

    def propose(self, anchors: Tensor, positions: Tensor, end: int, draw: Draw) -> Proposal:
        tokens = super().propose(anchors, positions, end, draw).tokens
        for row, text in enumerate(self._rows):
            tokens[row, text[0] % (self.block_size + 1) :] += 1
        return Proposal(tokens % self._vocabulary, None, None)


def make_prompts(lengths: list[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randint(4, 260, (length,), generator=generator).tolist() for length in lengths]
    return [[4 + index, *prompt[1:]] for index, prompt in enumerate(drawn)]


def alone(target: Target, prompts: list[list[int]], stop: list[int]) -> list[tuple[int, ...]]:
    found = plain_decode(target, prompts, GREEDY, COUNT, stop_token_ids=stop)
    return [completion.tokens for completion in found.completions]


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each forward of a target."""
    rows: list[int] = []
    forward = Target.forward

    def counted(self: Target, tokens: Tensor, *args, **kwargs):
        rows.append(len(tokens))
        return forward(self, tokens, *args, **kwargs)

    monkeypatch.setattr(Target, "forward", counted)
    return rows


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_in_step_share_a_forward(name: str, forwards: list[int]) -> None:
    """Also behind rows that have stopped."""
    target, prompts = make_target(name), make_prompts([6, 6, 9, 6])
    stop = [alone(target, prompts, [])[1][5]]
    expected = alone(target, prompts, stop)
    lengths = [len(tokens) for tokens in expected]
    assert lengths[1] <= 6 < COUNT == max(lengths)
    forwards.clear()
    found = plain_decode(target, prompts, GREEDY, COUNT, batch_size=4, stop_token_ids=stop)
    assert [completion.tokens for completion in found.completions] == expected
    assert len(forwards) == lengths[2] + max(lengths[0], lengths[1], lengths[3])
    assert sum(forwards) == sum(lengths)


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_part_where_they_accept_differently(name: str, forwards: list[int]) -> None:
    target, prompts = make_target(name), make_prompts([6, 6, 9, 6, 6])
    stop = [alone(target, prompts, [])[3][9]]
    expected = alone(target, prompts, stop)
    known = dict(zip(map(tuple, prompts), alone(target, prompts, []), strict=True))
    for batch in (1, 5):
        forwards.clear()
        decoder = Decoder(target, Uneven(known, target.vocab_size), batch, stop)
        result = decoder.generate(prompts, GREEDY, COUNT)
        assert [completion.tokens for completion in result.completions] == expected
        accepted = {(trace.request, trace.accepted) for trace in result.traces}
        assert len({count for _, count in accepted}) >= 4
    assert forwards[:2] == [4, 1]  # the prompts
    assert max(forwards[2:]) == 4
    assert 1 in forwards[3:]
