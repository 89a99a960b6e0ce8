"""Every listed family passes every check, and every check can fail."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from deepspec.checks import Finding, check_target
from deepspec.checks.decoding import DecodingCheck
from deepspec.checks.target import check_texts
from deepspec.config.schema import TargetConfig
from deepspec.decoding import Decoder, Sampling, kv_cache, plain_decode, snapshot
from deepspec.errors import TargetError
from deepspec.targets import FrozenHead, Target, families, load_ends, load_target
from tests.conftest import make_tokenizer
from tests.decoding.proposers import RandomProposer
from tests.targets.tiny import CONFIGS, DENSE, LINEAR, WINDOWED, make_causal_lm, make_target

NEW_TOKENS = 7  # behind four texts, one of which ends 3 tokens before a border
SNAPSHOT = {"qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "deepseek_v4"}


def check(target: Target, new_tokens: int = NEW_TOKENS) -> dict[str, Finding]:
    return {finding.what: finding for finding in check_target(target, new_tokens)}


def failing(target: Target, new_tokens: int = 3) -> set[str]:
    findings = check(target, new_tokens).items()
    return {what for what, finding in findings if not finding.holds}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_check_holds(name: str) -> None:
    target = make_target(name)
    findings = check(target)
    assert not [finding for finding in findings.values() if not finding.holds]
    assert findings["rollback"].detail == ("snapshot" if name in SNAPSHOT else "rows")
    # the decoder was made to take back everything, some, and nothing
    accepted = {
        what: re.search(r"(\d+) of (\d+) drafts", finding.detail).groups()
        for what, finding in findings.items()
        if what.startswith("verifying")
    }
    assert len(accepted) == 6
    for what, (some, scheduled) in accepted.items():
        assert ("wrong" in what) == (some == "0")
        assert ("drafts right" in what) == (some == scheduled)


def test_all_families_are_tested_and_their_files_are_short() -> None:
    assert {name.partition("-")[0] for name in CONFIGS} == set(families.FAMILIES)
    for file in Path(families.__file__).parent.glob("[a-z]*.py"):
        assert file.name == "base.py" or len(file.read_text().splitlines()) <= 60


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_text"])
def test_in_low_precision_near_ties_are_told_from_errors(name: str) -> None:
    assert not failing(make_target(name, dtype=torch.bfloat16), 5)


# --------------------------------------------------------------------------- checks that fail


def test_a_wrong_layer() -> None:
    target = make_target("llama")
    target.layer_ids = [-1, 1, 2]
    assert failing(target) == {"captured features"}


def test_a_missing_embedding_scale() -> None:
    target = make_target("gemma3_text")
    target.embedding = target.model.get_input_embeddings().weight.detach()
    assert failing(target) == {"embedding"}


@pytest.mark.parametrize("name", ["gemma3_text", "granite"])
def test_a_missing_soft_cap_or_logit_scale(name: str) -> None:
    target = make_target(name)
    target.head = FrozenHead(target.model.lm_head.weight)
    assert "logits" in failing(target)


def test_a_model_that_sees_its_padding() -> None:
    target = make_target("llama")

    def look_around(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output + output.mean(dim=1, keepdim=True)

    target.backbone.layers[1].register_forward_hook(look_around)
    assert {"uneven samples, packed", "rollback"} <= failing(target)


def test_features_that_nothing_can_be_learnt_from() -> None:
    target = make_target("llama")
    target._capture._feature = lambda output: output * torch.nan
    assert failing(target) == {"captured features", "uneven samples, packed", "a training step"}


def test_a_window_that_decoding_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "attention_kinds", lambda config: {"full_attention"})
    found = failing(make_target("mistral"))
    assert "plain decoding is Transformers' generate" in found


def test_rows_for_a_recurrent_model() -> None:
    target = make_target("qwen3_next")
    target.rollback = "rows"
    findings = check(target, 3)
    assert findings["rollback"].detail.startswith("none that holds")
    assert "Error" in findings["plain decoding is Transformers' generate"].detail


@pytest.mark.parametrize("name", ["qwen3_5_text", "deepseek_v4"])
def test_a_state_that_is_not_restored(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Silently wrong wherever a draft was refused, and only there."""
    target = make_target(name)
    decoding = DecodingCheck(target, check_texts(target), NEW_TOKENS)
    assert decoding.plain()[0]
    monkeypatch.setattr(snapshot, "_restore", lambda cache, saved: None)
    assert not decoding.verified(good=0, size=1)[0]
    assert not decoding.verified(good=2, size=4)[0]
    assert decoding.verified(good=4, size=4)[0]


def test_outputs_without_hidden_states_are_listened_to(monkeypatch: pytest.MonkeyPatch) -> None:
    target = make_target("llama")
    forward = target.backbone.forward

    def without(*args: Any, output_hidden_states: bool = False, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    monkeypatch.setattr(target.backbone, "forward", without)
    found = check(target, 2)["captured features"]
    assert found.holds
    assert found.detail.endswith("against the layers' own results")
    target.layer_ids = [-1, 0, 1]
    assert not check(target, 2)["captured features"].holds


# ------------------------------------------------------------------------- unlisted families


def test_an_unlisted_family_is_told_which_rollback_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(families.FAMILIES, "qwen3_5_text")
    target = make_target("qwen3_5_text")
    with pytest.raises(TargetError, match=r"target\.rollback=snapshot.*evaluation\.enabled=false"):
        Decoder(target, RandomProposer(260))
    assert plain_decode(target, [[5, 6]], Sampling(), 2).tokens == 2  # takes nothing back
    findings = check(target, 2)
    assert {what for what, finding in findings.items() if not finding.holds} == {"rollback"}
    assert findings["rollback"].detail.startswith("set target.rollback=snapshot")
    assert target.rollback is None
    assert make_target("qwen3_5_text", rollback="snapshot").rollback == "snapshot"


def test_a_dense_family_needs_no_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("qwen3", "mistral"):
        monkeypatch.delitem(families.FAMILIES, name)
        assert not failing(make_target(name))


def test_longrope_with_a_part_of_each_head() -> None:
    """As Phi-4 mini has it: two lists of factors, of fewer frequencies than a whole head's."""
    longrope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.5,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [1.0, 2.0, 3.0, 4.0],
    }
    dense = {key: value for key, value in DENSE.items() if key != "head_dim"}
    config = hf.Phi3Config(**dense, rope_parameters=longrope, original_max_position_embeddings=256)
    assert not failing(build(config))


def test_snapshots_hold_for_other_families_too() -> None:
    findings = check(make_target("gpt_oss", rollback="snapshot"), 5)
    assert not [finding for finding in findings.values() if not finding.holds]
    assert findings["rollback"].detail == "snapshot"


# ---------------------------------------------------------------------------------- bad input


def build(config: Any, **options: Any) -> Target:
    return Target(make_causal_lm(config), make_tokenizer(), [0], "it", **options)


def test_configs_that_lack_something_are_named() -> None:
    with pytest.raises(TargetError, match="'gpt_oss' needs sliding_window"):
        build(hf.GptOssConfig(**DENSE, **{**WINDOWED, "sliding_window": None}))
    with pytest.raises(TargetError, match=r"'gemma3_text': use_bidirectional_attention=True"):
        build(hf.Gemma3TextConfig(**DENSE, **WINDOWED, use_bidirectional_attention=True))
    with pytest.raises(TargetError, match=r"rollback=rows: .*'qwen3_5_text'.*linear_attention"):
        build(hf.Qwen3_5TextConfig(**DENSE, **LINEAR), rollback="rows")


def test_attention_without_a_mask_a_row_is_refused() -> None:
    target = make_target("llama")
    target.config._attn_implementation = "flex_attention"
    with pytest.raises(TargetError, match=r"target\.attention=flex_attention.*set .*=sdpa"):
        plain_decode(target, [[5, 6]], Sampling(), 2)


# -------------------------------------------------------------------------------- from files


VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
WRAPPED = {
    "gemma3_text": lambda text: hf.Gemma3ForConditionalGeneration(
        hf.Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=4)
    ),
    "gemma4_text": lambda text: hf.Gemma4ForConditionalGeneration(
        hf.Gemma4Config(text_config=text, vision_config=None, audio_config=None)
    ),
    "qwen3_5_text": lambda text: hf.Qwen3_5ForConditionalGeneration(
        hf.Qwen3_5Config(
            text_config=text,
            vision_config={"depth": 1, "hidden_size": 32, "num_heads": 2, "out_hidden_size": 64},
        )
    ),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_the_text_part_of_a_multimodal_checkpoint(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    text = CONFIGS[name]()
    if name == "gemma3_text":
        text.final_logit_softcapping = None  # which Transformers' wrapper ignores
    WRAPPED[name](text).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    config = TargetConfig(path=str(tmp_path), dtype="float32", layer_ids=[0, 2])
    target = load_target(config, "cpu")
    assert target.family == name
    assert not failing(target, 2)
    ends = load_ends(config, "cpu")
    assert torch.equal(ends.embedding, target.embedding)
    assert torch.equal(ends.head.weight, target.head.weight)
    assert ends.head.soft_cap == target.head.soft_cap


@pytest.mark.parametrize("says", ["tied outside", "tied inside", "untied"])
def test_a_head_of_its_own_is_read_whatever_the_config_says(says: str, tmp_path: Path) -> None:
    """Of a multimodal config's two answers the outer one decides, and against it the files."""
    config = hf.Gemma3Config(
        text_config=DENSE | WINDOWED | {"tie_word_embeddings": says != "untied"},
        vision_config=VISION,
        mm_tokens_per_image=4,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = hf.Gemma3ForConditionalGeneration(config)
    model.config.tie_word_embeddings = says == "tied outside"
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    options = {"path": str(tmp_path), "dtype": "float32", "layer_ids": [0]}
    whole = load_target(TargetConfig(**options), "cpu")
    split = load_target(TargetConfig(**options, parallel="device_map"), "cpu")
    assert not torch.equal(whole.head.weight, whole.model.get_input_embeddings().weight)
    for ends in (split, load_ends(TargetConfig(**options), "cpu")):
        assert torch.equal(ends.head.weight, whole.head.weight)
        assert torch.equal(ends.embedding, whole.embedding)


@pytest.mark.parametrize("name", ["gemma4_text", "granite"])
def test_scaled_ends_read_alone(name: str, tmp_path: Path) -> None:
    """The same fingerprint whatever the dtype: a scale is not part of the files."""
    make_causal_lm(CONFIGS[name]()).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    identities = []
    for dtype in ("float32", "bfloat16"):
        config = TargetConfig(path=str(tmp_path), dtype=dtype, layer_ids=[0])
        whole, ends = load_target(config, "cpu"), load_ends(config, "cpu")
        assert torch.equal(ends.embedding, whole.embedding)
        assert torch.equal(ends.head.weight, whole.head.weight)
        first = whole.model.get_input_embeddings()(torch.arange(260))
        if name.startswith("gemma"):  # Granite scales outside of its embedding
            assert torch.equal(first, whole.embedding)
        identities += [ends.identity, {key: whole.identity[key] for key in ends.identity}]
    assert all(identity == identities[0] for identity in identities)


@pytest.mark.parametrize(
    ("eos", "stops"),
    [([7, 9], [2, 7, 9]), (7, [2, 7]), (None, [2])],  # 2 is the tokenizer's
)
def test_all_end_tokens_of_a_generation_config_stop(
    eos: int | list[int] | None, stops: list[int]
) -> None:
    made = make_target("gpt_oss")
    made.model.generation_config.eos_token_id = eos
    assert Target(made.model, made.tokenizer, [1], "tiny").stop_token_ids == stops
