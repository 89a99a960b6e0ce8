"""Let the target answer a recipe's prompts.

A drafter learns to guess its target's own text. Started again after a stop, it goes on where it
was; answers that failed are listed in FILE's neighbour *.failed.jsonl and tried again.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

SETTINGS = "recipe=R, out=FILE, and overrides of the config"
EXAMPLES = """\
  deepspec regenerate recipe=tiny out=answers.jsonl
  torchrun --nproc-per-node 8 -m deepspec regenerate recipe=qwen3 out=answers.jsonl
  deepspec regenerate recipe=qwen3 out=answers.jsonl data.limit=1000 \\
      regenerate.server=http://127.0.0.1:8000/v1
"""
HAS_CONFIG = True


def run(settings: Sequence[str], options: argparse.Namespace) -> None:
    """Write the answers."""
    from pathlib import Path

    from deepspec.commands.settings import print_config, recipe_config, take
    from deepspec.errors import ConfigError

    values, others = take(settings, "out")
    config = recipe_config(others)
    if options.cfg:
        print_config(config)
        return
    if "out" not in values:
        raise ConfigError("out= is missing: the file that the answers go to, such as out=a.jsonl")
    from deepspec.commands.stages import make_answers, open_target, print_skipped
    from deepspec.processes import rank, together

    out = Path(values["out"]).expanduser()
    target = open_target(config)
    with together() as wait:
        print_skipped(make_answers(config, target, out, wait))
    if rank() != 0:
        return
    print(f"answers: {out}")
    print(
        f"next:    deepspec train recipe={config.recipe} data.path=[{out}] regenerate.enabled=false"
    )
