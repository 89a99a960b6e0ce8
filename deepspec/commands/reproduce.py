"""The paper's figures in kind, on a small target: train, measure, and say what agrees.

One page with table 1 and figures 2 to 8, and a CSV of each. Stopped or killed at any moment, the
same command goes on.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepspec.streams import show

if TYPE_CHECKING:
    from deepspec.config.schema import RunConfig
    from deepspec.reproduction.plan import Plan
    from deepspec.reproduction.run import Runner

SETTINGS = (
    "out=DIR, figures=[table1,positions,depth,blocks,thresholds,reliability,throughput,budget], "
    "seeds=N (trainings of each drafter of table 1), jobs=N (at a time), reproduce=short (minutes "
    "for a look), recipe=R (else tiny), and overrides of the config"
)
EXAMPLES = """\
  deepspec reproduce out=runs/paper
  deepspec reproduce out=runs/paper seeds=3
  deepspec reproduce out=runs/table figures=[table1,positions] reproduce.steps=1000
  deepspec reproduce out=runs/look reproduce=short
"""
HAS_CONFIG = True

SHORT = ("figures", "seeds", "jobs")  # of the group reproduce
FREE = {f"reproduce.{name}" for name in SHORT}  # may change while a folder is filled


def run(settings: Sequence[str], options: argparse.Namespace) -> None:
    """Say how long it will take, do what is missing, and print what agrees."""
    from deepspec.commands.settings import print_config, take
    from deepspec.config.loading import load_config
    from deepspec.errors import ConfigError
    from deepspec.secrets import has_password

    values, words = take(settings, "out", "recipe", *SHORT)
    recipe = values.get("recipe", "tiny")
    own = [f"reproduce.{name}={values[name]}" for name in SHORT if name in values]
    config = load_config(recipe, [*words, *own])
    if options.cfg:
        print_config(config)
        return
    if hidden := [word.partition("=")[0] for word in words if has_password(word)]:
        raise ConfigError(
            f"{hidden[0]}=... has a password, which all users of this machine would see in the "
            "commands that reproduce starts; put it in a recipe as ${oc.env:NAME}"
        )
    passed_on = [word for word in words if not word.startswith(("reproduce=", "reproduce."))]
    out = Path(values.get("out", "runs/reproduce")).expanduser()
    _reproduce(config, [f"recipe={recipe}", *passed_on], out)


def _reproduce(config: RunConfig, words: Sequence[str], out: Path) -> None:
    import sys

    from deepspec.reproduction.page import PAGE, findings, write_page
    from deepspec.reproduction.plan import check_jobs, make_plan
    from deepspec.reproduction.run import Runner, hold_folder

    with hold_folder(out):
        plan = make_plan(config, words, out)
        runner = Runner(plan)
        check_jobs(runner.missing)
        check_settings(config, out)
        if runner.missing:
            _run(plan, runner)
        found = findings(plan, runner.done)
        write_page(plan, found, runner.failed)
    for finding in found:
        show(finding.title)
        show(f"  {finding.sentence}")
    show(f"report: {out / PAGE}")
    if runner.failed:
        show("failed, and tried again by the same command:")
        for name, log in runner.failed.items():
            show(f"  {name}: {log}")
        sys.exit(1)


def _run(plan: Plan, runner: Runner) -> None:
    from deepspec.progress import say
    from deepspec.reproduction import estimate
    from deepspec.reproduction.board import Board, minutes
    from deepspec.reproduction.jobs import Job
    from deepspec.reproduction.page import findings, write_page

    jobs, at_once = runner.missing, plan.config.reproduce.jobs
    scale = estimate.probe() / estimate.PROBE
    seconds = scale * estimate.makespan(jobs, at_once)
    say(
        f"reproduce: {len(jobs)} of {len(plan.jobs)} jobs to run, {at_once} at a time: about "
        f"{minutes(seconds)}. This is an estimate: seconds of another machine times {scale:.2f}, "
        "by a short measurement here; other work beside it takes longer."
    )

    def finished(job: Job) -> None:
        # a page as soon as a figure is complete: whoever stops early has that
        if any(job.name in jobs and runner.done.issuperset(jobs) for jobs in plan.figures.values()):
            try:
                write_page(plan, findings(plan, runner.done), runner.failed)
            except Exception as error:  # hours of work do not end at a drawing; the last page does
                say(f"reproduce: the page is not written yet: {type(error).__name__}: {error}")

    runner.run(Board(len(plan.jobs), at_once, scale), finished)


def check_settings(config: RunConfig, out: Path) -> None:
    """Keep the settings in the folder `out`.

    Raises ConfigError where it was begun with others. A path written in another way is the same.
    """
    from operator import eq

    import yaml

    from deepspec.atomic import write_text
    from deepspec.config.places import PATHS, same_place
    from deepspec.config.schema import as_dict, dotted
    from deepspec.errors import ConfigError
    from deepspec.json_files import as_kind
    from deepspec.yaml_files import read_yaml

    now = {key: value for key, value in dotted(as_dict(config)).items() if key not in FREE}
    path = out / "config.yaml"
    if path.is_file():
        try:
            before = dotted(as_kind(dict[str, Any], read_yaml(path)))
        except ValueError as error:
            raise ConfigError(f"{path} is damaged ({error}); set out= to a new folder") from None
        for key, value in now.items():
            same = same_place if key in PATHS else eq
            if not same(before.get(key, value), value):
                raise ConfigError(
                    f"{key}={value}, but {out} was begun with {before[key]}; set it back, or "
                    "set out= to a new folder"
                )
    write_text(path, yaml.safe_dump(as_dict(config), sort_keys=False, allow_unicode=True))
