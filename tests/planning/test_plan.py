"""The plan's arithmetic by hand, its data, its advice, and the command around them."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DeepseekV3Config

from deepspec.cli import main
from deepspec.config.loading import load_config
from deepspec.config.validation import validate, value_of
from deepspec.drafters.registry import DRAFTERS, drafter_kind
from deepspec.drafters.rotary import Rotary
from deepspec.errors import ConfigError
from deepspec.features.sources import Online
from deepspec.planning.advice import advise, changed
from deepspec.planning.memory import memory_of, target_weights
from deepspec.planning.plan import make_plan, token_bytes
from deepspec.planning.shapes import Job, MicroBatch, shapes_of
from deepspec.planning.workload import Workload, read_workload
from deepspec.records import Sample
from deepspec.targets import load_target
from deepspec.targets.parallel import check_split
from deepspec.training.engine import open_engine
from deepspec.training.run_folder import RunFolder
from deepspec.training.trainer import Trainer
from tests.conftest import make_tokenizer

UNKNOWN = Workload(None, (), False, "test")
MakeJob = Callable[..., Job]


@pytest.fixture(scope="module")
def make_job() -> MakeJob:
    """`make_job(*overrides, world=1, cuda=False)` of recipe=tiny."""

    def make(*overrides: str, world: int = 1, cuda: bool = False) -> Job:
        config = load_config("tiny", overrides)
        target = load_target(config.target, "meta")
        return Job(config, shapes_of(target, config.drafter), world, cuda)

    return make


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan looks at the run's own answers: those of earlier runs here are none of ours."""
    monkeypatch.chdir(tmp_path)


def run(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    main(["plan", *words])
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as end:
        main(["plan", *words])
    assert end.value.code == 2
    return capsys.readouterr().err


# ------------------------------------------------------------------------------------ arithmetic


def test_meta_target_is_the_loaded_one(make_job: MakeJob) -> None:
    config = load_config("tiny", ["target.dtype=auto"])
    real, blank = load_target(config.target, "cpu"), load_target(config.target, "meta")
    assert all(parameter.is_meta for parameter in blank.model.parameters())
    assert shapes_of(real, config.drafter) == shapes_of(blank, config.drafter)
    assert blank.dtype == torch.bfloat16


def test_a_plan_leaves_real_drafters_as_they_are(make_job: MakeJob) -> None:
    """Frequencies are cached: those of a drafter without weights must be numbers too."""
    shape = make_job("drafter.head_dim=48").shapes.drafter
    rotary = Rotary(shape.head_dim, shape.rope_parameters, shape.max_position_embeddings)
    cosine, _ = rotary(torch.arange(3), torch.float32)
    assert cosine[0].eq(1).all()


def test_a_token_by_hand(make_job: MakeJob) -> None:
    job = make_job()  # 4 layers and the final state of 128 numbers
    assert token_bytes(job, "bfloat16") == 5 * 128 * 2 + 5
    assert token_bytes(job, "float8") == 5 * 128 + 5 * 4 + 5


def test_a_target_that_is_split_or_elsewhere_leaves_its_ends(make_job: MakeJob) -> None:
    """The tiny target's embedding, 4,096 of 128 in fp32, is its head too."""
    ends, whole = 4096 * 128 * 4, target_weights(make_job())
    stored = ("features.source=stored", "features.path=store")
    remote = ("features.source=remote", "features.servers=[http://a:1]", "regenerate.enabled=false")
    for words in (stored, remote):
        assert target_weights(make_job(*words)) == ends
    for parallel in ("tensor", "zero3"):
        job = make_job(f"target.parallel={parallel}", "engine=zero2", world=2)
        assert target_weights(job) == whole // 2 + ends
    job = make_job("target.parallel=device_map", "target.max_memory=1MiB")
    assert target_weights(job) == 2**20 + ends


@pytest.mark.parametrize("kind", ["dspark", "eagle3", "mtp"])
def test_work_is_what_torch_counts(kind: str, tmp_path: Path) -> None:
    """Matrix products of a real step; torch counts no attention here, and no in-place product."""
    words = ("training.batch_size=3", "training.micro_batch_size=1", "drafter.block_size=4")
    words += ("training.anchors_per_sample=16", "objective.implementation=eager")
    words += (f"drafter={kind}", f"drafter.num_layers={2 if kind == 'dspark' else 1}")
    config = load_config("tiny", words)
    target = load_target(config.target, "cpu")
    samples = [Sample(torch.arange(n) % 4000, torch.arange(n) >= 0, f"{n}") for n in (90, 70, 80)]
    made = drafter_kind(kind)
    drafter = made.build(made.resolve(config.drafter, target))
    job = Job(config, shapes_of(target, config.drafter), 1, cuda=False)
    lengths = tuple((len(sample), len(sample)) for sample in samples)
    plan = make_plan(job, Workload(3, lengths, True, "test"))
    with RunFolder(tmp_path / "run") as folder:
        engine = open_engine(config.engine, config.training, config.tracking, folder.path)
        trainer = Trainer(config, target, Online(target), drafter, samples, [], folder, engine)
        with FlopCounterMode(display=False) as counter:
            trainer.train_step()
    assert plan.step_flops == pytest.approx(counter.get_total_flops(), rel=0.05)
    assert plan.hours(1e12) == pytest.approx(plan.step_flops / 3.6e15 * plan.steps)


def test_stages_shard_one_thing_more_each(make_job: MakeJob) -> None:
    batch = MicroBatch((100,), (8,), 5)

    def parts(kind: str, *words: str) -> dict[str, int]:
        job = make_job(f"engine={kind}", "training.batch_size=4", *words, world=4)
        return memory_of(job, batch).parts

    whole = make_job().shapes.trainable * 4
    share = -(-whole // 4)
    names = ("drafter weights", "optimizer", "gradients")
    expected = {
        "zero0": (whole, 2 * whole, whole),
        "zero1": (whole, 3 * share, whole),
        "zero2": (whole, 3 * share, share),
    }
    for kind, sizes in expected.items():
        assert tuple(parts(kind)[name] for name in names) == sizes, kind
    alone = memory_of(make_job("engine=zero2", "engine.offload=cpu", world=4), batch)
    assert "optimizer" not in alone.parts
    assert alone.host > 3 * share


def test_steps_and_checkpoints(make_job: MakeJob) -> None:
    lengths = tuple((100, 50) for _ in range(30))
    job = make_job("training.epochs=2.5", "training.save_every=10", "training.keep_last=2")
    plan = make_plan(job, Workload(30, lengths, True, "test"))
    assert (plan.steps_an_epoch, plan.steps) == (8, 20)
    assert plan.checkpoint == 12 * job.shapes.trainable
    assert plan.checkpoints == 2 * plan.checkpoint  # at steps 10 and 20
    assert make_plan(make_job("training.max_steps=7"), UNKNOWN).steps == 7
    assert make_plan(job, UNKNOWN).steps is None


def test_largest_micro_batch_is_the_longest_samples(make_job: MakeJob) -> None:
    lengths = ((30, 20), (900, 5), (100, 90), (40, 2))
    config = make_job("training.micro_batch_size=2", "training.anchors_per_sample=32").config
    batch = Workload(4, lengths, True, "test").largest(config)
    assert batch == MicroBatch((512, 100), (4, 32), 5)
    # where not all were measured, one of data.max_length may come
    assert Workload(4, lengths, False, "test").largest(config).contexts == (512, 512)


# ------------------------------------------------------------------------------------------ data


def test_lengths_of_data_and_of_prompts(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a" * 10}, {"role": "assistant", "content": "b" * 20}]
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(10)))
    words = [f"data.path={file}", f"out={tmp_path / 'run'}", "training.validation_samples=2"]
    own = load_config("tiny", [*words, "regenerate.enabled=false"])
    found = read_workload(own, make_tokenizer())
    assert (found.samples, found.complete) == (8, True)
    assert {answer for _, answer in found.lengths} == {21}  # and the end of turn
    prompts = read_workload(load_config("tiny", words), make_tokenizer())
    # the bound: every answer of regenerate.max_new_tokens
    assert {answer for _, answer in prompts.lengths} == {160}
    (tmp_path / "run").mkdir()
    shutil.copy(file, tmp_path / "run" / "answers.jsonl")
    assert read_workload(load_config("tiny", words), make_tokenizer()).lengths == found.lengths


def test_data_that_are_not_here_are_as_long_as_may_be() -> None:
    words = ["data.path=someone/chats", "data.limit=1000", "training.validation_samples=64"]
    config = load_config("tiny", words)
    found = read_workload(config, make_tokenizer())
    assert found.samples == 1000 - 64
    assert found.mean_tokens(config) == 512
    assert "512 each, as data.max_length allows" in found.source
    shorter = read_workload(config, make_tokenizer(), 200)
    assert shorter.mean_tokens(config) == 200
    assert shorter.largest(config).contexts == (512,) * 4
    several = [*words, "regenerate.samples_per_prompt=3"]
    assert read_workload(load_config("tiny", several), make_tokenizer()).samples == 3000 - 64
    own = [*several, "regenerate.enabled=false"]
    assert read_workload(load_config("tiny", own), make_tokenizer()).samples == 1000 - 64


# ---------------------------------------------------------------------------------------- advice


def test_advice_is_the_cheapest_that_fits(make_job: MakeJob) -> None:
    job = make_job("training.micro_batch_size=4")

    def advice(share: float, job: Job = job) -> dict[str, object] | None:
        def need(changed: Job) -> int:
            return make_plan(changed, UNKNOWN).need

        return advise(job, need, int(share * need(job)))

    assert advice(0.9) == {"training.micro_batch_size": 1}
    several = advice(0.56)
    assert several is not None
    assert several.keys() >= {"training.micro_batch_size", "objective.chunk_size"}
    assert advice(0.01) is None
    eager = make_job("objective.implementation=eager")
    assert advice(0.9, eager) == {"objective.implementation": "fused"}


ANSWERED = "regenerate.enabled=false"


@pytest.mark.parametrize(
    ("wanted", "value", "words", "expected"),
    [
        ("engine.kind", "zero3", [], {}),
        ("engine.kind", "zero3", ["training.compile=true"], None),  # refused together
        ("target.parallel", "zero3", [ANSWERED, "evaluation.enabled=false"], {}),
        ("target.parallel", "zero3", [ANSWERED], {"evaluation.enabled": False}),
        (
            "target.parallel",
            "zero3",
            [ANSWERED, "features.overlap=true"],
            {"features.overlap": False, "evaluation.enabled": False},
        ),
        ("target.parallel", "zero3", [], None),  # a split target answers no prompts
        ("features.source", "stored", [], {"features.path": "DIR"}),
        (
            "features.source",
            "stored",
            ["features.overlap=true"],
            {"features.path": "DIR", "features.overlap": False},
        ),
    ],
)
def test_advice_is_what_train_accepts(
    wanted: str,
    value: str,
    words: list[str],
    expected: dict[str, object] | None,
    make_job: MakeJob,
) -> None:
    """With what has to go with it, as if nothing but that one setting helped."""

    def need(job: Job) -> int:
        return int(value_of(job.config, wanted) != value)

    job = make_job("engine=zero0", *words, world=2)
    advice = advise(job, need, 0)
    assert advice == (None if expected is None else {wanted: value, **expected})
    if advice is not None:
        accepted = changed(job, advice).config
        validate(accepted)
        check_split(accepted)


def test_warns_of_memory_and_disk(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert "does not fit" not in run(capsys, "recipe=tiny", "memory=1GB", "data.limit=50")
    shown = run(capsys, "recipe=tiny", "memory=60MB", "data.limit=50")
    found = re.search(r"does not fit: .* on a device of 60.0 MB; (\S+) would", shown)
    assert found is not None, shown
    assert "does not fit" not in run(
        capsys, "recipe=tiny", "memory=60MB", "data.limit=50", found[1]
    )
    monkeypatch.setattr("deepspec.atomic.free_bytes", lambda place: 1000)
    assert "training.keep_last=1" in run(capsys, "recipe=tiny", "data.limit=50")


# --------------------------------------------------------------------------------------- command


def test_a_target_of_671_billion(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    DeepseekV3Config(vocab_size=129280).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    before = time.process_time()
    shown = run(
        capsys,
        *("recipe=qwen3", f"target.path={tmp_path}", "target.layer_ids=[1,20,40]", "gpus=8"),
        *("memory=80GB", "engine=zero2", "data.limit=100000", "drafter.mask_token_id=5"),
    )
    assert time.process_time() - before < 60
    assert re.search(r"target +671,026,\d{3},\d{3}", shown), shown
    assert re.search(r"target weights +1\.3 TB", shown)
    assert "does not fit" in shown
    assert (
        "features.source=stored features.path=DIR would" in shown
    )  # 80 GB hold no eighth of it either


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("recipe=tiny gpus=0", "error: gpus=0 must be a whole number of at least 1"),
        ("recipe=tiny gpus=x", "error: gpus=x must be a whole number of at least 1"),
        ("recipe=tiny gpus=2", "error: gpus=2, but engine=single is one process; set engine=zero0"),
        ("recipe=tiny tokens=0", "error: tokens=0 must be a whole number of at least 1"),
        ("recipe=tiny memory=abc", "error: memory=abc must be a size with its unit"),
        ("recipe=tiny memory=80", "error: memory=80 must be a size with its unit"),
        ("recipe=tiny tflops=fast", "error: tflops=fast must be a number above 0"),
        ("recipe=tiny memory=0GB", "error: memory=0GB must be a size with its unit"),
        ("gpus=2", "error: recipe= is missing"),
        ("recipe=tiny target.path=./nowhere", "error: target.path=./nowhere: no config.json"),
        ("recipe=tiny data.path=./nowhere.jsonl", "error: data.path=./nowhere.jsonl does not"),
    ],
)
def test_mistakes(words: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert expected in refused(capsys, *words.split())


def test_a_kind_without_formulas_is_refused(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its module is: not planned as another kind."""
    config = make_job().config
    monkeypatch.setitem(DRAFTERS, "another", DRAFTERS["mtp"])
    config.drafter.kind = "another"
    with pytest.raises(ConfigError, match=r"drafter\.kind=another has no formulas"):
        shapes_of(load_target(config.target, "meta"), config.drafter)


def test_an_unknown_family_is_a_target_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nonesuch"}))
    make_tokenizer().save_pretrained(tmp_path)
    error = refused(capsys, "recipe=tiny", f"target.path={tmp_path}")
    assert "could not be loaded" in error
