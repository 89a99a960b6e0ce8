"""A store gives back what the target computed, and never what is not whole."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from deepspec.atomic import sha256
from deepspec.config.schema import ExtractConfig, TargetConfig
from deepspec.errors import DataError, TargetError
from deepspec.features.encoding import decode, encode, token_bytes
from deepspec.features.extract import check_room, extract, header_of, missing_shards
from deepspec.features.sources import Ahead, FeatureSource, Hybrid, Online, Overlapped
from deepspec.features.store import Store
from deepspec.records import Sample, TargetFeatures
from deepspec.targets import Target, load_ends, load_target
from deepspec.training.trainer import Trainer
from tests.trainers import MakeTrainer, build_trainer, make_samples

SMALL = ExtractConfig(shard_mib=0.05, batch_tokens=64)
OTHERS = [replace(sample, conversation_id="others") for sample in make_samples(4, seed=1)]
SAMPLES = [*make_samples(13), *OTHERS]


def build(
    target: Target, path: Path, config: ExtractConfig = SMALL, all_finals: bool = True
) -> Store:
    header = header_of(target, SAMPLES, config.dtype, all_finals)
    store = Store.create(path, header)
    extract(target, missing_shards(SAMPLES, store, config), store, config)
    return store


# ------------------------------------------------------------------------------------ encoding


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 4), st.integers(0, 2**31), st.sampled_from([1e-6, 1, 1e5]))
def test_float8_keeps_every_value_to_its_precision(
    tokens: int, layers: int, seed: int, size: float
) -> None:
    """3 bits behind the point: 1/16 of a value, down to the smallest that the scale leaves."""
    generator = torch.Generator().manual_seed(seed)
    context = size * torch.randn(tokens, layers * 8, generator=generator)
    context[0, 0] *= 1000  # one huge channel, as hidden states have
    features = TargetFeatures(context, torch.zeros(tokens, 8))
    encoded = encode(features, "float8", layers)
    back = decode(encoded)
    assert back.final.eq(0).all()
    parts = context.unflatten(-1, (layers, -1))
    floor = parts.abs().amax(-1, keepdim=True) / 448 * 2**-9
    error = (back.context.float().unflatten(-1, (layers, -1)) - parts).abs()
    assert (error <= parts.abs() * (2**-4 + 2**-8) + floor).all()
    stored = sum(tensor.nbytes for tensor in encoded.values())
    assert stored == tokens * token_bytes("float8", layers, 8)


def test_bfloat16_is_what_the_target_computed() -> None:
    features = TargetFeatures(torch.randn(5, 16).bfloat16(), torch.randn(5, 8).bfloat16())
    encoded = encode(features, "bfloat16", 2)
    assert torch.equal(decode(encoded).context, features.context)
    assert sum(tensor.nbytes for tensor in encoded.values()) == 5 * token_bytes("bfloat16", 2, 8)
    # the public implementation's 30.7 KB a token of Qwen3-4B, and half of it
    assert token_bytes("bfloat16", 5, 2560) == 30_720
    assert token_bytes("float8", 5, 2560) == 15_384


# ------------------------------------------------------------------------------------ the store


def test_it_gives_back_samples_and_features(target: Target, tmp_path: Path) -> None:
    build(target, tmp_path)
    store = Store.open(tmp_path)
    assert len(store.finished()) > 2
    back = {sample.sample_id: sample for sample in store.samples()}
    assert len(store) == len(SAMPLES) == len(back)
    for sample in SAMPLES:
        assert torch.equal(back[sample.sample_id].input_ids, sample.input_ids)
        assert torch.equal(back[sample.sample_id].loss_mask, sample.loss_mask)
        assert back[sample.sample_id].conversation_id == sample.conversation_id
    chosen = [SAMPLES[i] for i in (3, 16, 0, 7)]
    read, expected = store.read(chosen), target.features(chosen)
    torch.testing.assert_close(read.context, expected.context, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(read.final, expected.final, rtol=1e-5, atol=1e-5)
    tokens = sum(len(sample) for sample in SAMPLES)
    size = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert size == pytest.approx(tokens * store.header.bytes_a_token, rel=0.05)


def test_final_states_are_kept_where_a_supervised_token_follows(
    target: Target, tmp_path: Path
) -> None:
    """As many rows as supervised tokens have one before them, each that of the token before."""
    build(target, tmp_path, all_finals=False)
    store = Store.open(tmp_path)
    files = [load_file(file) for file in tmp_path.glob("*.safetensors")]
    supervised = sum(int(sample.loss_mask[1:].sum()) for sample in SAMPLES)
    assert sum(len(tensors["final"]) for tensors in files) == supervised
    size = sum(tensor.nbytes for tensors in files for tensor in tensors.values())
    assert size == store.header.bytes_of(SAMPLES)
    chosen = [SAMPLES[i] for i in (3, 16, 0, 7)]
    read, whole = store.read(chosen), target.features(chosen)
    finals = whole.final.split([len(sample) for sample in chosen])
    expected = [own[:-1][s.loss_mask[1:]] for s, own in zip(chosen, finals, strict=True)]
    torch.testing.assert_close(read.final, torch.cat(expected), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(read.context, whole.context, rtol=1e-5, atol=1e-5)


def make_older(path: Path, *lacking: str) -> None:
    """Turn the store at `path` into one of format 1, without checksums and what is `lacking`."""
    for file in path.glob("*.json"):
        content = json.loads(file.read_text())
        if "format" in content:
            content["format"] = 1
        for part in (content, *(content["samples"] if file.stem != "store" else ())):
            for key in ("conversations", "checksum", *lacking):
                part.pop(key, None)
        file.write_text(json.dumps(content))


def test_a_store_that_does_not_say_has_all_final_states_and_keeps_to_it(
    target: Target, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As stores were before it was chosen; a shard that is made again has them too."""
    names = build(target, tmp_path).finished()
    make_older(tmp_path, "all_finals", "finals")
    (tmp_path / f"{names[1]}.json").unlink()
    capsys.readouterr()
    store = build(target, tmp_path, all_finals=False)
    assert f"{tmp_path} was made by an earlier version: no checksum" in capsys.readouterr().err
    store.require_complete()
    assert store.finished() == names
    read, expected = store.read(SAMPLES), target.features(SAMPLES)
    torch.testing.assert_close(read.final, expected.final, rtol=1e-5, atol=1e-5)

    build(target, tmp_path / "fewer", all_finals=False)
    with pytest.raises(DataError, match="its all_finals differ"):
        build(target, tmp_path / "fewer")


def test_it_goes_on_without_redoing(target: Target, tmp_path: Path) -> None:
    names = build(target, tmp_path).finished()
    before = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*.safetensors")}
    (tmp_path / f"{names[1]}.json").unlink()  # as if killed before the shard was finished
    (tmp_path / f".{names[1]}.safetensors.partial").write_bytes(b"half")
    assert build(target, tmp_path).finished() == names
    after = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*.safetensors")}
    assert [file.stem for file in before if before[file] != after[file]] == [names[1]]
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("mib", [0.02, 0.2])
def test_it_goes_on_with_shards_of_another_size(target: Target, tmp_path: Path, mib: float) -> None:
    """Finished ones are kept as they are, and every sample is there in the end."""
    store = build(target, tmp_path)
    for name in store.finished()[1::2]:
        (tmp_path / f"{name}.json").unlink()
    before = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*.json")}
    build(target, tmp_path, replace(SMALL, shard_mib=mib))
    assert all(file.stat().st_mtime_ns == moment for file, moment in before.items())
    found = Store.open(tmp_path)
    found.require_complete()
    read, expected = found.read(SAMPLES), target.features(SAMPLES)
    torch.testing.assert_close(read.context, expected.context, rtol=1e-5, atol=1e-5)
    assert not missing_shards(SAMPLES, found, SMALL)


def test_a_shard_that_is_made_again_is_read_anew(target: Target, tmp_path: Path) -> None:
    """Under the name of one that was open when it was thrown away."""
    store = build(target, tmp_path)
    name = store.finished()[0]
    store.read(SAMPLES)
    (first, *_), (last, *_) = SAMPLES, SAMPLES[::-1]
    store.discard(name)
    store.write(name, [last, first], encode(target.features([last, first]), "float32", 3))
    expected = target.features([first])
    torch.testing.assert_close(store.read([first]).final, expected.final, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_bad_shard_is_never_read(target: Target, tmp_path: Path, damage: str) -> None:
    store = build(target, tmp_path)
    file = tmp_path / f"{store.finished()[1]}.safetensors"
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(content if damage == "flip" else content[:-20])
    with pytest.raises(DataError, match=rf"{file.name} is (corrupt|missing).*make it again"):
        Store.open(tmp_path).read(SAMPLES)


@pytest.mark.parametrize("tensor", ["input_ids", "final"])
def test_tokens_are_read_and_checked_without_the_features(
    target: Target, tmp_path: Path, tensor: str
) -> None:
    """What a training reads first of a large store is a small part of it."""
    store = build(target, tmp_path)
    file = tmp_path / f"{store.finished()[0]}.safetensors"
    content = bytearray(file.read_bytes())
    content[content.index(load_file(file)[tensor].numpy().tobytes())] ^= 1
    file.write_bytes(content)
    found = Store.open(tmp_path)
    if tensor == "input_ids":
        with pytest.raises(DataError, match=f"{file.name} is corrupt"):
            list(found.samples())
    else:
        assert len(list(found.samples())) == len(SAMPLES)
        with pytest.raises(DataError, match=f"{file.name} is corrupt"):
            found.read(SAMPLES)


def test_other_data_another_target_and_other_layers_are_refused(
    target: Target, target_folder: Path, tmp_path: Path
) -> None:
    store = build(target, tmp_path)
    changed = replace(SAMPLES[0], input_ids=SAMPLES[0].input_ids + 1)
    with pytest.raises(DataError, match=f"other tokens under the id {changed.sample_id}"):
        store.holds(changed)
    with pytest.raises(DataError, match="its data differ"):
        Store.create(tmp_path, header_of(target, [changed, *SAMPLES[1:]], "auto"))
    with pytest.raises(DataError, match="its dtype differ"):
        Store.create(tmp_path, header_of(target, SAMPLES, "float8"))
    with pytest.raises(DataError, match="more than once, such as sample-000"):
        header_of(target, [SAMPLES[0], *SAMPLES], "auto")
    ends = load_ends(TargetConfig(path=str(target_folder), num_layer_ids=3), "cpu")
    ends.adopt(store.header.identity, "the store")
    assert ends.identity == target.identity
    other = {**store.header.identity, "embedding_and_head": "x"}
    ends = load_ends(TargetConfig(path=str(target_folder), num_layer_ids=3), "cpu")
    with pytest.raises(
        TargetError, match=r"the store is of another target.*embedding_and_head differ"
    ):
        ends.adopt(other, "the store")


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "damaged"), ("[]", "damaged"), ('{"format": 3}', "format 3"), ('{"format": 2}', "dama")],
)
def test_a_damaged_header_is_named(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(DataError, match="deepspec extract"):
        Store.open(tmp_path)
    (tmp_path / "store.json").write_text(content)
    with pytest.raises(DataError, match=message):
        Store.open(tmp_path)


def test_other_files_beside_the_shards_are_none(target: Target, tmp_path: Path) -> None:
    """Such as what a killed job of several processes leaves of the answers made there."""
    store = build(target, tmp_path)
    (tmp_path / "answers.part-0001.json").write_text('{"format": 1}')
    (tmp_path / "qwen-3.json").write_text("{")
    assert Store.open(tmp_path).finished() == store.finished()


def test_room_is_asked_for_before_the_work(target: Target, tmp_path: Path) -> None:
    header = header_of(target, SAMPLES, "auto")
    with pytest.raises(DataError, match=r"GiB are missing.*extract\.dtype=float8"):
        check_room(tmp_path, header, 10**18, SMALL)
    strict = replace(SMALL, limit_gib=1e-6)
    with pytest.raises(DataError, match=r"say extract\.yes=true"):
        check_room(tmp_path, header, 10**6, strict)
    check_room(tmp_path, header, 10**6, replace(strict, yes=True))


# ----------------------------------------------------------------------------------- training


def losses(make_trainer: MakeTrainer, name: str, source: FeatureSource | None = None) -> list:
    trainer = make_trainer(name, source=source)
    return [trainer.train_step()["loss"] for _ in range(9)]  # more than two epochs


def test_training_on_it_is_training_online(
    target: Target, target_folder: Path, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    online = losses(make_trainer, "online")
    store = build(target, tmp_path / "fp32")
    source = Ahead(store.read, 2)
    assert losses(make_trainer, "stored", source) == pytest.approx(online, rel=1e-5)
    source.close()

    half = build(target, tmp_path / "bf16", replace(SMALL, dtype="bfloat16"))
    rounded = losses(make_trainer, "rounded", Ahead(half.read, 2))
    assert rounded == pytest.approx(online, rel=0.01)
    eighth = build(target, tmp_path / "fp8", replace(SMALL, dtype="float8"))
    assert losses(make_trainer, "eighth", Ahead(eighth.read, 2)) == pytest.approx(online, rel=0.05)

    config = TargetConfig(path=str(target_folder), dtype="bfloat16", num_layer_ids=3)
    narrow = load_target(config, "cpu")
    auto = build(narrow, tmp_path / "auto")
    assert auto.header.dtype == "bfloat16"
    one = SAMPLES[:1]  # in a batch, bf16 rounds with its padding
    batch_of_one = build(narrow, tmp_path / "one", replace(SMALL, batch_tokens=1))
    assert torch.equal(batch_of_one.read(one).context, narrow.features(one).context)


Sources = Callable[[bool], FeatureSource]


def sources(target: Target, folder: Path) -> dict[str, Sources]:
    """Each by whether final states of all tokens are kept."""

    def stored(dtype: str) -> Sources:
        config = replace(SMALL, dtype=dtype)
        return lambda every: Ahead(
            build(target, folder / f"{dtype}-{every}", config, every).read, 1
        )

    def hybrid(every: bool) -> Hybrid:
        header = header_of(target, SAMPLES, "auto", every)
        store = Store.create(folder / f"hybrid-{every}", header)
        return Hybrid(target, store, "hybrid-0", 20_000)

    return {
        "online": lambda every: Online(target, every),
        "overlapped": lambda every: Overlapped(target, every),
        "bfloat16": stored("bfloat16"),
        "float8": stored("float8"),
        "hybrid": hybrid,
    }


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("objective.implementation=eager",),
        ("drafter.kind=dflash", "drafter.markov_rank=0"),
        ("drafter.kind=eagle3",),
    ],
)
def test_final_states_that_are_not_read_change_no_bit(
    target: Target, make_trainer: MakeTrainer, tmp_path: Path, words: tuple[str, ...]
) -> None:
    for name, source in sources(target, tmp_path).items():
        found, expected = (
            trained(make_trainer(f"{name}-{every}", *words, source=source(every)))
            for every in (False, True)
        )
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True)), name


def trained(trainer: Trainer) -> list[torch.Tensor]:
    """Losses and, behind them, weights."""
    losses = []
    for _ in range(5):  # more than an epoch
        losses.append(trainer.train_step()["loss"])
        if trainer.step % trainer.steps_an_epoch == 0:
            trainer.source.settle(lambda: None)
    trainer.source.close()
    return [torch.tensor(losses), *trainer.engine.weights().values()]


def test_a_target_that_computes_ahead_gives_the_same_numbers(
    target: Target, make_trainer: MakeTrainer
) -> None:
    source = Overlapped(target)
    assert losses(make_trainer, "ahead", source) == losses(make_trainer, "between")
    source.close()


def test_what_is_read_ahead_is_not_taken_for_a_namesake(target: Target) -> None:
    """Ids of training and validation samples are the data's, and as long they may be."""
    sample = SAMPLES[0]
    namesake = replace(sample, input_ids=sample.input_ids.flip(0))
    source = Overlapped(target)
    source.expect([sample])
    for one in (namesake, sample):
        assert torch.equal(source.features([one]).context, target.features([one]).context)
    source.close()


def test_a_target_is_left_alone_before_others_have_it(target: Target) -> None:
    """Its hooks are shared: they would get layers of both forwards."""
    began, ended = threading.Event(), threading.Event()

    def slowly(*_: object) -> None:
        began.set()
        time.sleep(0.3)
        ended.set()

    hook = target.backbone.layers[0].register_forward_hook(slowly)
    source = Overlapped(target)
    source.expect(SAMPLES)
    began.wait()
    source.close()
    hook.remove()
    assert ended.is_set()


def test_of_the_target_only_embedding_and_head_are_needed(
    target: Target, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    """Training on a store goes on where no decoder layer is left on the disk."""
    store, folder = build(target, tmp_path / "store"), tmp_path / "target"
    target.model.save_pretrained(folder, max_shard_size="40KB")
    target.tokenizer.save_pretrained(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    kept = index.pop("model.embed_tokens.weight")  # the head is tied to it
    gone = set(index.values()) - {kept}
    assert len(gone) > 2
    for name in gone:
        (folder / name).unlink()

    ends = load_ends(TargetConfig(path=str(folder), dtype="float32", num_layer_ids=3), "cpu")
    ends.adopt(store.header.identity, "the store")
    trainer = build_trainer(ends, tmp_path / "run", source=Ahead(store.read, 2))
    found = [trainer.train_step()["loss"] for _ in range(9)]
    trainer.folder.__exit__(None, None, None)
    assert found == pytest.approx(losses(make_trainer, "online"), rel=1e-5)


class Watched(Online):
    """Notes what is expected and asked for; `seconds` is what an answer takes at least."""

    def __init__(self, target: Target, seconds: float) -> None:
        super().__init__(target)
        self.seconds = seconds
        self.expected: list[list[str]] = []
        self.asked: list[list[str]] = []
        self.ahead: list[int] = []

    def expect(self, samples: Sequence[Sample]) -> None:
        self.expected.append([sample.sample_id for sample in samples])

    def features(self, samples: Sequence[Sample]) -> TargetFeatures:
        self.asked.append([sample.sample_id for sample in samples])
        self.ahead.append(len(self.expected) - len(self.asked))
        time.sleep(self.seconds)
        return super().features(samples)


def test_a_source_hears_of_prefetch_micro_batches_and_the_wait_for_it_is_measured(
    target: Target, make_trainer: MakeTrainer
) -> None:
    """However many micro-batches make a step, and over the ends of steps and epochs."""
    source = Watched(target, 0.03)
    settings = ("training.micro_batch_size=1", "training.epochs=2", "features.prefetch=2")
    trainer = make_trainer("watched", *settings, source=source)
    waits = [trainer.train_step()["feature_wait"] for _ in range(trainer.total_steps)]
    assert source.asked == source.expected
    assert source.ahead == [2] * 24 + [1, 0]  # 13 samples, twice
    assert all(0.1 < wait < 1 for wait in waits)


def test_hybrid_asks_the_target_once_a_sample(
    target: Target, make_trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    online = losses(make_trainer, "online")
    asked, compute = [0], target.features

    def counted(samples: Sequence[Sample], all_finals: bool) -> TargetFeatures:
        asked[0] += len(samples)
        return compute(samples, all_finals)

    monkeypatch.setattr(target, "features", counted)
    header = header_of(target, SAMPLES, "auto")

    def source() -> Hybrid:
        return Hybrid(target, Store.create(tmp_path / "s", header), "hybrid-0", 20_000)

    trainer = make_trainer("hybrid", source=source())
    found = []
    for _ in range(9):
        found.append(trainer.train_step()["loss"])
        if trainer.step % trainer.steps_an_epoch == 0:
            trainer.source.settle(lambda: None)
    assert found == pytest.approx(online, rel=1e-5)
    assert asked[0] == 13
    trainer.validate()
    trainer.source.settle(lambda: None)
    assert asked[0] == 17
    assert len(Store.open(tmp_path / "s")) == header.samples

    written = {file: file.read_text() for file in (tmp_path / "s").glob("hybrid-*.json")}
    index = next(file for file, text in written.items() if SAMPLES[0].sample_id in text)
    bad = index.with_suffix(".safetensors")  # of samples that are trained on
    bad.write_bytes(bad.read_bytes()[:-8])
    held = len(json.loads(written[index])["samples"])
    again = make_trainer("again", source=source())
    assert [again.train_step()["loss"] for _ in range(4)] == pytest.approx(online[:4], rel=1e-5)
    assert 17 < asked[0] <= 17 + 4 * held


def test_hybrid_reads_again_the_bad_shard_alone(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many others there are; two bad ones are found one after the other."""
    names = build(target, tmp_path, replace(SMALL, shard_mib=0.02)).finished()
    assert len(names) > 4
    source = Hybrid(target, Store.open(tmp_path), "hybrid-0", 2**30)
    held = {name: json.loads((tmp_path / f"{name}.json").read_text())["samples"] for name in names}
    by_id = {sample.sample_id: sample for sample in SAMPLES}
    bad, worse, *others = names
    for name in others:  # they are checked once
        source.features([by_id[row["id"]] for row in held[name]])
    for name in (bad, worse):
        file = tmp_path / f"{name}.safetensors"
        content = bytearray(file.read_bytes())
        content[-5] ^= 1
        file.write_bytes(content)
    hashed: list[str] = []

    def counted(file: Path) -> str:
        hashed.append(file.stem)
        return sha256(file)

    monkeypatch.setattr("deepspec.features.store.sha256", counted)
    assert_right(target, source, SAMPLES)
    assert sorted(hashed) == sorted([bad, worse])
    source.settle(lambda: None)
    assert not (tmp_path / f"{bad}.json").exists()
    assert len(Store.open(tmp_path)) == len(SAMPLES)


def shared(target: Target, path: Path, count: int) -> list[Hybrid]:
    """`count` processes on one store, which write when they settle."""
    header = header_of(target, SAMPLES, "auto")
    return [
        Hybrid(target, Store.create(path, header), f"hybrid-{rank}", 2**30) for rank in range(count)
    ]


def assert_right(target: Target, source: Hybrid, samples: Sequence[Sample]) -> None:
    for sample in samples:
        found, expected = source.features([sample]), target.features([sample])
        torch.testing.assert_close(found.context, expected.context, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.final, expected.final, rtol=1e-5, atol=1e-5)


def test_two_jobs_share_a_hybrid_store(target: Target, tmp_path: Path) -> None:
    """Both of one process, and in orders of their own."""
    jobs = [*shared(target, tmp_path, 1), *shared(target, tmp_path, 1)]
    for job, samples in zip(jobs, (SAMPLES[:9], SAMPLES[::-1]), strict=True):
        for sample in samples:
            job.features([sample])
    for job in jobs * 2:  # the first knows of the other's then
        job.settle(lambda: None)
    files = set(tmp_path.iterdir())
    assert len(files) == 1 + 2 * 2  # the header, and a shard of each
    for job in jobs:
        assert_right(target, job, SAMPLES)
        job.settle(lambda: None)
    assert set(tmp_path.iterdir()) == files


@pytest.mark.parametrize("replaced", [False, True])
def test_a_shard_that_another_process_discarded_is_never_read(
    target: Target, tmp_path: Path, replaced: bool
) -> None:
    """Whether or not that has stored its samples again, in another order."""
    first, second = processes = shared(target, tmp_path, 2)
    for sample in SAMPLES[:5]:
        first.features([sample])
    for process in processes:
        process.settle(lambda: None)
    (file,) = tmp_path.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    for sample in SAMPLES[4::-1]:
        first.features([sample])
    if replaced:
        first.settle(lambda: None)
    assert_right(target, second, SAMPLES[:5])


def test_a_shard_is_not_taken_for_another_of_its_name(target: Target, tmp_path: Path) -> None:
    """Places in it are of what lay there when they were read."""
    store = build(target, tmp_path)
    name = store.finished()[0]
    reader = Store.open(tmp_path)
    store.discard(name)
    store.write(name, SAMPLES[:2], encode(target.features(SAMPLES[:2]), "float32", 3))
    with pytest.raises(DataError, match=f"{name}.safetensors is corrupt"):
        reader.read(SAMPLES)
