"""The example is the trainer without its engine: same batches, anchors and weights, same losses.

Known to be right by: `Trainer.train_step` on the same target and samples, with the example's own
constants as its config; and by running the file as a reader would.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from deepspec.config.loading import config_from
from deepspec.config.schema import as_dict
from deepspec.data.chat_template import ChatEncoder, encode_all
from deepspec.data.conversations import Conversation, SkipCounts
from deepspec.features.sources import Online
from deepspec.records import Sample
from deepspec.targets import Target
from deepspec.training.engine import open_engine
from deepspec.training.run_folder import RunFolder
from deepspec.training.trainer import Trainer
from examples import simple_loop

STEPS = 6  # of 10 samples, 4 a step: two epochs, whose last steps are short


@pytest.fixture
def samples(target: Target) -> list[Sample]:
    """Short ones, whose every anchor is used, and one long enough for anchors to be drawn."""
    questions = [("How many?", f"There are {n}" + " and" * n + " no more.") for n in range(10)]
    conversations = [
        Conversation(
            f"s{number}",
            ({"role": "user", "content": asked}, {"role": "assistant", "content": said}),
        )
        for number, (asked, said) in enumerate(questions)
    ]
    return encode_all(conversations, ChatEncoder(target.tokenizer, 256), SkipCounts())


def trainer_losses(
    target: Target, samples: list[Sample], folder: Path, objective: dict[str, Any]
) -> list[float]:
    config = config_from(
        {
            "recipe": "example",
            "seed": simple_loop.SEED,
            "target": {"path": target.name},
            "data": {"path": []},
            "drafter": as_dict(simple_loop.DRAFTER),
            "objective": {**as_dict(simple_loop.OBJECTIVE), **objective},
            "training": {
                "epochs": 100,
                "max_steps": STEPS,
                "batch_size": simple_loop.BATCH_SIZE,
                # cut otherwise than the example on purpose: it must not matter
                "micro_batch_size": 3,
                "anchors_per_sample": simple_loop.ANCHORS,
                "learning_rate": simple_loop.LEARNING_RATE,
                "warmup_ratio": simple_loop.WARMUP_RATIO,
                "betas": list(simple_loop.BETAS),
                "precision": "fp32",
            },
            "engine": {"device": "cpu"},
        }
    )
    engine = open_engine(config.engine, config.training, config.tracking, folder)
    drafter = simple_loop.build(target)
    run = RunFolder(folder)
    trainer = Trainer(config, target, Online(target), drafter, samples, [], run, engine)
    return [trainer.train_step()["loss"] for _ in range(STEPS)]


@pytest.mark.parametrize("objective", [{"implementation": "eager"}, {"implementation": "fused"}])
def test_losses_of_the_trainer(
    target: Target, samples: list[Sample], tmp_path: Path, objective: dict[str, Any]
) -> None:
    drafter = simple_loop.build(target)
    losses = list(simple_loop.train(target, drafter, samples, STEPS))
    assert max(losses) > 1.05 * min(losses)  # they move, so equal losses say something
    assert losses == pytest.approx(trainer_losses(target, samples, tmp_path, objective), rel=1e-5)


@pytest.mark.slow  # its losses are in the quick suite
def test_runs_as_a_script(target_folder: Path) -> None:
    """From nothing: the target answers prompts, two steps, three decodes."""
    command = [sys.executable, simple_loop.__file__, "--steps", "2", "--prompts", "8"]
    done = subprocess.run(
        [*command, "--target", str(target_folder)], capture_output=True, text=True, check=True
    )
    assert "step 2/2" in done.stdout
    assert done.stdout.count("same tokens as plain decoding: yes") == 3


def test_takes_answers_from_a_file(
    target_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(simple_loop, "MAX_NEW_TOKENS", 8)
    answers = tmp_path / "answers.jsonl"
    answers.write_text(
        '{"messages": [{"role": "user", "content": "Why?"},'
        ' {"role": "assistant", "content": "Because of the weather."}]}\n' * 3
    )
    arguments = ["--steps", "1", "--answers", str(answers), "--target", str(target_folder)]
    simple_loop.main(arguments)
    printed = capsys.readouterr().out
    assert "3 conversations" in printed
    assert "prompts" not in printed  # the target was not asked


def test_is_short_enough_to_read() -> None:
    assert len(Path(simple_loop.__file__).read_text().splitlines()) < 200
