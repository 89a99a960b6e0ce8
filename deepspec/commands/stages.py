"""The stages of a run, shared by the commands: target, answers, samples, training, report.

This is where the rooms of floor 4 meet. Each stage reads what the one before it left in the run
folder, so a run that was stopped anywhere goes on from there.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from deepspec import __version__
from deepspec.atomic import naming
from deepspec.commands.beginnings import first_drafter
from deepspec.commands.confidences import calibration_of, require_scheduled
from deepspec.commands.sources import Source
from deepspec.config.schema import COLLECTIVE, RunConfig, as_dict
from deepspec.data.batching import cut_samples, hold_out
from deepspec.data.chat_template import ChatEncoder, encode_all
from deepspec.data.conversations import SkipCounts, load_conversations
from deepspec.decoding import require_rollback, require_state
from deepspec.drafters.base import Drafter
from deepspec.drafters.registry import drafter_kind, open_proposer
from deepspec.errors import ConfigError
from deepspec.evaluation.evaluate import average, evaluate
from deepspec.evaluation.report import markdown_table, write_report
from deepspec.evaluation.results import Report
from deepspec.export import layouts_for, model_card, require_layout, write_export
from deepspec.export.engines import Traits
from deepspec.features.sources import FeatureSource
from deepspec.features.store import Store
from deepspec.machine import describe_machine, peak_flops, processor_flops
from deepspec.planning.shapes import PLANNED
from deepspec.planning.work import work_of
from deepspec.processes import rank, world_size
from deepspec.progress import say
from deepspec.records import Sample
from deepspec.regeneration import (
    Answerer,
    RegenerationCounts,
    ServerAnswerer,
    TargetAnswerer,
    api_key_of,
    load_answers,
    regenerate,
    regenerate_together,
)
from deepspec.scheduling.calibration_file import read_calibration
from deepspec.scheduling.schedulers import open_policy
from deepspec.targets import Target, TargetEnds, load_ends, load_target
from deepspec.training.checkpoint import Checkpoint, best_checkpoint
from deepspec.training.engine import Engine, choose_device
from deepspec.training.resume import named_start, set_aside
from deepspec.training.run_folder import RunFolder
from deepspec.training.speed import Speed
from deepspec.training.trainer import Trainer

Skipped = dict[str, dict[str, int]]


@dataclass(frozen=True)
class TrainingData:
    """Tokenised conversations to train and validate on, and what was left out."""

    samples: list[Sample]
    validation: list[Sample]
    skipped: Skipped


def open_ends(config: RunConfig) -> TargetEnds:
    """What training on features from elsewhere needs of the target, on `engine.device`."""
    quiet_libraries()
    return load_ends(config.target, choose_device(config.engine.device))


def open_target(config: RunConfig, training: bool = False, checked: bool = True) -> Target:
    """The frozen target, on the device that `engine.device` asks for; `checked`: see `load_target`.

    Raises ConfigError where it is split so that only `training` can use it.
    """
    if config.target.parallel in COLLECTIVE and not training:
        raise ConfigError(
            f"target.parallel={config.target.parallel} is for training, whose processes make "
            "equally many forwards; set target.parallel=device_map, or replicated"
        )
    quiet_libraries()
    return load_target(config.target, choose_device(config.engine.device), checked)


def check_trained(config: RunConfig) -> None:
    """Raises ConfigError where there is nothing to train."""
    kind = config.drafter.kind
    if not drafter_kind(kind).trained:
        raise ConfigError(
            f"drafter.kind={kind} needs no training; measure it by deepspec evaluate "
            f"recipe={config.recipe} drafter.kind={kind}"
        )


def check_fit(config: RunConfig, target: TargetEnds) -> None:
    """Raises ConfigError for a drafter that does not fit `target`, before answers are made."""
    drafter_kind(config.drafter.kind).resolve(config.drafter, target)


def check_decoding(config: RunConfig, target: TargetEnds) -> None:
    """Raises TargetError or ConfigError where the evaluation after a training could not decode as
    `config.decoding` says, before answers are made."""
    require_rollback(target)
    require_state(target, config.decoding.compile)
    open_policy(config.decoding)
    shape = drafter_kind(config.drafter.kind).resolve(config.drafter, target)
    require_scheduled(shape, config.decoding)


def quiet_libraries() -> None:
    """Progress is shown once, by us."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def make_answers(
    config: RunConfig, target: TargetEnds, out: Path, wait: Callable[[], None]
) -> Skipped:
    """Stage 1: the conversations of `config.data`, answered by the target, into `out`.

    By all processes of the job together, or by the first alone where a server answers; what was
    left out is told to the first.
    """
    skips, wanted = SkipCounts(), config.regenerate
    conversations = list(load_conversations(config.data, skips))
    answerer: Answerer
    if wanted.server:
        key = api_key_of(wanted)
        answerer = ServerAnswerer(wanted.server, wanted.server_model, config.data, key)
    else:
        assert isinstance(target, Target), "checked by config.validation"
        answerer = TargetAnswerer(target, config.data)
    counts: RegenerationCounts | None = None
    with naming(out):
        if world_size() > 1 and not wanted.server:
            counts = regenerate_together(conversations, answerer, wanted, out, wait)
        elif rank() == 0:
            counts = regenerate(conversations, answerer, wanted, out)
    wait()
    if counts is None:
        return {}
    say(f"answers: {counts}")
    return {"prompts": dict(skips), "answers": counts.failed}


def load_samples(
    config: RunConfig, target: TargetEnds, answers: Path, store: Store | None = None
) -> TrainingData:
    """Stage 2: the target's answers (or the data's own) as tokens and loss masks.

    In a `store` they lie beside their features.
    """
    skips, data, each = SkipCounts(), config.data, config.regenerate.samples_per_prompt
    if store is not None:
        samples = list(store.samples())
    else:
        # cut here, where it is counted
        whole = replace(data, max_length=sys.maxsize)
        encoder = ChatEncoder.of(whole, target.tokenizer, target.stop_token_ids)
        if config.regenerate.enabled:
            conversations = load_answers(data, each, answers, skips)
        else:
            conversations = load_conversations(data, skips)
        samples = encode_all(conversations, encoder, skips)
        samples = cut_samples(samples, data.max_length, target.context_length, skips)
        if others := len(samples) - len({sample.sample_id for sample in samples}):
            say(
                f"training samples: {others} have the id of another one and other content; all of "
                "them are used"
            )
    training, validation = hold_out(samples, config.training.validation_samples, config.seed)
    return TrainingData(training, validation, {"training samples": dict(skips)})


def speed_of(config: RunConfig, target: TargetEnds, engine: Engine) -> Speed | None:
    """What the progress of a training says besides; None in processes that show none."""
    if not engine.is_main:
        return None
    if config.drafter.kind not in PLANNED:
        return Speed(None, None)
    work, given = work_of(config, target), config.engine.peak_tflops
    if given:
        return Speed(work, given * 1e12)
    measure = processor_flops if engine.device.type == "cpu" else None
    return Speed(work, peak_flops(engine.device, config.training.precision), measure)


def train_drafter(
    config: RunConfig,
    target: TargetEnds,
    source: FeatureSource,
    data: TrainingData,
    folder: RunFolder,
    engine: Engine,
    start: Checkpoint | None,
) -> Checkpoint:
    """Stage 3: distil, or go on from `start`; gives the best checkpoint by validation."""
    samples, validation = data.samples, data.validation
    drafter = first_drafter(config, target, samples, start)
    speed = speed_of(config, target, engine)
    trainer = Trainer(config, target, source, drafter, samples, validation, folder, engine, speed)
    if config.training.resume == "never" and engine.is_main:
        shutil.rmtree(folder.checkpoints, ignore_errors=True)
    if start is not None:
        trainer.resume(start)
        if trainer.step >= trainer.total_steps and start.folder == named_start(config.training):
            raise ConfigError(
                f"training.resume={start.folder} is at step {start.step}, and step "
                f"{trainer.total_steps} is the last: raise training.epochs or training.max_steps, "
                f"or measure it as it is (deepspec evaluate checkpoint={start.folder})"
            )
        if engine.is_main:
            set_aside(folder.checkpoints, start)
        say(f"going on from {start.folder}")
    try:
        trainer.train()
    finally:
        if summary := source.close():
            say(summary)
    return best_checkpoint(folder.checkpoints)


def evaluate_drafter(source: Source, target: Target, drafter: Drafter, out: Path) -> Report:
    """Stage 4: decode the benchmarks; traces and report go to the folder `out`."""
    config = source.config
    # what can fail fails now rather than behind the work
    skipped, training = source.skipped(), source.training()
    calibration = calibration_of(source, drafter)
    proposer = open_proposer(source.kind, drafter, target)
    evaluation = evaluate(config, target, proposer, calibration)
    report = Report(
        title=config.recipe,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        version=__version__,
        target=target.name,
        identity=target.identity,
        drafter={
            "kind": source.kind,
            "parameters": sum(parameter.numel() for parameter in drafter.parameters()),
            "source": source.place and str(source.place),
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
    write_report(report, out)  # first: by report.json the folder is known as ours
    evaluation.save_traces(out / "traces.jsonl")
    return report


def check_export(config: RunConfig) -> None:
    """Raises ConfigError where the trained drafter will not go into `export.format`, but into
    another one; one that no layout holds is trained all the same."""
    if layouts_for(config.drafter.kind, config.drafter):
        require_layout(config.export.format, config.drafter.kind, config.drafter)


def export_drafter(
    source: Source, target: TargetEnds, drafter: Drafter, out: Path, report: Report | None
) -> Traits:
    """Stage 5: files for serving engines, with a model card; what engines go by.

    The calibration beside the drafter goes into config.json. Raises ConfigError for a drafter that
    `export.format` cannot hold, CheckpointError for a calibration of other weights.
    """
    own = {}
    if source.place is not None and source.config.decoding.calibration != "none":
        calibration = read_calibration(source.place)
        own = {"calibration": calibration.embedded()} if calibration else {}
    export, anchors = source.config.export, source.config.training.anchors_per_sample
    table = markdown_table(report) if report is not None and report.results else None

    def card(config: dict[str, Any], traits: Traits) -> str:
        run = as_dict(source.config)
        return model_card(out.name, drafter.config, config, traits, run, source.step, table)

    return write_export(
        export.format, source.kind, drafter, target, out, export.profile, anchors, card, own
    )


def print_skipped(skipped: Skipped) -> None:
    """One line a reason; nothing where nothing was left out."""
    for stage, reasons in skipped.items():
        for reason, count in sorted(reasons.items()):
            say(f"{stage}: {count} left out ({reason})")
