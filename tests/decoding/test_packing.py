"""Rows of different lengths: the same numbers as with padding, and no work behind a row's end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from transformers import Qwen3ForCausalLM

from deepspec.decoding.packing import can_pack, packed
from deepspec.decoding.rows import Rows
from deepspec.targets import Target
from tests.conftest import make_model, make_tokenizer

LENGTHS = [3, 1, 4, 2]


def sliding() -> Qwen3ForCausalLM:
    """Every other layer sees four tokens: fewer than the prompts have."""
    whole = make_model().config
    whole.layer_types = ["full_attention", "sliding_attention"] * 3
    whole.use_sliding_window, whole.sliding_window = True, 4
    torch.manual_seed(0)
    return Qwen3ForCausalLM(whole).eval()


@pytest.fixture(scope="module", params=["full", "sliding"])
def target(request: pytest.FixtureRequest) -> Target:
    model = make_model() if request.param == "full" else sliding()
    return Target(model, make_tokenizer(), 1, "packed")


@contextmanager
def counted(target: Target) -> Iterator[list[int]]:
    """How many tokens went through the last layer's feed-forward, a number a forward."""
    seen: list[int] = []
    layer = target.model.model.layers[-1].mlp
    hook = layer.register_forward_pre_hook(
        lambda _module, args: seen.append(args[0].shape[0] * args[0].shape[1])
    )
    try:
        yield seen
    finally:
        hook.remove()


def two_forwards(target: Target, pack: bool) -> list[torch.Tensor]:
    """Prefill of uneven prompts, a block of LENGTHS, and one more token a row that sees it all."""
    g = torch.Generator().manual_seed(1)
    prompts = [torch.randint(4, 260, (n,), generator=g).tolist() for n in (5, 9, 2, 7)]
    rows = Rows(target, list("abcd"), prompts, 20, [])
    rows._state._can_pack = pack
    _, prefill = rows.prefill(with_context=True)
    starts = torch.tensor([len(prompt) for prompt in prompts])
    block = torch.randint(4, 260, (4, 4), generator=g)
    output = rows.forward(block, starts, 9 + 4, True, LENGTHS)
    behind = starts + torch.tensor(LENGTHS)
    last = rows.forward(block[:, :1], behind, int(behind.max()) + 1, True)
    lengths = [len(prompt) for prompt in prompts]
    return [
        packed(values, count)
        for got, count in ((prefill, lengths), (output, LENGTHS), (last, [1] * 4))
        for values in (got.final, got.context)
    ]


@torch.inference_mode()
def test_packed_is_padded_without_the_padding(target: Target) -> None:
    assert can_pack(target.model)
    with counted(target) as of_packed:
        found = two_forwards(target, pack=True)
    with counted(target) as of_padded:
        expected = two_forwards(target, pack=False)
    assert of_packed == [5 + 9 + 2 + 7, sum(LENGTHS), 4]
    assert of_padded == [4 * 9, 4 * 4, 4]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert target.config._attn_implementation == "sdpa"


def test_attention_that_cannot_be_replaced_is_padded(target: Target) -> None:
    target.model.set_attn_implementation("eager")
    try:
        assert not can_pack(target.model)
    finally:
        target.model.set_attn_implementation("sdpa")


def test_even_rows_are_not_copied() -> None:
    values = torch.arange(12.0).reshape(2, 3, 2)
    assert packed(values, [3, 3]).data_ptr() == values.data_ptr()
    assert packed(values, [1, 2]).tolist() == [[0, 1], [6, 7], [8, 9]]
