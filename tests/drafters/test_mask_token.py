"""The token of unknown slots, where the tokenizer names none and every row has a token."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from deepspec.commands.beginnings import first_drafter
from deepspec.config.loading import config_from
from deepspec.drafters.mask_token import mask_token_for, resolve_mask_token, spare_tokens
from deepspec.errors import ConfigError
from deepspec.records import Sample
from deepspec.targets import Target
from deepspec.training.checkpoint import Checkpoint
from tests.conftest import SPECIAL, UNMARKED, make_model

TOOL, KEPT, OTHER = "<|tool|>", "<|reserved_7|>", "<|file|>"


def target_of(names: list[str], template: str = UNMARKED, rows: int | None = None) -> Target:
    """A target whose tokenizer has the special tokens `names` and no mask token, and an embedding
    of as many `rows` as tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    order = [*SPECIAL[:3], *letters, *names]
    backend = Tokenizer(
        models.BPE(vocab={token: index for index, token in enumerate(order)}, merges=[])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=SPECIAL[0],
        eos_token=SPECIAL[2],
        additional_special_tokens=[SPECIAL[1], *names],
    )
    tokenizer.chat_template = template
    return Target(make_model(rows or len(tokenizer)), tokenizer, [1], "target")


def sample_of(*ids: int) -> Sample:
    return Sample(torch.tensor(ids), torch.ones(len(ids), dtype=torch.bool), "s")


def ids_of(target: Target, *names: str) -> list[int]:
    return [target.tokenizer.get_vocab()[name] for name in names]


def test_a_special_token_that_nothing_uses() -> None:
    target = target_of([TOOL, KEPT, OTHER], UNMARKED + "{# " + TOOL + " #}")
    kept, other = ids_of(target, KEPT, OTHER)
    assert spare_tokens(target)[:2] == [kept, other]
    assert resolve_mask_token(None, target) == kept
    assert mask_token_for(target, [sample_of(5, 6)]) == kept
    assert mask_token_for(target, [sample_of(5), sample_of(6, kept)]) == other
    assert resolve_mask_token(7, target) == 7


def test_a_row_without_a_token_goes_first() -> None:
    target = target_of([TOOL], rows=300)
    tokens = len(target.tokenizer)
    assert resolve_mask_token(None, target) == tokens
    named = {f"[PAD{index}]": index for index in range(tokens, 300)}  # as a GGUF file has it
    target.tokenizer.add_tokens(list(named))
    assert target.tokenizer.get_vocab().items() > named.items()
    assert resolve_mask_token(None, target) == tokens


def test_there_is_none() -> None:
    target = target_of([TOOL], UNMARKED + "{# " + " ".join((TOOL, *SPECIAL)) + " #}")
    with pytest.raises(ConfigError, match="uses every special token; set drafter"):
        resolve_mask_token(None, target)
    target = target_of([TOOL], UNMARKED + "{# " + " ".join(SPECIAL) + " #}")
    with pytest.raises(ConfigError, match="the data use every special token"):
        mask_token_for(target, [sample_of(*ids_of(target, TOOL))])


def test_it_is_chosen_by_the_data_said_and_kept(capsys: pytest.CaptureFixture[str]) -> None:
    target = target_of([KEPT, OTHER])
    kept, other = ids_of(target, KEPT, OTHER)
    raw: dict[str, Any] = {
        "recipe": "test",
        "target": {"path": "none"},
        "data": {"path": []},
        "drafter": {"num_layers": 1, "intermediate_size": 32, "markov_rank": 4},
    }
    config = config_from(raw)
    drafter = first_drafter(config, target, [sample_of(kept, 5)], None)
    assert drafter.config.mask_token_id == other
    assert f"mask token: {OTHER} (id {other})" in capsys.readouterr().err
    # a checkpoint from before is gone on with as it was, whatever the data and the rules are now
    rope = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    before = {**drafter.config.to_dict(), "rope_parameters": rope}
    start = Checkpoint(Path("step"), 1, "dspark", before, {}, "target", {}, {}, {})
    shape = first_drafter(config, target, [sample_of(other, 5)], start).config
    assert (shape.mask_token_id, shape.rope_parameters) == (other, rope)
    own = replace(config, drafter=replace(config.drafter, mask_token_id=9))
    assert first_drafter(own, target, [sample_of(kept, 5)], None).config.mask_token_id == 9
