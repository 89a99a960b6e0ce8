"""The stages of a run, shared by the commands: target, answers, samples, training, report.

This is where the rooms of floor 4 meet. Each stage reads what the one before it left in the run
folder, so a run that was stopped anywhere goes on from there.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from deepspec import __version__
from deepspec.commands.sources import Source
from deepspec.config.schema import FieldsConfig, RunConfig, as_dict
from deepspec.data.batching import hold_out
from deepspec.data.chat_template import ChatEncoder, encode_all
from deepspec.data.conversations import SkipCounts, load_conversations
from deepspec.drafters.base import Drafter
from deepspec.drafters.dspark import DSparkDrafter
from deepspec.drafters.registry import drafter_kind
from deepspec.evaluation.evaluate import average, evaluate
from deepspec.evaluation.report import markdown_table, write_report
from deepspec.evaluation.results import Report
from deepspec.export.card import model_card
from deepspec.export.flat import export_flat, flat_config
from deepspec.machine import describe_machine
from deepspec.processes import rank
from deepspec.records import Sample
from deepspec.regeneration import Answerer, ServerAnswerer, TargetAnswerer, regenerate
from deepspec.targets import Target, load_target
from deepspec.training.checkpoint import Checkpoint, best_checkpoint
from deepspec.training.engine import Engine, choose_device
from deepspec.training.run_folder import RunFolder
from deepspec.training.trainer import Trainer

Skipped = dict[str, dict[str, int]]


@dataclass(frozen=True)
class TrainingData:
    """Tokenised conversations to train and validate on, and what was left out."""

    samples: list[Sample]
    validation: list[Sample]
    skipped: Skipped


def open_target(config: RunConfig) -> Target:
    """The frozen target, on the device that `engine.device` asks for."""
    quiet_libraries()
    return load_target(config.target, choose_device(config.engine.device))


def quiet_libraries() -> None:
    """Progress is shown once, by us."""
    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def make_answers(config: RunConfig, target: Target, out: Path) -> Skipped:
    """Stage 1: the conversations of `config.data`, answered by the target, into `out`."""
    skips, wanted = SkipCounts(), config.regenerate
    conversations = list(load_conversations(config.data, skips))
    answerer: Answerer = (
        ServerAnswerer(wanted.server, wanted.server_model, config.data)
        if wanted.server
        else TargetAnswerer(target, config.data)
    )
    counts = regenerate(conversations, answerer, wanted, out)
    say(
        f"answers: {counts.rows} rows, {counts.resumed} from before; {counts.truncated} were cut "
        f"at max_new_tokens, {counts.altered} tokenize differently; {counts.tokens} tokens in "
        f"{counts.seconds:.0f} s"
    )
    return {"prompts": dict(skips), "answers": counts.failed}


def load_samples(config: RunConfig, target: Target, folder: RunFolder) -> TrainingData:
    """Stage 2: the target's answers (or the data's own) as tokens and loss masks."""
    skips, data = SkipCounts(), config.data
    if config.regenerate.enabled:
        data = replace(data, path=[str(folder.answers)], fields=FieldsConfig(), limit=None)
    encoder = ChatEncoder(target.tokenizer, data.max_length, data.thinking, data.system_prompt)
    samples = encode_all(load_conversations(data, skips), encoder, skips)
    training, validation = hold_out(samples, config.training.validation_samples, config.seed)
    return TrainingData(training, validation, {"training samples": dict(skips)})


def train_drafter(
    config: RunConfig,
    target: Target,
    data: TrainingData,
    folder: RunFolder,
    engine: Engine,
    start: Checkpoint | None,
) -> Checkpoint:
    """Stage 3: distil, or go on from `start`; gives the best checkpoint by validation."""
    kind = drafter_kind(config.drafter.kind)
    torch.manual_seed(config.seed)
    drafter = kind.build(kind.resolve(config.drafter, target))
    trainer = Trainer(config, target, drafter, data.samples, data.validation, folder, engine)
    if config.training.resume == "never" and engine.is_main:
        shutil.rmtree(folder.checkpoints, ignore_errors=True)
    if start is not None:
        trainer.resume(start)
        say(f"going on from {start.folder}")
    trainer.train()
    return best_checkpoint(folder.checkpoints)


def evaluate_drafter(source: Source, target: Target, drafter: Drafter, out: Path) -> Report:
    """Stage 4: decode the benchmarks; traces and report go to the folder `out`."""
    config = source.config
    # what can fail fails now rather than behind the work
    skipped, training = source.skipped(), source.training()
    out.mkdir(parents=True, exist_ok=True)
    proposer = drafter_kind(source.kind).proposer(drafter.to(target.device), target)
    evaluation = evaluate(config, target, proposer)
    report = Report(
        title=config.recipe,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        version=__version__,
        target=target.name,
        identity=target.identity,
        drafter={
            "kind": source.kind,
            "parameters": sum(parameter.numel() for parameter in drafter.parameters()),
            "source": str(source.place),
            "step": source.step,
            "shape": drafter.config.to_dict(),
        },
        machine=describe_machine(),
        config=as_dict(config),
        results=evaluation.results,
        averages=average(evaluation.results),
        skipped={**skipped, **evaluation.skipped},
        training=training,
    )
    evaluation.save_traces(out / "traces.jsonl")
    write_report(report, out)
    return report


def export_drafter(
    source: Source, target: Target, drafter: Drafter, out: Path, report: Report | None
) -> dict[str, Any]:
    """Stage 5: files for serving engines, with a model card; the config.json that was written."""
    export, anchors = source.config.export, source.config.training.anchors_per_sample
    assert isinstance(drafter, DSparkDrafter)
    config = flat_config(drafter.config, target, export.profile, anchors)
    table = markdown_table(report) if report is not None and report.results else None
    card = model_card(out.name, config, as_dict(source.config), source.step or 0, table)
    export_flat(drafter, target, out, export.profile, card, anchors)
    return config


def print_skipped(skipped: Skipped) -> None:
    """One line a reason; nothing where nothing was left out."""
    for stage, reasons in skipped.items():
        for reason, count in sorted(reasons.items()):
            say(f"{stage}: {count} left out ({reason})")


def say(line: str) -> None:
    """A line about the work, once, beside the progress; results go to standard output."""
    if rank() == 0:
        print(line, file=sys.stderr, flush=True)
