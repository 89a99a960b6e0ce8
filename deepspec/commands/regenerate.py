"""Let the target answer a recipe's prompts.

A drafter learns to guess its target's own text. Started again after a stop, it goes on where it
was; answers that failed are listed in FILE's neighbour *.failed.jsonl and tried again.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from deepspec.streams import show

if TYPE_CHECKING:
    from pathlib import Path

    from deepspec.config.schema import RunConfig

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

    from deepspec.commands.settings import command_line, print_config, recipe_config, take
    from deepspec.errors import ConfigError

    values, others = take(settings, "out")
    config = recipe_config(others)
    if options.cfg:
        print_config(config)
        return
    if "out" not in values:
        raise ConfigError("out= is missing: the file that the answers go to, such as out=a.jsonl")
    from deepspec.commands.stages import make_answers, open_target, print_skipped
    from deepspec.outputs import answers_output, hold, make_folder, require_own
    from deepspec.processes import rank, together
    from deepspec.regeneration import api_key_of

    api_key_of(config.regenerate)  # refused before the target is loaded
    out = Path(values["out"]).expanduser()
    if rank() == 0:
        require_own(out.parent, answers_output(out.stem))
        make_folder(out.parent)
    with hold(out):
        target = open_target(config)
        with together() as wait:
            print_skipped(make_answers(config, target, out, wait))
    if rank() != 0:
        return
    show(f"answers: {out}")
    show(f"next:    {command_line('train', *_on_answers(config, others, out))}")


def _on_answers(config: RunConfig, words: Sequence[str], answers: Path) -> list[str]:
    """`words` for a training on `answers`, whose rows are all wanted and have our own fields."""
    from deepspec.config.schema import FieldsConfig, as_dict

    prompts = ("data.path=", "data.limit=", "data.fields", "regenerate")
    rows = [f"data.path={answers}"]
    if config.data.limit is not None:
        rows.append("data.limit=null")
    for name, ours in as_dict(FieldsConfig()).items():
        if isinstance(ours, list) and getattr(config.data.fields, name) != ours:
            rows.append(f"data.fields.{name}=[{', '.join(ours)}]")
    same = [word for word in words if not word.startswith(prompts)]
    return [*same, *rows, "regenerate.enabled=false"]
