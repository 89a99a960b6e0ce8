"""The model card of an export: what it is, how well it drafts, and how to serve it."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from deepspec.export.engines import Traits, loads_in
from deepspec.export.names import public_name


def model_card(
    name: str,
    shape: Any,
    config: dict[str, Any],
    traits: Traits,
    run: dict[str, Any],
    step: int | None,
    acceptance: str | None,
) -> str:
    """A Hugging Face model card as text.

    `name` of the export (its folder, or where it will be on the hub), `shape` of the drafter,
    `config` its config.json and `traits` what engines go by, `run` the resolved RunConfig of the
    training as plain containers, `step` the optimizer step exported, None where the training is not
    known (the export of an export), `acceptance` the measured table as Markdown, None before an
    evaluation. The licence is left to the user: a drafter follows
    its target's and its data's.
    """
    environment = Environment(
        loader=PackageLoader("deepspec.export"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    support = loads_in(traits)
    target = config["deepspec"]["target"]
    return environment.get_template("model_card.md.j2").render(
        name=name,
        shape=shape,
        config=config,
        traits=traits,
        method=_method(shape, traits),
        run=run,
        step=step,
        acceptance=acceptance,
        target=target,
        on_hub="/" in target,
        data=[public_name(path) for path in run["data"]["path"]],
        support=support,
        served={entry.engine for entry in support if entry.loads},
    )


def _method(shape: Any, traits: Traits) -> str:
    """What engines call the drafter; dflash: none of theirs."""
    if traits.eagle3 is not None:
        return "eagle3"
    return "dspark" if shape.markov_rank else "dflash"
