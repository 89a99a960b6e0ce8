"""Rotations that depend on a text's length: one for all texts, as the target takes it for one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from deepspec.checks import check_target
from deepspec.errors import TargetError
from deepspec.records import TargetFeatures
from deepspec.targets import Target
from deepspec.targets.identity import differing
from tests.conftest import make_tokenizer
from tests.targets.test_target import samples_of
from tests.targets.tiny import DENSE, WINDOWED, make_causal_lm

ORIGINAL, SHORT, LONG = 64, 20, 70
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "factor": 8.0,
    "original_max_position_embeddings": ORIGINAL,
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
WITHIN = {**DENSE, "max_position_embeddings": ORIGINAL}


def longrope() -> Any:
    return make_causal_lm(hf.LlamaConfig(**DENSE, rope_parameters=LONGROPE))


def dynamic() -> Any:
    return make_causal_lm(hf.LlamaConfig(**WITHIN, rope_parameters=DYNAMIC))


def by_kind_of_layer() -> Any:
    rope = {"full_attention": LONGROPE, "sliding_attention": {"rope_type": "default"}}
    rope["sliding_attention"]["rope_theta"] = 1e4
    config = hf.Gemma3TextConfig(**DENSE, **WINDOWED, query_pre_attn_scalar=16)
    config.rope_parameters = rope
    return make_causal_lm(config)


def target_of(model: Any, context_length: int | None = None) -> Target:
    return Target(model, make_tokenizer(), [-1, 0, 2], "target", context_length=context_length)


@torch.no_grad()
def final_of(model: Any, ids: Tensor) -> Tensor:
    """By Transformers alone, which goes by the length of `ids`."""
    return model.get_decoder()(ids[None]).last_hidden_state[0]


@pytest.mark.parametrize(
    ("make", "context_length"), [(longrope, None), (dynamic, 128), (by_kind_of_layer, None)]
)
def test_features_do_not_depend_on_neighbours_or_on_what_ran_before(
    make: Any, context_length: int | None
) -> None:
    target = target_of(make(), context_length)
    short, middle, long = samples_of(SHORT, LONG, 128)

    def alone() -> TargetFeatures:
        return target.features([middle])

    before, together = alone(), target.features([short, middle, long])
    rows = slice(SHORT, SHORT + LONG)
    torch.testing.assert_close(together.context[rows], before.context, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(alone().context, before.context, rtol=0, atol=0)


def test_it_is_the_rotation_that_the_target_takes_for_that_length() -> None:
    short, long, longest = (sample.input_ids for sample in samples_of(SHORT, LONG, 128))
    for make, length, ids in (
        (longrope, None, long),
        (longrope, ORIGINAL, short),
        (dynamic, 128, longest),
        (dynamic, None, short),
        (by_kind_of_layer, None, long),
    ):
        expected = final_of(make(), ids)
        fixed = target_of(make(), length)
        torch.testing.assert_close(final_of(fixed.model, ids), expected)
    assert not torch.allclose(
        final_of(longrope(), short), final_of(target_of(longrope()).model, short)
    )


def test_decoding_across_the_border_holds() -> None:
    """From 61 tokens on: prefill, plain decoding and verified blocks rotate alike."""
    findings = list(check_target(target_of(longrope()), 7))
    assert [finding for finding in findings if not finding.holds] == []


def test_the_length_bounds_texts_and_is_part_of_the_identity() -> None:
    base, same, other = (target_of(longrope(), length) for length in (None, 512, ORIGINAL))
    assert (base.context_length, other.context_length) == (512, ORIGINAL)
    assert base.identity == same.identity
    assert differing(base.identity, other.identity) == ["architecture"]
    plain = [
        target_of(make_causal_lm(hf.LlamaConfig(**DENSE)), length) for length in (None, ORIGINAL)
    ]
    assert plain[0].identity == plain[1].identity
    with pytest.raises(TargetError, match=r"context_length=513, but .* at most 512 tokens"):
        target_of(longrope(), 513)
