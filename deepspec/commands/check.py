"""Check what you bring and what you made, and print what holds.

Data against what the target emits; a target against what DeepSpec takes for granted; an export
against what serving engines require; a trained drafter's decoding path against its training
forward. Exits with 1 when something does not hold.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from deepspec.streams import show

if TYPE_CHECKING:
    from deepspec.checks import Finding
    from deepspec.checks.data import DataCheck
    from deepspec.checks.serving import Comparison
    from deepspec.commands.sources import Source

EXAMPLES = """\
  deepspec check target=./my-qwen3-finetune
  deepspec check target=owner/name target.dtype=bfloat16 engine.device=cuda
  deepspec check data=chats.jsonl target=Qwen/Qwen3-0.6B
  deepspec check data=chats.parquet recipe=qwen3 data.thinking=true out=data.html
  deepspec check export=my-drafter
  deepspec check export=someone/s-drafter target.path=./my-target
  deepspec check run=runs/tiny
  deepspec check run=runs/tiny/checkpoints/step-00000400 engine.device=cpu
"""
HAS_CONFIG = False

PROMPTS, NEW_TOKENS, CANDIDATES = 3, 32, 200
LONGEST = 600  # characters of a stretch of text that are printed


def run(settings: Sequence[str], options: argparse.Namespace) -> None:
    """Dispatch to the one check that is asked for; exit with 1 when something does not hold."""
    from deepspec.commands.settings import take
    from deepspec.errors import ConfigError

    values, words = take(settings, *MODES, "recipe")
    recipe = values.pop("recipe", None)
    if "data" in values and "target" in values:
        words.append(f"target.path={values.pop('target')}")
    if len(values) != 1:
        raise ConfigError(f"give exactly one of {', '.join(f'{mode}=...' for mode in MODES)}")
    ((mode, value),) = values.items()
    if not MODES[mode][1](value, words, recipe):
        sys.exit(1)


# ---------------------------------------------------------------------------------------- target


def _check_target(path: str, words: Sequence[str], recipe: str | None) -> bool:
    from deepspec.checks import check_target
    from deepspec.commands import stages
    from deepspec.config.loading import config_from
    from deepspec.errors import ConfigError

    if recipe is not None:
        words = [f"recipe={recipe}", *words]
    for word in words:
        key = word.partition("=")[0]
        if not key.startswith("target.") and key != "engine.device":
            raise ConfigError(f"{key} has no part in a check of a target; set target.* keys alone")
    raw = {"recipe": "check", "target": {"path": path}, "data": {"path": ["none"]}}
    target = stages.open_target(config_from(raw, words), checked=False)
    return print_findings(f"{target.family}, {target.name}", check_target(target))


def print_findings(title: str, findings: Iterable[Finding]) -> bool:
    """Print a table with a row per finding, once all are made; return whether all of them hold."""
    from rich.table import Table
    from rich.text import Text

    from deepspec.streams import visible
    from deepspec.terminal import Terminal

    found = list(findings)
    compared = any(finding.difference is not None for finding in found)
    table = Table(title=Text(visible(title)), box=None, pad_edge=False, title_justify="left")
    for column in ("", "what", *(["largest difference"] if compared else []), "found"):
        table.add_column(column, overflow="fold")
    for finding in found:
        state = Text("holds", "green") if finding.holds else Text("fails", "red")
        difference = "" if finding.difference is None else f"{finding.difference:.2g}"
        cells = (finding.what, *([difference] if compared else []), finding.detail)
        table.add_row(state, *map(visible, cells))
    Terminal().print(table)
    failed = sum(not finding.holds for finding in found)
    show(f"{failed} of {len(found)} do not hold" if failed else "all checks hold")
    return not failed


# ------------------------------------------------------------------------------------------ data


def _check_data(path: str, words: Sequence[str], recipe: str | None) -> bool:
    from contextlib import nullcontext

    from deepspec.commands.settings import take
    from deepspec.outputs import hold

    values, words = take(words, "out")
    page = _page(values["out"]) if values.get("out") else None
    with hold(page) if page is not None else nullcontext():
        return _check_rows(path, words, recipe, page)


def _check_rows(path: str, words: Sequence[str], recipe: str | None, page: Path | None) -> bool:
    from deepspec.checks.data import check_data
    from deepspec.commands import stages
    from deepspec.commands.settings import listed
    from deepspec.config.loading import config_from, load_config
    from deepspec.data.chat_template import ChatEncoder
    from deepspec.data.conversations import SkipCounts, load_conversations
    from deepspec.errors import ConfigError
    from deepspec.targets import load_text_side

    named = f"data.path={listed('data', path)}"
    if recipe is not None:
        config = load_config(recipe, [*words, named])
    else:
        if not any(word.startswith("target.path=") for word in words):
            raise ConfigError(
                "target= is missing: the target's tokenizer and chat template are needed; for "
                f"example deepspec check data={path} target=Qwen/Qwen3-0.6B, or recipe=R"
            )
        config = config_from({"recipe": "check"}, [*words, named])
    stages.quiet_libraries()
    tokenizer, stops = load_text_side(config.target)
    encoder = ChatEncoder.of(config.data, tokenizer, stops)
    skips = SkipCounts()
    found = check_data(load_conversations(config.data, skips), encoder, stops)
    found.skips.update(skips)
    _print_samples(found)
    for name, value in found.facts.items():
        show(f"{name}: {value}")
    if page is not None:
        _write_page(page, found, path, config.target.path)
    return print_findings(f"{path}, as {config.target.path} would emit it", found.findings)


def _print_samples(found: DataCheck) -> None:
    """The first samples; what is supervised stands out, and long stretches are shortened."""
    from rich.text import Text

    from deepspec.streams import visible
    from deepspec.terminal import Terminal

    console = Terminal(highlight=False, soft_wrap=True)
    for name, spans in found.shown:
        text = Text(f"{visible(name)}: ", style="bold")
        for span in spans:
            shown = visible(span.text, lines=True)
            if len(shown) > LONGEST:
                half = LONGEST // 2
                shown = f"{shown[:half]} [... {len(shown) - 2 * half} more ...] {shown[-half:]}"
            text.append(shown, style="bold green" if span.supervised else "dim")
        console.print(text, end="\n\n")


def _page(out: str) -> Path:
    """Return the path of the page and make its folder. Raises ConfigError before data is read."""
    from deepspec.errors import ConfigError
    from deepspec.outputs import make_folder

    path = Path(out).expanduser()
    if path.suffix != ".html":
        raise ConfigError(f"out={path} must be named *.html: it is the page of this check")
    if path.is_dir():
        raise ConfigError(f"out={path} is a folder; name a file")
    make_folder(path.parent)
    return path


def _write_page(path: Path, found: DataCheck, title: str, target: str) -> None:
    from deepspec import __version__
    from deepspec.atomic import write_text
    from deepspec.evaluation.report import environment

    context = {
        "title": title,
        "target": target,
        "version": __version__,
        "findings": found.findings,
        "counts": found.facts,
        "shown": found.shown,
    }
    write_text(path, environment().get_template("data.html.j2").render(context))
    show(f"page: {path}")


# ---------------------------------------------------------------------------------------- export


def _check_export(path: str, words: Sequence[str], recipe: str | None) -> bool:
    from rich.table import Table
    from rich.text import Text

    from deepspec.checks.export import check_export
    from deepspec.commands import stages
    from deepspec.config.loading import config_from, load_config
    from deepspec.streams import visible
    from deepspec.terminal import Terminal

    target, place = None, Path(path).expanduser()
    light = ["engine.device=cpu", "target.num_layer_ids=1"]  # no layer is captured
    if recipe is not None:
        target = stages.open_ends(load_config(recipe, [*light, *words]))
    elif words:
        raw = {"recipe": "check", "data": {"path": []}}
        target = stages.open_ends(config_from(raw, [*light, *words]))
    found = check_export(place, target)
    console = Terminal()
    show(f"{place}: {found.layout or 'no known'} layout")
    for colour, kind, texts in (("red", "fault", found.faults), ("yellow", "doubt", found.doubts)):
        for text in texts:
            console.print(Text.assemble((kind, colour), f": {visible(text)}"))
    if found.support:
        table = Table(box=None, pad_edge=False)
        for column in ("loads in", "", "why"):
            table.add_column(column, overflow="fold")
        for entry in found.support:
            answer = Text("yes", "green") if entry.loads else Text("no", "red")
            table.add_row(entry.engine, answer, visible(entry.why))
        console.print(table)
    return found.fine


# ------------------------------------------------------------------------------------------- run


def _check_run(path: str, words: Sequence[str], recipe: str | None) -> bool:
    from deepspec.checks.serving import compare_paths, differing_tensors
    from deepspec.commands import stages
    from deepspec.commands.sources import open_source
    from deepspec.drafters.registry import drafter_kind
    from deepspec.export import is_export, open_export

    place = Path(path).expanduser()
    source = open_source(place, words, recipe)
    target = stages.open_target(source.config)
    drafter = source.load(target).to(target.device)
    prompts = _prompts(source, target.tokenizer)
    found = compare_paths(target, drafter, drafter_kind(source.kind), prompts, NEW_TOKENS)
    _print(found, source.place)
    fine = found.fine
    whole = source.run is not None and place.resolve() == source.run.path.resolve()
    if whole and source.run is not None and is_export(folder := source.run.export):
        different = differing_tensors(drafter, open_export(folder).load(target))
        for name, size in sorted(different.items()):
            show(f"{folder}: {name} is not the checkpoint's in bf16 (differs by {size:.3g})")
        if not different:
            show(f"{folder}: the checkpoint's weights, rounded to bf16")
        fine = fine and not different
    return fine


def _print(found: Comparison, place: Path | None) -> None:
    from rich.table import Table
    from rich.text import Text

    from deepspec.streams import visible
    from deepspec.terminal import Terminal

    names = list(found.differences)
    table = Table(box=None, pad_edge=False)
    for column in ("position", *names):
        table.add_column(column, justify="right")

    def cell(value: float) -> Text:
        return Text(f"{value:.1e}", "red" if value > found.tolerance else "")

    for index, values in enumerate(zip(*found.differences.values(), strict=True)):
        table.add_row(str(index + 1), *map(cell, values))
    verdict = "decodes as it was trained" if found.fine else "does NOT decode as it was trained"
    console = Terminal()
    console.print(
        f"{visible(str(place))} {verdict}: largest differences between the training forward and "
        f"the decoding path in {found.blocks} blocks of {found.rows} texts, over the largest "
        f"value; at most {found.tolerance:g} is allowed, and {found.apart} blocks are above that",
        highlight=False,
    )
    console.print(table)


def _prompts(source: Source, tokenizer: object) -> list[list[int]]:
    """Of the run's own answers, else of its data, else of the prompts that are shipped."""
    from dataclasses import replace

    from deepspec.checks.serving import some_prompts
    from deepspec.config.resources import resource
    from deepspec.config.schema import DataConfig
    from deepspec.data.chat_template import ChatEncoder
    from deepspec.data.conversations import SkipCounts, load_conversations
    from deepspec.errors import DataError

    data = source.config.data
    encoder = ChatEncoder.of(data, tokenizer)
    places = [DataConfig(path=[str(resource("data/prompts/chat.jsonl"))])]
    if data.path:
        places.insert(0, data)
    if source.run is not None and source.run.answers.is_file():
        places.insert(0, DataConfig(path=[str(source.run.answers)]))
    for place in places:
        try:
            found = load_conversations(replace(place, limit=CANDIDATES), SkipCounts())
            if prompts := some_prompts(found, encoder, PROMPTS):
                return prompts
        except DataError:
            continue  # the data of a run may have moved since
    raise DataError(f"no prompt fits in data.max_length={data.max_length}; raise it")


MODES: dict[str, tuple[str, Callable[[str, Sequence[str], str | None], bool]]] = {
    "target": (
        "PATH (does DeepSpec read, train and decode this model rightly? takes target.* keys)",
        _check_target,
    ),
    "export": (
        "DIR (which engines load this export, and why not? recipe=R or target.path=... tells more)",
        _check_export,
    ),
    "run": (
        "DIR (does this run, checkpoint or export decode as it was trained? takes config keys, and "
        "recipe=R for an export)",
        _check_run,
    ),
    "data": (
        "PATH (what would a drafter learn from it? needs target=PATH or recipe=R; takes data.* "
        "and target.* keys, and out=PAGE.html)",
        _check_data,
    ),
}
SETTINGS = "one of " + ", ".join(f"{mode}={what}" for mode, (what, _) in MODES.items())
