"""The validator: what it finds, in our exports and in others', and what it lets pass.

Known to be right by: one break at a time on a sound export, whose finding has to name it; and the
table of checkpoint-formats.md for what is sound.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from deepspec.checks.export import check_export
from deepspec.cli import main
from deepspec.errors import CheckpointError
from deepspec.export import open_export, write_export
from deepspec.targets import Target
from tests.export.conftest import make_drafter
from tests.export.exports import edit, rewrite
from tests.export.test_speculators import BACKBONE, config_of, foreign


def export(
    target: Target,
    out: Path,
    layout: str = "flat",
    kind: str = "vanilla",
    profile: str = "serving",
    size: int | None = None,
) -> Path:
    drafter = make_drafter(target, kind, draft_vocab_size=size)
    write_export(layout, "dspark", drafter, target, out, profile, 32, lambda *_: "a card\n")
    return out


def truncate(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def flip_a_bit(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)


def tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder, change)


def prefixed(found: dict[str, Tensor]) -> None:
    for name in list(found):
        found[f"model.{name}"] = found.pop(name)


def as_fp32(found: dict[str, Tensor]) -> None:
    found["fc.weight"] = found["fc.weight"].float()


def backbone(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        own = config_of(folder)[BACKBONE] | changes
        edit(folder, **{BACKBONE: {key: value for key, value in own.items() if value is not None}})

    return change


FLAT: dict[str, tuple[Callable[[Path], None], str]] = {
    "no anchor key": (
        lambda f: edit(f, sample_from_anchor=None),
        "sample_from_anchor is missing, expected true",
    ),
    "mask first": (lambda f: edit(f, sample_from_anchor=False), "sample_from_anchor is False"),
    "causality not said": (lambda f: edit(f, is_causal=None), "is_causal is missing"),
    "causal": (lambda f: edit(f, is_causal=True), "is_causal is True"),
    "tied": (lambda f: edit(f, tie_word_embeddings=True), "tie_word_embeddings is True"),
    "the last layer": (
        lambda f: edit(f, target_layer_ids=[1, 2, 5]),
        r"layers \[1, 2, 5\] of 6 have \[5\], the last layer's output",
    ),
    "layers that are not there": (
        lambda f: edit(f, target_layer_ids=[2, 6, 7]),
        r"\[2, 6, 7\] of 6 have \[6, 7\], no layer's output",
    ),
    "layers twice": (lambda f: edit(f, target_layer_ids=[1, 1, 2]), "not distinct and ascending"),
    "layers below": (lambda f: edit(f, target_layer_ids=[-2, 1, 2]), "begin below -1"),
    "mask outside": (lambda f: edit(f, mask_token_id=260), "mask_token_id 260 is outside the voc"),
    "no block": (lambda f: edit(f, block_size=0), "block_size is 0, expected at least 1"),
    "key missing": (
        lambda f: edit(f, markov_rank=None, head_dim=None),
        "misses head_dim, markov_rank",
    ),
    "wrong type": (lambda f: edit(f, block_size="four"), "block_size is 'four', expected int"),
    "sizes": (lambda f: edit(f, hidden_size=48), r"fc\.weight is \[32, 96\], expected \[48, 144\]"),
    "impossible": (lambda f: edit(f, head_dim=-8), "head_dim is -8, expected at least 1"),
    "truncated": (truncate, "model.safetensors is corrupt or incomplete"),
    "one bit": (flip_a_bit, "its sha256 is not the one in config.json"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
    "config no JSON": (
        lambda f: (f / "config.json").write_text("{"),
        "config.json is damaged",
    ),
    "no layout": (
        lambda f: edit(f, architectures=["Qwen3ForCausalLM"]),
        "Qwen3ForCausalLM.*which no layout calls itself",
    ),
    "dtype": (tensors(as_fp32), r"fc\.weight is F32, expected BF16"),
    "prefix": (tensors(prefixed), r"names begin with model\.; the layout has no prefix"),
    "frequencies": (
        tensors(lambda t: t.update({"rotary_emb.inv_freq": torch.ones(4).bfloat16()})),
        "inv_freq.*bf16 ones are wrong",
    ),
    "unknown": (
        tensors(lambda t: t.update(extra=torch.zeros(2).bfloat16())),
        "extra is not called for",
    ),
    "missing": (tensors(lambda t: t.pop("norm.weight")), r"norm\.weight is missing"),
    "gated in name only": (
        lambda f: edit(f, markov_head_type="gated"),
        r"gate_proj\.weight is missing",
    ),
}
SPECULATORS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no anchor key": FLAT["no anchor key"],
    "ids not plus one": (
        lambda f: edit(f, aux_hidden_state_layer_ids=[1, 2, 3]),
        r"aux_hidden_state_layer_ids is \[1, 2, 3\], expected \[2, 3, 4\]",
    ),
    "the last layer": (
        lambda f: edit(f, aux_hidden_state_layer_ids=[2, 3, 6]),
        r"\[1, 2, 5\] of 6 have \[5\], the last layer's output",
    ),
    "causality not said": (backbone(is_causal=None), "is_causal is missing"),
    "tied": (lambda f: edit(f, tie_word_embeddings=True), "tie_word_embeddings is True"),
    "no backbone": (lambda f: edit(f, **{BACKBONE: None}), f"{BACKBONE} is missing"),
    "another algorithm": (
        lambda f: edit(f, speculators_model_type="dflash"),
        "speculators_model_type is 'dflash', not 'dspark'",
    ),
    "no proposal": (
        lambda f: edit(f, speculators_config={"verifier": {"name_or_path": "x"}}),
        r"proposal_methods\[0\]\.speculative_tokens is missing",
    ),
    "no verifier": (
        lambda f: edit(
            f, speculators_config={"proposal_methods": [{"speculative_tokens": 4}], "verifier": {}}
        ),
        "verifier.name_or_path is missing",
    ),
    "another count": (
        lambda f: edit(
            f,
            speculators_config={
                "proposal_methods": [{"speculative_tokens": 3}],
                "verifier": {"name_or_path": "x"},
            },
        ),
        "speculative_tokens is 3, but .* gives block_size=4 drafts",
    ),
    "no head": (
        tensors(lambda t: t.pop("lm_head.weight")),
        "lm_head.weight is missing: a draft voc",
    ),
    "no table": (tensors(lambda t: t.pop("d2t")), "d2t is missing"),
    "ids outside": (tensors(lambda t: t["d2t"].add_(200)), "d2t leads to the ids"),
    "table dtype": (tensors(lambda t: t.update(d2t=t["d2t"].int())), "d2t is I32, expected I64"),
    "tables differ": (tensors(lambda t: t["t2d"].logical_not_()), "t2d is true at other tokens"),
}


def assert_found(folder: Path, message: str) -> None:
    found = check_export(folder)
    assert any(re.search(message, fault) for fault in found.faults), found.faults
    assert not found.fine
    assert not any(entry.loads for entry in found.support)


@pytest.mark.parametrize("what", FLAT)
def test_every_break_of_a_flat_export_is_found(target: Target, tmp_path: Path, what: str) -> None:
    folder = export(target, tmp_path / "out")
    found = check_export(folder, target)
    assert (found.layout, found.faults, found.doubts, found.fine) == ("flat", [], [], True)
    breaking, message = FLAT[what]
    breaking(folder)
    assert_found(folder, message)


@pytest.mark.parametrize("what", SPECULATORS)
def test_every_break_of_a_speculators_export_is_found(
    target: Target, tmp_path: Path, what: str
) -> None:
    folder = export(target, tmp_path / "out", "speculators", size=100)
    found = check_export(folder, target)
    assert (found.layout, found.faults, found.doubts) == ("speculators", [], [])
    breaking, message = SPECULATORS[what]
    breaking(folder)
    assert_found(folder, message)


def test_all_breaks_are_found_at_once(target: Target, tmp_path: Path) -> None:
    folder = export(target, tmp_path / "out")
    edit(folder, sample_from_anchor=None, is_causal=None, mask_token_id=999)
    rewrite(folder, as_fp32)
    assert len(check_export(folder).faults) == 4


def engines(folder: Path, target: Target | None = None) -> dict[str, str | None]:
    """{engine: None where it loads, else why not}"""
    found = check_export(folder, target)
    assert found.faults == []
    return {entry.engine: None if entry.loads else entry.why for entry in found.support}


@pytest.mark.parametrize(
    ("layout", "kind", "profile", "size", "loads"),
    [
        ("flat", "vanilla", "serving", None, "vLLM SGLang llama.cpp"),
        ("flat", "vanilla", "full", None, "vLLM SGLang llama.cpp deepseek-ai/DeepSpec"),
        ("flat", "gated", "serving", None, "SGLang"),
        ("flat", "rnn", "full", None, "SGLang deepseek-ai/DeepSpec"),
        ("flat", "rank0", "serving", None, ""),
        ("speculators", "vanilla", "serving", None, "vLLM llama.cpp"),
        ("speculators", "vanilla", "full", 100, "vLLM llama.cpp"),
    ],
)
def test_engines_are_those_of_the_table(
    target: Target,
    tmp_path: Path,
    layout: str,
    kind: str,
    profile: str,
    size: int | None,
    loads: str,
) -> None:
    folder = export(target, tmp_path / "out", layout, kind, profile, size)
    answers = engines(folder)
    assert {e for e, why in answers.items() if why is None} == {*loads.split(), "this library"}
    serving = {"vLLM", "SGLang", "llama.cpp"}
    assert check_export(folder).fine == bool(serving & set(loads.split()))
    if kind == "gated":
        assert "vanilla Markov heads only, not gated ones" in str(answers["vLLM"])
    if kind == "rank0":
        assert "rank 0" in str(answers["vLLM"])


@pytest.mark.parametrize("profile", ["serving", "full"])
@pytest.mark.parametrize("layout", ["flat", "speculators"])
def test_embed_tokens_with_an_untied_head_is_found_for_llama_cpp(
    llama: Target, tmp_path: Path, layout: str, profile: str
) -> None:
    folder = export(llama, tmp_path / "out", layout, profile=profile)
    for of in (None, llama):
        why = engines(folder, of)["llama.cpp"]
        if profile == "serving":
            assert why is None
        else:
            assert "embed_tokens inside where the target's LM head is untied" in str(why)


def test_what_is_not_known_of_the_head_is_asked_of_the_target(
    target: Target, tmp_path: Path
) -> None:
    """A foreign export with an embedding, and rows of the head only: nothing in it tells."""
    folder = foreign(export(target, tmp_path / "out", "speculators", profile="full", size=100))
    assert "nothing tells whether" in str(engines(folder)["llama.cpp"])
    assert engines(folder, target)["llama.cpp"] is None


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["flat", "speculators"])
def test_no_value_of_any_key_is_too_strange(target: Target, tmp_path: Path, layout: str) -> None:
    assert_nothing_is_too_strange(export(target, tmp_path / "out", layout))


STRANGE: tuple[Any, ...] = (
    *(None, "x", -3, 0, 0.5, True, [], ["x"], {"x": None}),
    *(10**9, 10**30, float("nan"), float("inf"), "9" * 5000, [[1]], {"rope_type": ["x"]}),
)


def assert_nothing_is_too_strange(folder: Path) -> None:
    """Whatever stands at a key: a finding and a CheckpointError, or no harm; never another error.

    What engines alone can load is not loaded here.
    """
    whole = config_of(folder)
    places = [(whole, key) for key in whole]
    if BACKBONE in whole:
        places += [(whole[BACKBONE], key) for key in whole[BACKBONE]]
        places += [(whole["speculators_config"], key) for key in whole["speculators_config"]]
    places += [(whole["deepspec"], key) for key in whole["deepspec"]]
    for holder, key in places:
        kept = holder[key]
        for value in STRANGE:
            holder[key] = value
            (folder / "config.json").write_text(json.dumps(whole))
            found = check_export(folder)
            ours = any(e.loads for e in found.support if e.engine == "this library")
            if found.fine and ours:
                open_export(folder).load()
                continue
            with suppress(CheckpointError):  # a fault need not hinder reading
                open_export(folder)
        holder[key] = kept


# -------------------------------------------------------------------------------- others' exports


def test_a_release_of_the_public_implementation(target: Target, tmp_path: Path) -> None:
    """No `deepspec` key, and two keys missing that only a validator minds."""
    folder = export(target, tmp_path / "out", profile="full")
    edit(folder, deepspec=None, is_causal=None, sample_from_anchor=None)
    faults = check_export(folder).faults
    assert [fault.split(",")[0].split(";")[0] for fault in faults] == [
        "sample_from_anchor is missing",
        "is_causal is missing",
    ]
    edit(folder, is_causal=False, sample_from_anchor=True)
    assert all(why is None for why in engines(folder).values())


def test_weights_in_several_files(target: Target, tmp_path: Path) -> None:
    folder = export(target, tmp_path / "out")
    edit(folder, deepspec=None)
    found = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(found)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, own in parts.items():
        save_file({name: found[name] for name in own}, folder / file)
    index = {"weight_map": {name: file for file, own in parts.items() for name in own}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert check_export(folder).fine
    (folder / "b.safetensors").unlink()
    assert_found(folder, "b.safetensors is missing")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_target_layers": 9}, r"num_target_layers is 9, but .* has 6"),
        ({"num_target_layers": 9, "target_layer_ids": [1, 2, 6]}, r"\[6\], no layer's output"),
        ({}, r"made for another target than .*: embedding_and_head, weights differ"),
    ],
)
def test_a_target_tells_more(
    target: Target, llama: Target, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    folder = export(target, tmp_path / "out", profile="full")
    edit(folder, **changes)
    if not changes:
        config = config_of(folder)
        config["deepspec"]["identity"] |= {"embedding_and_head": "x", "weights": "y"}
        (folder / "config.json").write_text(json.dumps(config))
    assert check_export(folder).fine
    found = check_export(folder, target)
    assert any(re.search(message, fault) for fault in found.faults), found.faults
    faults = check_export(folder, llama).faults
    assert any("embed_tokens.weight is not that of" in fault for fault in faults), faults


# ------------------------------------------------------------------------------------ the command


def test_the_command_prints_the_table_and_its_exit_code(
    target: Target, target_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = export(target, tmp_path / "out")
    main(["check", f"export={folder}"])
    out = capsys.readouterr().out
    assert "flat layout" in out
    for engine in ("vLLM", "SGLang", "llama.cpp"):
        assert re.search(rf"^{engine} +yes ", out, re.MULTILINE)
    assert re.search(r"^deepseek-ai/DeepSpec +no ", out, re.MULTILINE)
    main(["check", f"export={folder}", f"target.path={target_folder}"])

    edit(folder, sample_from_anchor=None)
    with pytest.raises(SystemExit) as end:
        main(["check", f"export={folder}"])
    assert end.value.code == 1
    assert "fault: sample_from_anchor is missing" in capsys.readouterr().out

    for words, message in (
        ([f"export={tmp_path}"], "holds no export (config.json is missing)"),
        ([], "give exactly one of target=..., export=..., run=..."),
        ([f"export={folder}", f"run={folder}"], "give exactly one of"),
        ([f"export={folder}", "target.pth=x"], "did you mean target.path?"),
    ):
        with pytest.raises(SystemExit) as end:
            main(["check", *words])
        assert end.value.code == 2
        assert message in capsys.readouterr().err


def test_no_folder_is_a_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no export"):
        check_export(tmp_path / "nowhere")
