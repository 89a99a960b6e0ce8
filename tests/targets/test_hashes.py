"""The identity of a target is of every byte of its weights, and costs them to be read once."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from deepspec.checks.export import check_export
from deepspec.config.schema import ServeConfig, TargetConfig
from deepspec.errors import CheckpointError, DataError, ServerError, TargetError
from deepspec.features.extract import header_of
from deepspec.features.store import Store
from deepspec.regeneration.answer_file import AnswerFile
from deepspec.targets import Target, load_ends, load_target
from deepspec.targets import hashes as hashes_module
from deepspec.targets.files import SAMPLED_ROWS, WeightFiles
from deepspec.targets.gguf import GgufFile
from deepspec.targets.hashes import CACHE, Span, hash_of_tensor, hashes_in, read_hashes
from deepspec.targets.identity import differing
from deepspec.training.checkpoint import read_checkpoint
from tests.checks.test_export import export
from tests.conftest import make_tokenizer
from tests.features.test_remote import client, serving
from tests.targets.test_gguf import write_gguf
from tests.trainers import MakeTrainer, make_samples

SINGLE = "model.safetensors"
FORK = multiprocessing.get_context("fork")  # a process that imports torch takes seconds to start


def config(path: Path) -> TargetConfig:
    return TargetConfig(path=str(path), dtype="float32", num_layer_ids=3)


def hash_of(path: Path) -> str:
    return WeightFiles(config(path)).hash_of_all()


@pytest.fixture(scope="module")
def changed_folder(target_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The target with one row changed in each of its matrices, none of those that are sampled."""
    folder = shutil.copytree(target_folder, tmp_path_factory.mktemp("changed") / "target")
    tensors = load_file(folder / SINGLE)
    for tensor in tensors.values():
        if tensor.dim() == 2:
            rows = len(tensor) - 1
            sampled = {index * rows // (SAMPLED_ROWS - 1) for index in range(SAMPLED_ROWS)}
            tensor[min(set(range(rows)) - sampled)] += 1
    save_file(tensors, folder / SINGLE, {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def changed(changed_folder: Path) -> Target:
    return load_target(config(changed_folder), "cpu")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, which also remembers files that have just been written."""
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    monkeypatch.setattr(hashes_module, "RECENT", -1)
    return tmp_path / "cache" / "weights"


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bytes of weights were read, a number for each time."""
    counts: list[int] = []

    def counted(file: Path, spans: Mapping[str, Span]) -> dict[str, str]:
        counts.append(sum(span.size for span in spans.values()))
        return read_hashes(file, spans)

    monkeypatch.setattr(hashes_module, "read_hashes", counted)
    return counts


# ------------------------------------------------------------------------------ what it covers


def test_one_changed_row_in_each_matrix_is_another_target(target: Target, changed: Target) -> None:
    """Though no row that older versions sampled is another."""
    assert target.identity["weights"] == changed.identity["weights"]
    assert differing(target.identity, changed.identity) == ["embedding_and_head", "weights"]


def test_nothing_meets_another_targets_weights(
    target: Target,
    target_folder: Path,
    changed: Target,
    changed_folder: Path,
    make_trainer: MakeTrainer,
    tmp_path: Path,
) -> None:
    """Resume, store, server, export and answers refuse the target with the changed rows."""
    saved = read_checkpoint(make_trainer("run").save())
    other = make_trainer("other")
    other.target = changed
    with pytest.raises(CheckpointError, match="another target"):
        other.resume(saved)

    samples = make_samples(2)
    store = Store.create(tmp_path / "store", header_of(target, samples, "auto"))
    with pytest.raises(DataError, match="its identity differ"):
        Store.create(tmp_path / "store", header_of(changed, samples, "auto"))
    with pytest.raises(TargetError, match="the embedding_and_head differ"):
        load_ends(config(changed_folder), "cpu").adopt(store.header.identity, "the store")

    with serving(changed, ServeConfig()) as address:
        remote = client(address)
        with pytest.raises(TargetError, match="the embedding_and_head differ"):
            load_ends(config(target_folder), "cpu").adopt(remote.identity, "the server")
        remote.identity = target.identity  # as if it had been started again with another
        with pytest.raises(ServerError, match="another target than before"):
            remote.features(samples)

    folder = export(target, tmp_path / "export")
    assert check_export(folder, target).fine
    assert any("another target" in fault for fault in check_export(folder, changed).faults)

    answers = tmp_path / "answers.jsonl"
    answers.write_text("")
    AnswerFile(answers, dict(target.identity))
    answers.write_text(json.dumps({"id": "1", "messages": [], "finish_reason": "stop"}) + "\n")
    AnswerFile(answers, dict(target.identity))
    with pytest.raises(DataError, match="all_weights is"):
        AnswerFile(answers, dict(changed.identity))


def test_what_older_versions_recorded_is_compared_by_what_it_knows(
    target: Target, target_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They had no hash of all weights; that they lack it is said, once."""
    hashes_module.say_once.cache_clear()
    older = {key: value for key, value in target.identity.items() if not key.startswith("all_")}
    for pair in ((older, target.identity), (target.identity, older)):
        assert differing(*pair) == []
    assert differing({**older, "weights": "x"}, target.identity) == ["weights"]
    assert capsys.readouterr().err.count("was written by an earlier version") == 1

    ends = load_ends(config(target_folder), "cpu")
    ends.adopt(older, "the store")
    assert older.items() <= ends.identity.items()
    answers = tmp_path / "answers.jsonl"
    answers.write_text("")
    AnswerFile(answers, older)
    answers.write_text(json.dumps({"id": "1", "messages": [], "finish_reason": "stop"}) + "\n")
    AnswerFile(answers, dict(target.identity))


def test_files_and_order_of_tensors_do_not_matter(
    target: Target, target_folder: Path, tmp_path: Path
) -> None:
    target.model.save_pretrained(tmp_path / "cut", max_shard_size="40KB")
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) > 3
    tensors = load_file(target_folder / SINGLE)
    (tmp_path / "turned").mkdir()
    turned = dict(sorted(tensors.items(), reverse=True))
    # by hand: safetensors writes tensors in an order of its own
    header, data, start = {}, b"", 0
    for name, tensor in turned.items():
        raw = tensor.numpy().tobytes()
        offsets = [start, start + len(raw)]
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": offsets}
        start, data = offsets[1], data + raw
    text = json.dumps(header).encode()
    raw = len(text).to_bytes(8, "little") + text + data
    (tmp_path / "turned" / SINGLE).write_bytes(raw)
    for folder in ("cut", "turned"):
        shutil.copy(target_folder / "config.json", tmp_path / folder)
        assert hash_of(tmp_path / folder) == hash_of(target_folder)


def test_every_tensor_name_shape_type_and_value_counts(target_folder: Path, tmp_path: Path) -> None:
    shutil.copy(target_folder / "config.json", tmp_path)
    tensors = load_file(target_folder / SINGLE)
    (name, first), *others = tensors.items()
    flipped = first.clone()
    flipped.view(torch.int32)[-1] ^= 1  # the least that a number can change by
    found = [
        hash_of(write(tmp_path, dict(changed)))
        for changed in (
            tensors.items(),
            [(name, flipped), *others],
            [(name, first.reshape(-1)), *others],
            [(name, first.half()), *others],
            [(f"{name}x", first), *others],
            others,
        )
    ]
    assert len(set(found)) == len(found)
    assert found[0] == hash_of(target_folder)


def write(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / SINGLE)
    return folder


def test_a_model_without_files_has_the_identity_of_its_tensors(
    target: Target, changed: Target
) -> None:
    """That of its files where they are known."""
    own, other = (
        Target(each.model, make_tokenizer(), 3, target.name) for each in (target, changed)
    )
    assert differing(own.identity, other.identity) == ["embedding_and_head", "weights"]
    assert own.identity["all_embedding_and_head"] == target.identity["all_embedding_and_head"]
    narrow = torch.randn(7, 5).bfloat16()
    assert hash_of_tensor(narrow) == hash_of_tensor(narrow.float())  # the same numbers
    assert hash_of_tensor(narrow) != hash_of_tensor(narrow.float() + 1e-9)
    assert hash_of_tensor(narrow.T) == hash_of_tensor(narrow.T.contiguous())


def test_a_gguf_is_known_by_all_its_bytes(tmp_path: Path, cache: Path, read: list[int]) -> None:
    path, _ = write_gguf(tmp_path, "qwen3", quantise=True)
    known = GgufFile(str(path)).hash_of_all()
    ((_, spans),) = GgufFile(str(path)).spans()
    assert read == [sum(span.size for span in spans.values())]
    raw = bytearray(path.read_bytes())
    span = next(span for span in spans.values() if len(span.shape) == 2 and span.shape[0] > 8)
    raw[span.start + span.size // span.shape[0]] ^= 1  # in the second row
    path.write_bytes(raw)
    changed = GgufFile(str(path))
    assert changed.hash_of_all() != known


# ------------------------------------------------------------------------------- what it costs


def test_a_second_start_reads_no_weights(target_folder: Path, cache: Path, read: list[int]) -> None:
    first = load_target(config(target_folder), "cpu").identity
    assert sum(read) == sum(t.nbytes for t in load_file(target_folder / SINGLE).values())
    read.clear()
    assert load_target(config(target_folder), "cpu").identity == first
    ends = load_ends(config(target_folder), "cpu")
    assert ends.identity.items() < first.items()
    assert not read
    assert len(list(cache.iterdir())) == 1  # and no lock


def test_embedding_and_head_are_read_alone(
    target_folder: Path, cache: Path, read: list[int]
) -> None:
    """Where no more of the target is used; what is then known is not read again."""
    tensors = load_file(target_folder / SINGLE)
    load_ends(config(target_folder), "cpu").identity  # noqa: B018
    assert read == [tensors["model.embed_tokens.weight"].nbytes]
    hash_of(target_folder)
    assert sum(read) == sum(tensor.nbytes for tensor in tensors.values())


def test_a_file_that_was_changed_is_read_again(
    target_folder: Path, tmp_path: Path, cache: Path
) -> None:
    """Also where size and mtime are those from before: the ctime is not."""
    folder = shutil.copytree(target_folder, tmp_path / "target")
    before, file = hash_of(folder), folder / SINGLE
    times = file.stat()
    with file.open("r+b") as stream:
        stream.seek(-3, os.SEEK_END)
        stream.write(b"\x55")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert file.stat().st_mtime_ns == times.st_mtime_ns
    assert hash_of(folder) != before


def test_what_was_written_a_moment_ago_is_not_remembered(
    target_folder: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may change again within the file system's unit of time."""
    monkeypatch.setattr(hashes_module, "RECENT", 2.0)
    hash_of(shutil.copytree(target_folder, tmp_path / "target"))
    assert not list(cache.iterdir())


@pytest.fixture(scope="module")
def remembered(
    target_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, str]:
    """A file of weights, what the cache has of it, and the hash."""
    folder = tmp_path_factory.mktemp("remembered")
    shutil.copy(target_folder / "config.json", folder)
    write(folder, dict(list(load_file(target_folder / SINGLE).items())[:2]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE, str(folder / "cache"))
        patch.setattr(hashes_module, "RECENT", -1)
        known = hash_of(folder)
    (entry,) = (folder / "cache" / "weights").iterdir()
    return folder, entry, known


@settings(max_examples=60)
@given(place=st.integers(0, 2**16), change=st.integers(1, 255), cut=st.booleans())
def test_a_damaged_cache_is_not_believed(
    remembered: tuple[Path, Path, str], place: int, change: int, cut: bool
) -> None:
    folder, entry, known = remembered
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE, str(folder / "cache"))
        raw = bytearray(entry.read_bytes())
        raw[place % len(raw)] ^= change
        entry.write_bytes(raw[: place % len(raw)] if cut else raw)
        patch.setattr(hashes_module, "RECENT", -1)
        assert hash_of(folder) == known


def test_a_cache_that_cannot_be_written_is_said(
    target_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    known = hash_of(target_folder)
    monkeypatch.setattr(hashes_module, "RECENT", -1)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(CACHE, str(tmp_path / "file"))
    assert hash_of(target_folder) == known
    assert f"set {CACHE} to a folder that can be" in capsys.readouterr().err


# --------------------------------------------------------------------------- several processes


@pytest.fixture
def large(tmp_path: Path) -> tuple[Path, dict[str, Span]]:
    """A file that takes a moment to hash."""
    file, size = tmp_path / "large", 2**26
    with file.open("wb") as stream:
        stream.truncate(size)
    return file, {"all": Span("BF16", [size // 2], 0, size)}


def test_of_two_processes_one_hashes_and_both_know(
    large: tuple[Path, dict[str, Span]], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: Any = FORK.Queue()
    ready = FORK.Barrier(2)

    def noted(file: Path, spans: Mapping[str, Span]) -> dict[str, str]:
        found.put(sum(span.size for span in spans.values()))
        return read_hashes(file, spans)

    def work() -> None:
        ready.wait()
        found.put(hashes_in(*large))

    monkeypatch.setattr(hashes_module, "read_hashes", noted)
    processes = [FORK.Process(target=work) for _ in range(2)]
    for process in processes:
        process.start()
    answers = [found.get(timeout=60) for _ in range(4)]
    for process in processes:
        process.join(timeout=60)
    known = [answer for answer in answers if isinstance(answer, dict)]
    assert known == [read_hashes(*large)] * 2
    assert sorted(answer for answer in answers if isinstance(answer, int)) == [0, 2**26]


def test_a_process_that_dies_while_it_hashes_holds_up_no_other(
    large: tuple[Path, dict[str, Span]], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began = FORK.Event()

    def endless(*_: object) -> dict[str, str]:
        began.set()
        time.sleep(300)
        return {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hashes_module, "read_hashes", endless)
        process = FORK.Process(target=hashes_in, args=large)
        process.start()
    assert began.wait(timeout=60)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(timeout=60)
    assert hashes_in(*large) == read_hashes(*large)
