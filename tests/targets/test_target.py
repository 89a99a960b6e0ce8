"""Captured features are the layers' true outputs; mistakes are named."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from deepspec import machine
from deepspec.checks import check_target
from deepspec.config.schema import TargetConfig
from deepspec.errors import TargetError
from deepspec.progress import say_once
from deepspec.records import Sample
from deepspec.targets import (
    FrozenHead,
    Target,
    check_layer_ids,
    default_layer_ids,
    load_ends,
    load_target,
)
from deepspec.targets.identity import differing
from tests.conftest import make_model, make_tokenizer


def samples_of(*lengths: int) -> list[Sample]:
    generator = torch.Generator().manual_seed(0)
    return [
        Sample(torch.randint(4, 260, (n,), generator=generator), torch.ones(n).bool(), str(n))
        for n in lengths
    ]


def test_default_ids_are_the_released_ones() -> None:
    assert default_layer_ids(36, 5) == [1, 9, 17, 25, 33]
    assert default_layer_ids(8, 4) == [1, 2, 4, 5]
    with pytest.raises(TargetError, match="num_layer_ids=5"):
        default_layer_ids(6, 5)


@pytest.mark.parametrize("ids", [[2, 1], [1, 1], [], [-2, 1], [4, 5], [1, 9]])
def test_bad_layer_ids(ids: list[int]) -> None:
    with pytest.raises(TargetError, match=r"target\.layer_ids"):
        check_layer_ids(ids, 6)


def test_features_equal_hidden_states_and_the_final_gives_the_logits(target_folder: Path) -> None:
    config = TargetConfig(path=str(target_folder), dtype="float32", layer_ids=[-1, 0, 3])
    target = load_target(config, "cpu")
    samples = samples_of(5, 11, 2)
    packed = target.features(samples)
    row = 0
    for sample in samples:
        with torch.no_grad():
            out = target.model(sample.input_ids[None], output_hidden_states=True)
        own = slice(row, row + len(sample))
        expected = torch.cat([out.hidden_states[k + 1][0] for k in (-1, 0, 3)], dim=-1)
        torch.testing.assert_close(packed.context[own], expected, rtol=1e-5, atol=1e-5)
        logits = target.head(packed.final[own])
        torch.testing.assert_close(logits, out.logits[0], rtol=1e-5, atol=1e-4)
        row += len(sample)
    assert row == packed.context.shape[0] == packed.final.shape[0]
    assert not packed.context.requires_grad


def test_final_states_are_those_before_supervised_tokens(target: Target) -> None:
    """Several turns, an answer from the first token on, none at all, and one that ends in a prompt:
    row t is there where t + 1 is supervised, bit for bit."""
    masks = ["0110111", "1", "1011", "000", "01100"]
    samples = [
        replace(sample, loss_mask=torch.tensor([mark == "1" for mark in mask]))
        for sample, mask in zip(samples_of(*map(len, masks)), masks, strict=True)
    ]
    every, fewer = target.features(samples), target.features(samples, all_finals=False)
    follows = [mark == "1" for mask in masks for mark in f"{mask[1:]}0"]
    assert every.all_finals
    assert not fewer.all_finals
    assert torch.equal(fewer.final, every.final[torch.tensor(follows)])
    assert torch.equal(fewer.context, every.context)


def test_nothing_of_the_target_is_trainable(target: Target) -> None:
    assert not any(p.requires_grad for p in target.model.parameters())
    assert not list(target.head.parameters())
    assert not target.head.state_dict()


def test_soft_cap() -> None:
    weight, hidden = torch.randn(7, 4), 30 * torch.randn(3, 4)
    expected = 5 * torch.tanh(hidden @ weight.T / 5)
    torch.testing.assert_close(FrozenHead(weight, 5.0)(hidden), expected)


def test_identity_knows_weights_and_template_but_not_dtype(
    target_folder: Path, tmp_path: Path
) -> None:
    def identity(**options: object) -> dict[str, str]:
        return load_target(
            TargetConfig(path=str(target_folder), num_layer_ids=3, **options), "cpu"
        ).identity

    base = identity(dtype="float32")
    assert identity(dtype="bfloat16") == base
    config = TargetConfig(path=str(target_folder), num_layer_ids=3)
    ends = load_ends(config, "cpu")
    assert ends.identity == {key: base[key] for key in base if "weights" not in key}

    other = load_target(config, "cpu")
    other.model.model.layers[2].mlp.up_proj.weight += 0.1
    other.tokenizer.chat_template += " "
    other.model.save_pretrained(tmp_path)
    other.tokenizer.save_pretrained(tmp_path)
    changed = load_target(TargetConfig(path=str(tmp_path), num_layer_ids=3), "cpu").identity
    assert differing(base, changed) == ["template", "weights"]
    with pytest.raises(TargetError, match=r"of another target than .*: the template differ"):
        ends.adopt(changed, "the store")


def test_the_ends_are_the_targets(target_folder: Path) -> None:
    """Read alone out of the files, without a decoder layer."""
    config = TargetConfig(path=str(target_folder), dtype="bfloat16", num_layer_ids=3)
    ends, whole = load_ends(config, "cpu"), load_target(config, "cpu")
    assert torch.equal(ends.embedding, whole.embedding)
    assert torch.equal(ends.head.weight, whole.head.weight)
    for name in ("hidden_size", "vocab_size", "num_layers", "layer_ids", "family", "dtype"):
        assert getattr(ends, name) == getattr(whole, name)


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Gemma", "Mistral", "GPT2"])
def test_a_folder_without_a_tokenizer_is_named(family: str, tmp_path: Path) -> None:
    """What Transformers makes of it differs by family: an error of many lines, or nothing."""
    getattr(transformers, f"{family}Config")().save_pretrained(tmp_path)
    with pytest.raises(TargetError) as raised:
        load_target(TargetConfig(path=str(tmp_path)), "cpu")
    assert str(raised.value) == (
        f"target.path={tmp_path} has no tokenizer (tokenizer.json is missing); copy the tokenizer "
        "files of the model there"
    )


def test_an_adapter_is_to_be_merged(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/model"}')
    with pytest.raises(TargetError, match=r"is an adapter .*someone/model.*merge_and_unload\(\)"):
        load_target(TargetConfig(path=str(tmp_path)), "cpu")


def test_a_checkpoint_with_code_of_its_own(target_folder: Path, tmp_path: Path) -> None:
    """The code runs only when its key says so."""
    shutil.copytree(target_folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    names = {"AutoConfig": "Own", "AutoModelForCausalLM": "OwnForCausalLM"}
    config |= {"model_type": "own", "auto_map": {key: f"own.{name}" for key, name in names.items()}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text(
        "from transformers import Qwen3Config, Qwen3ForCausalLM\n"
        "class Own(Qwen3Config):\n    model_type = 'own'\n"
        "class OwnForCausalLM(Qwen3ForCausalLM):\n    config_class = Own\n"
    )
    wanted = TargetConfig(path=str(tmp_path), num_layer_ids=3)
    for load in (load_target, load_ends):
        with pytest.raises(
            TargetError, match=r"code of its own.*set target\.trust_remote_code=true"
        ):
            load(wanted, "cpu")
        assert load(replace(wanted, trust_remote_code=True), "cpu").family == "own"


def test_tokens_beyond_the_embedding_are_refused(target_folder: Path, tmp_path: Path) -> None:
    """But for those that stand for images, which text-only models of a family keep."""
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(target_folder / name)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=make_tokenizer().backend_tokenizer,
        eos_token="<|im_end|>",
        extra_special_tokens={"image_token": "<|image|>"},
    )
    assert tokenizer.get_vocab()["<|image|>"] == 260  # of 260 rows
    tokenizer.save_pretrained(tmp_path)
    config = TargetConfig(path=str(tmp_path), num_layer_ids=3)
    load_ends(config, "cpu")
    (first, *_) = check_target(load_target(config, "cpu"))
    assert first.holds
    assert "261 tokens for 260 rows of the embedding; <|image|> without one" in first.detail
    tokenizer.add_tokens(["<|new|>"])
    tokenizer.save_pretrained(tmp_path)
    for load in (load_ends, load_target):
        with pytest.raises(TargetError, match=r"1 token\(s\) that its embedding of 260 rows lacks"):
            load(config, "cpu")


FLAGS = {
    "flags\t\t: fpu avx2 avx512f\n": torch.float32,
    "flags\t\t: fpu avx512f avx512_bf16\n": torch.bfloat16,
    "Features\t: fp asimd\n": torch.float32,
    "Features\t: fp asimd bf16\n": torch.bfloat16,
    "": torch.bfloat16,  # nothing tells
}


@pytest.mark.parametrize(("flags", "expected"), FLAGS.items())
def test_auto_is_float32_where_a_processor_lacks_bfloat16(
    flags: str,
    expected: torch.dtype,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_model().to(torch.bfloat16).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "cpuinfo").write_text(f"model name\t: a processor\n{flags}")
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    machine.lacks_bf16.cache_clear()
    say_once.cache_clear()
    try:
        capsys.readouterr()
        for load in (load_target, load_ends):
            found = load(TargetConfig(path=str(tmp_path), num_layer_ids=3), "cpu")
            assert found.dtype == expected
        said = capsys.readouterr().err.count("target.dtype=auto: float32")
        assert said == (expected == torch.float32)
        own = TargetConfig(path=str(tmp_path), num_layer_ids=3, dtype="bfloat16")
        assert load_target(own, "cpu").dtype == torch.bfloat16
    finally:
        machine.lacks_bf16.cache_clear()


def test_mistakes_are_named(target_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"no config\.json"):
        load_target(TargetConfig(path=str(tmp_path / "nowhere")), "cpu")
    with pytest.raises(TargetError, match=r"target\.dtype=fp8"):
        load_target(TargetConfig(path=str(target_folder), dtype="fp8"), "cpu")
    for file in target_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(TargetError, match="could not be loaded"):
        load_target(TargetConfig(path=str(tmp_path), num_layer_ids=3), "cpu")
    save_file(load_file(target_folder / "model.safetensors"), weights)
    load_target(TargetConfig(path=str(tmp_path), num_layer_ids=3), "cpu")
