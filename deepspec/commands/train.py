"""Distil a drafter: answers, training, report and export in one run folder.

The folder is out=, runs/RECIPE by default. Killed or stopped at any moment, the same command goes
on from the last checkpoint.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from deepspec.streams import show

if TYPE_CHECKING:
    from deepspec.config.schema import RunConfig
    from deepspec.targets import TargetEnds
    from deepspec.training.checkpoint import Checkpoint
    from deepspec.training.run_folder import RunFolder

SETTINGS = "recipe=R and overrides of the config, such as training.epochs=3"
EXAMPLES = """\
  deepspec train recipe=tiny
  deepspec train recipe=qwen3 target.path=./my-qwen3-finetune out=runs/mine
  deepspec train recipe=my_recipe.yaml training.learning_rate=3e-4
  deepspec train recipe=tiny --cfg
"""
HAS_CONFIG = True


def run(settings: Sequence[str], options: argparse.Namespace) -> None:
    """The whole trip; ends with the acceptance table, the paths, and what to do next."""
    from pathlib import Path

    from deepspec.commands.settings import given_keys, print_config, recipe_config

    config = recipe_config(settings)
    if options.cfg:
        print_config(config)
        return
    from deepspec.commands.beginnings import adopt_origin
    from deepspec.training.engine import contact
    from deepspec.training.run_folder import RunFolder

    config = adopt_origin(config, given_keys(settings), Path(config.out) / "checkpoints")
    with RunFolder(Path(config.out)) as folder, contact():
        _train(config, folder)


def _train(config: RunConfig, folder: RunFolder) -> None:
    from functools import partial

    from deepspec.commands import stages
    from deepspec.commands.feature_sources import feature_source, open_store
    from deepspec.errors import Interrupted
    from deepspec.outputs import hold
    from deepspec.training.engine import open_engine
    from deepspec.training.resume import say_uncompared, starting_point

    _check(config, folder)
    start = starting_point(config, folder.checkpoints)
    if start is not None:
        say_uncompared(config)
    engine = open_engine(config.engine, config.training, config.tracking, folder.path)
    stored, remote = config.features.source == "stored", config.features.source == "remote"
    target = (
        stages.open_ends(config) if stored or remote else stages.open_target(config, training=True)
    )
    stages.check_fit(config, target)
    if config.evaluation.enabled:
        stages.check_decoding(config, target)
    skipped: stages.Skipped = {}
    if engine.is_main:
        folder.save_config(config)
    if config.regenerate.enabled and not stored:
        wait = partial(engine.wait, patiently=True)
        with hold(folder.answers):
            skipped |= stages.make_answers(config, target, folder.answers, wait)
    store = open_store(config, target) if stored else None
    data = stages.load_samples(config, target, folder.answers, store)
    skipped |= data.skipped
    if engine.is_main:
        stages.print_skipped(skipped)
        folder.save_skipped(skipped)

    try:
        source = feature_source(config, target, data, folder, engine, store)
        best = stages.train_drafter(config, target, source, data, folder, engine, start)
    except Interrupted:  # in all processes at the same step
        engine.close()
        raise
    engine.close()
    if engine.is_main:  # the rest is for one
        _finish(config, folder, target, best)


def _check(config: RunConfig, folder: RunFolder) -> None:
    """Refuse what can be refused before anything is written."""
    from deepspec.commands import stages
    from deepspec.evaluation.benchmarks import check_benchmarks
    from deepspec.export import layouts_for
    from deepspec.export.files import require_replaceable
    from deepspec.features.remote import TOKEN
    from deepspec.outputs import REPORT, require_own
    from deepspec.regeneration import api_key_of
    from deepspec.secrets import token_of
    from deepspec.targets.parallel import check_split
    from deepspec.training.tracking import check_trackers

    stages.check_trained(config)
    check_split(config)
    stages.check_export(config)
    check_trackers(config.tracking)
    if config.regenerate.enabled:
        api_key_of(config.regenerate)
    if config.features.source == "remote":
        token_of(TOKEN)
    if config.evaluation.enabled:
        check_benchmarks(config.evaluation.benchmarks)
        require_own(folder.path, REPORT)
    if layouts_for(config.drafter.kind, config.drafter):
        require_replaceable(folder.export)


def _finish(config: RunConfig, folder: RunFolder, target: TargetEnds, best: Checkpoint) -> None:
    """Evaluate and export the drafter, and say where everything is.

    After hours of training it waits for a command that is writing a report or export here.
    """
    from deepspec.commands import stages
    from deepspec.commands.settings import command_line
    from deepspec.commands.sources import from_checkpoint
    from deepspec.evaluation.report import results_table
    from deepspec.export import layouts_for
    from deepspec.outputs import RESULTS, hold
    from deepspec.targets import Target
    from deepspec.terminal import Terminal

    drafted = from_checkpoint(best)
    exported = bool(layouts_for(drafted.kind, config.drafter))
    report = None

    def export() -> None:
        if exported:
            with hold(folder.export, patiently=True):
                stages.export_drafter(drafted, target, drafted.load(target), folder.export, report)

    if config.evaluation.enabled:
        try:
            whole = target if isinstance(target, Target) else stages.open_target(config)
            with hold(folder.path, RESULTS, patiently=True):
                report = stages.evaluate_drafter(drafted, whole, drafted.load(whole), folder.path)
        except Exception:  # it costs no export
            export()
            raise
    export()
    if report is not None:
        Terminal().print(results_table(report))
        show(f"report:     {folder.path / 'report.html'}")
    show(f"checkpoint: {drafted.place}")
    where = folder.export if exported else f"none: no layout holds a drafter.kind={drafted.kind}"
    show(f"export:     {where}")
    evaluation = command_line("evaluate", f"run={folder.path}", "decoding.batch_size=8")
    show(f"next:       {evaluation}")
