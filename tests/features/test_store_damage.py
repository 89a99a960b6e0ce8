"""A damaged store gives what was written or an error, and never other data."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from deepspec.cli import main
from deepspec.commands.feature_sources import extract_features
from deepspec.commands.stages import TrainingData
from deepspec.config.loading import config_from
from deepspec.errors import DataError
from deepspec.features.sources import Hybrid
from deepspec.features.store import Store
from deepspec.features.store_index import digest_all
from deepspec.records import Sample, TargetFeatures
from deepspec.targets import Target
from tests.features.test_store import make_older
from tests.trainers import SETTINGS, make_samples

SAMPLES = [
    *make_samples(4),
    *(replace(sample, conversation_id="others") for sample in make_samples(3, seed=1)),
]
CONFIG = config_from(SETTINGS, ["extract.shard_mib=0.02"])
Content = tuple[list[Any], TargetFeatures, dict[str, Any]]


def extract(target: Target, path: Path, *samples: Sample) -> Store:
    data = TrainingData(list(samples or SAMPLES), [], {})
    return extract_features(CONFIG, target, data, path, lambda: None)


@pytest.fixture(scope="module")
def whole(target: Target, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of several shards that nothing happened to."""
    path = tmp_path_factory.mktemp("store") / "store"
    assert len(extract(target, path).finished()) > 1
    return path


def content(path: Path) -> Content:
    """What a training reads of a store."""
    store = Store.open(path)
    store.require_complete()
    samples = list(store.samples())
    rows = [
        (each.sample_id, each.conversation_id, each.input_ids.tolist(), each.loss_mask.tolist())
        for each in samples
    ]
    return rows, store.read(samples), vars(store.header)


def assert_same(found: Content, expected: Content) -> None:
    assert (found[0], found[2]) == (expected[0], expected[2])
    assert torch.equal(found[1].context, expected[1].context)
    assert torch.equal(found[1].final, expected[1].final)


def is_verified(path: Path) -> bool:
    """What the exit code of `deepspec verify-store` tells; any other end is a traceback."""
    code: Any = 0
    try:
        main(["verify-store", f"path={path}"])
    except SystemExit as end:
        code = end.code
    assert code in (0, 2)
    return bool(code == 0)


@pytest.mark.parametrize("kind", ["store.json", "shard-*.json", "shard-*.safetensors"])
def test_a_flipped_bit_changes_nothing_or_is_found(
    whole: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """In any byte of the header and of an index, and of the tensors of a shard and their header."""
    file, expected = sorted(whole.glob(kind))[0], content(whole)
    written = file.read_bytes()
    front = 8 + int.from_bytes(written[:8], "little") if file.suffix == ".safetensors" else 0

    @settings(max_examples=150)
    @given(
        st.one_of(st.integers(0, (front or len(written)) - 1), st.integers(0, len(written) - 1)),
        st.integers(1, 255),
    )
    def check(place: int, change: int) -> None:
        damaged = bytearray(written)
        damaged[place] ^= change
        file.write_bytes(damaged)
        if is_verified(whole):
            assert_same(content(whole), expected)
        else:
            with pytest.raises(DataError, match=str(whole)):
                content(whole)

    try:
        check()
    finally:
        file.write_bytes(written)
    capsys.readouterr()
    assert is_verified(whole)


def change_index(path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    file = sorted(path.glob("shard-*.json"))[0]
    index = json.loads(file.read_text())
    change(index)
    file.write_text(json.dumps(index))
    return file


@pytest.mark.parametrize("is_older", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        lambda index: index["samples"][0].update(id="another"),
        lambda index: index["samples"][0].update(finals=index["samples"][0]["finals"] ^ 1),
        lambda index: index["samples"][0].update(length=-1),
        lambda index: index["samples"][0].update(length=2**62),
        lambda index: index["samples"][0].update(length=10**400),
        lambda index: index["samples"][0].update(length=True),
        lambda index: index["samples"][0].update(length=index["samples"][0]["length"] + 1),
        lambda index: index["samples"][0].update(digest="0" * 16),
        lambda index: index["samples"].reverse(),
        lambda index: index["samples"].pop(),
        lambda index: index["samples"].append(index["samples"][0]),
        lambda index: index.update(sha256=None),
        lambda index: index.update(samples={}),
    ],
)
def test_an_index_that_is_not_its_shards_is_found_and_made_again(
    target: Target,
    whole: Path,
    tmp_path: Path,
    change: Callable[[dict[str, Any]], None],
    is_older: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Also where no checksum protects it, as in older stores."""
    path = shutil.copytree(whole, tmp_path / "store")
    if is_older:
        make_older(path)
    file = change_index(path, change)
    with pytest.raises(DataError, match=r"same deepspec extract|delete it and extract again"):
        content(path)
    assert not is_verified(path)
    extract(target, path)
    said = capsys.readouterr().err
    assert file.name in said
    assert "it is made again" in said
    assert is_verified(path)
    rows, expected = content(path)[0], content(whole)[0]
    assert rows == expected


@pytest.mark.parametrize(
    "raw", [b"", b"\xff{}", b"[" * 100_000, b"{" * 10_000, b'{"samples": NaN}', b"\x00" * 64]
)
def test_what_is_no_index_is_made_again(
    target: Target, whole: Path, tmp_path: Path, raw: bytes
) -> None:
    path = shutil.copytree(whole, tmp_path / "store")
    sorted(path.glob("shard-*.json"))[0].write_bytes(raw)
    assert not is_verified(path)
    extract(target, path)
    assert_same(content(path), content(whole))


def test_a_lost_header_is_written_again_and_shards_are_kept(
    target: Target, whole: Path, tmp_path: Path
) -> None:
    """What the message about a damaged one says to do helps."""
    path = shutil.copytree(whole, tmp_path / "store")
    (path / "store.json").write_text("{")
    with pytest.raises(DataError, match="delete it, and run the same deepspec extract again"):
        extract(target, path)
    (path / "store.json").unlink()
    before = {file: file.stat().st_mtime_ns for file in path.iterdir()}
    extract(target, path)
    assert all(file.stat().st_mtime_ns == moment for file, moment in before.items())
    assert_same(content(path), content(whole))


def test_a_hybrid_store_goes_on_without_a_damaged_index(
    target: Target, whole: Path, tmp_path: Path
) -> None:
    """Whether the job begins with it or meets it at a checkpoint."""
    path = shutil.copytree(whole, tmp_path / "store")
    first, second, *_ = sorted(path.glob("shard-*.json"))
    first.write_text("{")
    header = Store.open(whole).header
    source = Hybrid(target, Store.create(path, header, repair=True), "hybrid-0", 2**30)
    assert not first.exists()
    other = Hybrid(target, Store.create(path, header), "hybrid-1", 2**30)
    source.features(SAMPLES)
    source.settle(lambda: None)
    (mine,) = path.glob("hybrid-0-*.json")
    mine.write_text("[]")
    other.settle(lambda: None)
    assert not mine.exists()
    assert second.exists()


def test_an_older_store_is_read_and_what_is_not_protected_is_said(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = shutil.copytree(whole, tmp_path / "store")
    make_older(path)
    assert is_verified(path)
    said = capsys.readouterr()
    assert "no checksum protects its store.json" in said.err
    assert "all that has a checksum is as it was written" in said.out
    (rows, features, header), expected = content(path), content(whole)
    assert_same(
        (rows, features, {**header, "conversations": expected[2]["conversations"]}), expected
    )


def test_conversation_ids_are_protected(whole: Path, tmp_path: Path) -> None:
    """By which training holds samples out."""
    path = shutil.copytree(whole, tmp_path / "store")
    for file in path.glob("shard-*.json"):
        file.write_text(file.read_text().replace("others", "other"))
    with pytest.raises(DataError, match="is damaged"):
        content(path)


def test_a_shard_of_another_store_is_refused(
    target: Target, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its name and its samples are the same, but not the target that computed its features."""
    path = shutil.copytree(whole, tmp_path / "store")
    (path / "store.json").unlink()
    header = replace(Store.open(whole).header, identity={**target.identity, "weights": "others"})
    Store.create(tmp_path / "other", header)
    for file in path.iterdir():
        shutil.copy(file, tmp_path / "other")
    assert not is_verified(tmp_path / "other")
    assert "not that of this content in this store" in capsys.readouterr().err


@pytest.mark.parametrize(
    "damage", ["gone", "cut", "flip", "huge header", "dtype", "shape", "extra"]
)
@pytest.mark.parametrize("verify", [False, True])
def test_a_bad_shard_is_found_and_made_again(
    target: Target, whole: Path, tmp_path: Path, damage: str, verify: bool
) -> None:
    """Without features.verify all but a changed number of a feature is found."""
    path = shutil.copytree(whole, tmp_path / "store")
    file = sorted(path.glob("*.safetensors"))[0]
    raw, tensors = file.read_bytes(), load_file(file)
    if damage == "gone":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(raw[:-20])
    elif damage == "flip":
        at = raw.index(tensors["input_ids"].numpy().tobytes())
        file.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
    elif damage == "huge header":
        file.write_bytes(b"\xff" * 7 + b"\x7f" + raw[8:])
    else:
        if damage == "dtype":
            tensors["input_ids"] = tensors["input_ids"].float()
        elif damage == "shape":
            tensors["context"] = tensors["context"][:, :-1].contiguous()
        else:
            tensors["more"] = torch.zeros(3)
        save_file(tensors, file)
    store = Store.open(path, verify)
    with pytest.raises(DataError, match=f"{file.stem}.*same deepspec extract"):
        store.read(list(store.samples()))
    assert not is_verified(path)
    config = config_from(SETTINGS, ["extract.shard_mib=0.02", f"features.verify={verify}"])
    extract_features(config, target, TrainingData(SAMPLES, [], {}), path, lambda: None)
    assert_same(content(path), content(whole))


def test_more_samples_than_the_store_is_of_are_refused(whole: Path, tmp_path: Path) -> None:
    """Where an older store has no checksum of its own."""
    path = shutil.copytree(whole, tmp_path / "store")
    make_older(path)
    header = json.loads((path / "store.json").read_text())
    header |= {"samples": 3, "data": digest_all(SAMPLES[:3])}
    (path / "store.json").write_text(json.dumps(header))
    assert not is_verified(path)
    with pytest.raises(DataError, match=r"are not those that store\.json was written for"):
        content(path)
