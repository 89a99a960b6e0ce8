"""Store the target's features of a recipe's conversations, to train on many times.

Final states are kept where a supervised token follows, but for a drafter that reads all of them
(mtp); the other kinds train on its store too. Works under torchrun: the processes share the shards.
Started again after a stop, it makes those that are missing.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from deepspec.streams import show

SETTINGS = "recipe=R, out=DIR for the store, and overrides of the config"
EXAMPLES = """\
  deepspec extract recipe=tiny out=features
  deepspec extract recipe=qwen3 data.path=[answers.jsonl] regenerate.enabled=false \\
      extract.dtype=float8 extract.yes=true out=/data/features
  torchrun --nproc-per-node 8 -m deepspec extract recipe=qwen3 out=/data/features
"""
HAS_CONFIG = True


def run(settings: Sequence[str], options: argparse.Namespace) -> None:
    """Answer the conversations where the recipe says so, then make the shards."""
    from pathlib import Path

    from deepspec.commands.settings import (
        command_line,
        given_keys,
        print_config,
        recipe_config,
        take,
    )
    from deepspec.errors import ConfigError

    values, others = take(settings, "out")
    config = recipe_config(others)
    if options.cfg:
        print_config(config)
        return
    if "out" not in values:
        raise ConfigError("out= is missing: the folder of the store, such as out=features")
    from deepspec.commands import stages
    from deepspec.commands.beginnings import adopt_origin
    from deepspec.commands.feature_sources import extract_features
    from deepspec.outputs import FOLDER, STORE, answers_output, claim, hold, make_folder
    from deepspec.processes import rank, together

    config = adopt_origin(config, given_keys(others), Path(config.out) / "checkpoints")
    out = Path(values["out"]).expanduser()
    if rank() == 0:  # the others may look while it writes
        claim(out, STORE, answers_output("answers"))
        make_folder(out)
    answers = out / "answers.jsonl"
    with hold(out, FOLDER), hold(answers):
        target = stages.open_target(config)
        with together() as wait:
            out.mkdir(parents=True, exist_ok=True)
            if config.regenerate.enabled:
                stages.print_skipped(stages.make_answers(config, target, answers, wait))
            data = stages.load_samples(config, target, answers)
            stages.print_skipped(data.skipped)
            extract_features(config, target, data, out, wait)
    if rank() == 0:
        show(f"store: {out}")
        same = [word for word in others if not word.startswith(("features=", "features."))]
        training = command_line("train", *same, "features=stored", f"features.path={out}")
        show(f"next:  {training}")
