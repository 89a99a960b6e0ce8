"""Any family gives its own logits and embedding, or is refused when it is loaded."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from benchmarks import families as sweep
from deepspec.config.schema import TargetConfig
from deepspec.errors import TargetError
from deepspec.targets import agreement, load_ends, load_target
from deepspec.targets.families import base
from tests.conftest import make_tokenizer
from tests.targets.tiny import DENSE, make_causal_lm

SCALED = {key: value for key, value in DENSE.items() if key != "head_dim"}


def saved(config: Any, folder: Path, **options: Any) -> TargetConfig:
    make_causal_lm(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return TargetConfig(path=str(folder), dtype="float32", layer_ids=[0], **options)


@pytest.mark.parametrize(
    "name",
    [
        "cohere",
        "cohere2",
        "granitemoe",
        "falcon_h1",
        "minicpm3",
        "afmoe",
        "vaultgemma",
        "starcoder2",
    ],
)
def test_families_that_are_not_listed(name: str) -> None:
    """Among them factors and divisors of logits, of final states, and of embeddings."""
    verdict, why = sweep.judge(name)
    assert verdict == sweep.RIGHT, why


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("opt", "the embeddings that DeepSpec computes are not the model's own"),
        ("moshi", "its config.json has sliding_window=16, which its code"),
        ("phi", "its LM head holds bias besides its weight"),
    ],
)
def test_families_that_are_refused(name: str, reason: str) -> None:
    verdict, why = sweep.judge(name)
    assert verdict == sweep.REFUSED
    assert reason in why


def test_the_sweep_sees_a_silent_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "MULTIPLY_LOGITS", ())
    assert sweep.judge("cohere")[0] == sweep.REFUSED
    monkeypatch.setattr(sweep, "load_target", partial(load_target, checked=False))
    verdict, why = sweep.judge("cohere")
    assert verdict == sweep.WRONG
    assert "in total variation" in why


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("parallel", ["replicated", "device_map"])
def test_an_unknown_scale_of_logits(
    parallel: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused with all layers and without any, in a low precision as in a high one."""
    config = saved(hf.CohereConfig(**SCALED, logit_scale=0.3), tmp_path, parallel=parallel)
    config.dtype = dtype
    assert load_target(config, "cpu").logit_scale == 0.3
    assert load_ends(config, "cpu").logit_scale == 0.3
    monkeypatch.setattr(base, "MULTIPLY_LOGITS", ())
    for load in (load_target, load_ends):
        with pytest.raises(TargetError, match=r"'cohere': the logits .* 0\.\d+ in total variation"):
            load(config, "cpu")
    assert load_target(config, "cpu", checked=False).logit_scale == 1


def test_an_unknown_scale_of_embeddings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = hf.GraniteMoeConfig(**SCALED, embedding_multiplier=12.0, num_local_experts=2)
    config = saved(wanted, tmp_path)
    assert torch.equal(load_target(config, "cpu").embedding, load_ends(config, "cpu").embedding)
    monkeypatch.setattr(base, "MULTIPLY_EMBEDDINGS", ())
    monkeypatch.setattr(agreement, "MULTIPLY_EMBEDDINGS", ())
    with pytest.raises(TargetError, match=r"'granitemoe': the embeddings .* not the model's own"):
        load_target(config, "cpu")
    with pytest.raises(TargetError, match=r"what embedding_multiplier=12\.0 does to embeddings"):
        load_ends(config, "cpu")


def test_ends_of_a_family_that_adds_to_embeddings(tmp_path: Path) -> None:
    config = saved(
        hf.OPTConfig(
            vocab_size=260,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            ffn_dim=32,
            word_embed_proj_dim=32,
        ),
        tmp_path,
    )
    with pytest.raises(TargetError, match=r"what embed_positions\.weight does to embeddings"):
        load_ends(config, "cpu")


def test_a_head_that_does_not_run_alone_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = saved(hf.CohereConfig(**SCALED, logit_scale=0.3), tmp_path)

    def forward(*_args: Any, **_options: Any) -> None:
        raise RuntimeError("layers are needed")

    monkeypatch.setattr(hf.CohereForCausalLM, "forward", forward)
    assert load_ends(config, "cpu").logit_scale == 0.3
    assert (
        "(RuntimeError), so its scale was not checked (logit_scale=0.3)" in capsys.readouterr().err
    )
