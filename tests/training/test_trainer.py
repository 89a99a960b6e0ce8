"""Known to be right by identities: cutting a step differently changes nothing, stopping and going
on changes not one bit, every sample is seen once an epoch, and the loss falls on learnable text."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from deepspec.commands.stages import TrainingData, train_drafter
from deepspec.errors import (
    CheckpointError,
    ConfigError,
    Interrupted,
    MissingDependencyError,
    TrainingError,
)
from deepspec.targets import Target
from deepspec.training.checkpoint import (
    DESCRIPTION,
    OPTIMIZER,
    WEIGHTS,
    Checkpoint,
    best_checkpoint,
    list_checkpoints,
    prune,
    read_checkpoint,
)
from deepspec.training.metrics import expected_accept_length, read_metrics
from deepspec.training.resume import set_aside, starting_point
from deepspec.training.trainer import Trainer, learning_rate
from tests.trainers import MakeTrainer


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.engine.weights().items()}


def test_loss_falls_and_drafts_are_accepted(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer("run", "training.epochs=25", "training.learning_rate=0.02")
    before = trainer.validate()["validation_accept_length"]
    trainer.train()
    losses = [row["loss"] for row in read_metrics(trainer.folder.metrics) if "loss" in row]
    assert len(losses) == trainer.total_steps == 25 * 4
    assert sum(losses[-8:]) < 0.8 * sum(losses[:8])
    assert trainer.validate()["validation_accept_length"] > before


@pytest.mark.parametrize("implementation", ["eager", "fused"])
def test_micro_batches_do_not_change_the_step(
    make_trainer: MakeTrainer, implementation: str
) -> None:
    """Every term is divided by the weight of the whole step, so how it is cut cannot matter."""
    runs = []
    for size in (4, 3, 1):
        trainer = make_trainer(
            f"cut-{size}",
            f"training.micro_batch_size={size}",
            f"objective.implementation={implementation}",
        )
        losses = [trainer.train_step()["loss"] for _ in range(5)]
        runs.append((losses, weights(trainer)))
    for losses, tensors in runs[1:]:
        assert losses == pytest.approx(runs[0][0], rel=1e-5)
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor, runs[0][1][name], rtol=1e-3, atol=1e-5)


def test_resumed_is_bitwise_the_uninterrupted_run(make_trainer: MakeTrainer) -> None:
    whole = make_trainer("whole")
    whole.train()
    broken = make_trainer("broken")
    for _ in range(5):
        broken.train_step()
    saved = broken.save()
    resumed = make_trainer("resumed")
    resumed.resume(read_checkpoint(saved))
    resumed.train()
    assert resumed.step == whole.step == 12
    expected = weights(whole)
    for name, tensor in weights(resumed).items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("moment", ["train_step", "validate", "save"])
def test_a_signal_in_the_last_step_ends_the_run_too(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """It is saved, but what follows a training is not begun."""
    trainer = make_trainer("run", "training.max_steps=3")
    whole = getattr(trainer, moment)

    def signalled() -> Any:
        if trainer.step >= 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return whole()

    monkeypatch.setattr(trainer, moment, signalled)
    with pytest.raises(Interrupted) as caught:
        trainer.train()
    assert caught.value.exit_code == 128 + signal.SIGTERM
    assert read_checkpoint(Path(caught.value.saved)).step == 3


def test_every_sample_once_an_epoch(make_trainer: MakeTrainer) -> None:
    """13 samples in batches of 4: the last step is short, none is dropped or doubled."""
    trainer = make_trainer("run")
    orders = []
    for epoch in range(3):
        steps = range(epoch * trainer.steps_an_epoch, (epoch + 1) * trainer.steps_an_epoch)
        ids = [
            s.sample_id for step in steps for micro in trainer.micro_batches(step) for s in micro
        ]
        assert Counter(ids) == Counter(sample.sample_id for sample in trainer.samples)
        orders.append(ids)
    assert orders[0] != orders[1] != orders[2]


def test_checkpoints_kept_are_the_newest_and_the_best(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer("run", "training.save_every=1", "training.keep_last=2")
    trainer.train()
    kept = [read_checkpoint(folder) for folder in list_checkpoints(trainer.folder.checkpoints)]
    assert [checkpoint.step for checkpoint in kept][-2:] == [11, 12]
    assert len(kept) <= 3
    rows = read_metrics(trainer.folder.metrics)
    best = max(row["validation_accept_length"] for row in rows if "validation_ce" in row)
    assert max(checkpoint.acceptance for checkpoint in kept) == best


def test_a_checkpoint_has_the_validation_of_its_own_step(make_trainer: MakeTrainer) -> None:
    """Validated at 4, 8, 12 and saved at every second step: what lies between is never the best."""
    trainer = make_trainer("run", "training.save_every=2", "training.keep_last=9")
    trainer.train()
    rows = {
        row["step"]: row
        for row in read_metrics(trainer.folder.metrics)
        if "validation_accept_length" in row
    }
    kept = [read_checkpoint(folder) for folder in list_checkpoints(trainer.folder.checkpoints)]
    assert [checkpoint.step for checkpoint in kept] == [2, 4, 6, 8, 10, 12]
    for checkpoint in kept:
        row = rows.get(checkpoint.step, {})
        assert checkpoint.acceptance == row.get("validation_accept_length", float("-inf"))
    assert best_checkpoint(trainer.folder.checkpoints).step in rows


def test_removal_that_is_cut_leaves_whole_checkpoints(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a kill after the first file: it is no checkpoint any more, and goes the next time."""
    trainer = make_trainer("run", "training.save_every=1", "training.keep_last=9")
    trainer.train()
    folder = trainer.folder.checkpoints

    def cut(place: Path) -> None:
        (place / DESCRIPTION).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", cut)
        with pytest.raises(KeyboardInterrupt):
            prune(folder, 2)
    assert all(read_checkpoint(entry) for entry in list_checkpoints(folder))
    assert list(folder.glob(".step-*"))
    prune(folder, 2)
    assert len(list_checkpoints(folder)) in (2, 3)
    assert not list(folder.glob(".*"))


def test_an_old_checkpoint_that_is_unreadable_stops_nothing(
    make_trainer: MakeTrainer, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make_trainer("run", "training.max_steps=2", "training.save_every=1")
    trainer.train()
    checkpoints = trainer.folder.checkpoints
    damaged = list_checkpoints(checkpoints)[0] / DESCRIPTION
    damaged.write_text("{")
    assert best_checkpoint(checkpoints).step == 2
    assert f"passed over: {damaged} is damaged or unreadable" in capsys.readouterr().err
    prune(checkpoints, 1)
    assert [place.name for place in list_checkpoints(checkpoints)] == ["step-00000002"]


def test_nan_loss_names_step_samples_and_ways_out(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer("run", "training.learning_rate=1e30", "training.max_grad_norm=1e30")
    with pytest.raises(TrainingError, match=r"at step \d+.*sample-0.*learning_rate") as caught:
        trainer.train()
    assert "checkpoint" in str(caught.value)


def test_nan_gradient_under_a_finite_loss_reaches_no_weight(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer("run")
    before = weights(trainer)
    next(trainer.distillation.parameters()).register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(TrainingError, match=r"gradient norm is nan at step 1.*sample-0"):
        trainer.train_step()
    for name, tensor in weights(trainer).items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("file", [WEIGHTS, OPTIMIZER, DESCRIPTION])
def test_auto_resume_passes_over_a_damaged_checkpoint(
    make_trainer: MakeTrainer, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make_trainer("run", "training.max_steps=6")
    trainer.train()
    checkpoints = trainer.folder.checkpoints
    older, newest = list_checkpoints(checkpoints)
    damaged = newest / file
    damaged.write_bytes(damaged.read_bytes()[:-20])
    start = starting_point(trainer.config, checkpoints)
    assert start is not None
    assert start.folder == older
    assert str(damaged) in capsys.readouterr().err
    set_aside(checkpoints, start)
    assert list_checkpoints(checkpoints) == [older]
    assert (checkpoints / "aside-1" / newest.name).is_dir()
    (older / file).unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is sound"):
        starting_point(trainer.config, checkpoints)


def test_auto_resume_refuses_other_settings(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer("run")
    trainer.train()
    checkpoints = trainer.folder.checkpoints
    found = starting_point(trainer.config, checkpoints)
    assert found is not None
    assert found.step == 12
    trainer.config.training.learning_rate = 1.0
    with pytest.raises(ConfigError, match=r"training\.learning_rate=1\.0.*trained with 0\.003"):
        starting_point(trainer.config, checkpoints)
    trainer.config.training.resume = str(list_checkpoints(checkpoints)[-1])
    assert starting_point(trainer.config, checkpoints) is not None
    trainer.config.training.resume = "never"
    assert starting_point(trainer.config, checkpoints) is None


@pytest.fixture
def train_on(make_trainer: MakeTrainer) -> Callable[..., Checkpoint]:
    """`train_on(name, *overrides)`: as `deepspec train` trains in the run folder `name`."""

    def train(name: str, *overrides: str) -> Checkpoint:
        trainer = make_trainer(
            name, "training.evaluate_every=2", "training.save_every=2", *overrides
        )
        data = TrainingData(list(trainer.samples), list(trainer.validation), {})
        parts = (trainer.target, trainer.source, data, trainer.folder, trainer.engine)
        try:
            start = starting_point(trainer.config, trainer.folder.checkpoints)
            return train_drafter(trainer.config, *parts, start)
        finally:
            trainer.folder.__exit__(None, None, None)

    return train


def names(folder: Path) -> list[str]:
    return [place.name for place in list_checkpoints(folder)]


def test_a_path_begins_there_and_the_same_command_goes_on(
    train_on: Callable[..., Checkpoint], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Newer checkpoints of other settings are nobody's newest or best, and none is lost."""
    checkpoints = tmp_path / "run" / "checkpoints"
    train_on("run", "training.max_steps=8", "training.keep_last=4")
    assert names(checkpoints) == [f"step-0000000{step}" for step in (2, 4, 6, 8)]

    place = checkpoints / "step-00000004"
    file = place / DESCRIPTION
    description = json.loads(file.read_text())
    description["metrics"]["validation_accept_length"] = 9.0
    file.write_text(json.dumps(description))
    back = (f"training.resume={place}", "training.learning_rate=1e-3", "training.keep_last=1")
    best = train_on("run", *back, "training.max_steps=6")
    assert f"going on from {place}" in capsys.readouterr().err
    assert names(checkpoints / "aside-1") == ["step-00000006", "step-00000008"]
    assert names(checkpoints) == ["step-00000004", "step-00000006"]
    assert best.step == 6  # not 4, whatever it had reached: on other samples, maybe

    train_on("run", *back, "training.max_steps=6")
    assert f"going on from {checkpoints / 'step-00000006'}" in capsys.readouterr().err
    assert not (checkpoints / "aside-2").exists()

    train_on("run", *back, "training.max_steps=10")  # other settings once more
    assert f"going on from {place}" in capsys.readouterr().err
    assert names(checkpoints / "aside-2") == ["step-00000006"]
    assert names(checkpoints)[0] == place.name


def test_a_path_to_elsewhere(
    train_on: Callable[..., Checkpoint], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = train_on("first", "training.max_steps=4").folder
    train_on("second", "training.max_steps=2")
    with pytest.raises(
        ConfigError, match=r"is at step 4, and step 4 is the last: raise training\."
    ):
        train_on("second", "training.max_steps=4", f"training.resume={place}")
    assert names(tmp_path / "second" / "checkpoints") == ["step-00000002"]
    words = ("training.max_steps=6", f"training.resume={place}")
    train_on("second", *words)
    shutil.rmtree(place)
    train_on("second", *words)  # it is not asked for again
    checkpoints = tmp_path / "second" / "checkpoints"
    assert f"going on from {checkpoints / 'step-00000006'}" in capsys.readouterr().err
    assert names(checkpoints / "aside-1") == ["step-00000002"]


def test_resume_refuses_another_shape_and_another_target(
    make_trainer: MakeTrainer, target: Target
) -> None:
    trainer = make_trainer("run")
    trainer.train_step()
    saved = read_checkpoint(trainer.save())
    with pytest.raises(TrainingError, match="num_layers"):
        make_trainer("deeper", "drafter.num_layers=2").resume(saved)
    for key in target.identity:
        with pytest.raises(Exception, match="another target"):
            saved.check_target({**target.identity, key: "other"})


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb"])
def test_trackers_write_offline_or_say_what_is_missing(
    make_trainer: MakeTrainer, tracker: str
) -> None:
    wanted = f"tracking.trackers=[{tracker}]"
    if importlib.util.find_spec(tracker) is None:
        with pytest.raises(MissingDependencyError, match=rf"deepspec\[{tracker}\]"):
            make_trainer("run", wanted)
        return
    trainer = make_trainer("run", wanted)
    trainer.train()
    left = {"tensorboard": "events.out.tfevents.*", "wandb": "offline-run-*"}
    assert list(trainer.folder.path.rglob(left[tracker]))


def test_metrics_log_drops_what_a_resumed_run_repeats(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer("run")
    trainer.train()
    path = trainer.folder.metrics
    path.write_text(path.read_text() + json.dumps({"step": 13, "loss": 1.0}) + '\n{"step": 14, "lo')
    trainer.step = 10
    trainer.train()
    steps = [row["step"] for row in read_metrics(path) if "loss" in row]
    assert steps == list(range(1, 13))


def test_expected_accept_length() -> None:
    """By hand: 1 + .5 + .5 * .5; a slot of weight zero ends the block."""
    acceptance = torch.tensor([0.5, 0.5, 0.9, 0.9])
    weights = torch.tensor([[1.0, 0.7], [1.0, 0.0]])
    lengths = expected_accept_length(acceptance, weights)
    torch.testing.assert_close(lengths, torch.tensor([1.75, 1.9]))


def test_learning_rate_warms_up_and_falls(make_trainer: MakeTrainer) -> None:
    config = make_trainer("run", "training.warmup_ratio=0.1").config.training
    rates = [learning_rate(step, 100, config) for step in range(100)]
    assert rates[9] == config.learning_rate == max(rates)
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 0.01 * config.learning_rate
