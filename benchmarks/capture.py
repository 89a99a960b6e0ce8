"""Feature capture against the plain forward that it replaces, and its share of a training step.

    deepspec regenerate recipe=tiny out=answers.jsonl
    python benchmarks/capture.py answers.jsonl
    python benchmarks/capture.py answers.jsonl --vocabulary 151936 --hidden 256 --repeats 3

*plain* is `model(ids, output_hidden_states=True)`: all layers' outputs and the logits, from which
the captured layers and the final states are taken and packed. *capture* is `Target.features`; both
give the same numbers, which is checked. The target is that of recipe=tiny (on CUDA a random one of
Qwen3-4B's shapes), or with `--vocabulary` a random one. The two take turns; tokens a second are of
processor time (on CUDA of wall time), medians with quartiles; a peak is the most that a forward
allocates at a time.

The second table is the padding of batches of 4 as they are drawn, cut by length from larger steps,
and in `extract`. The third trains recipe=tiny with the target between the drafter's steps and
ahead of them (features.overlap), in turns.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from steps import peak_bytes

from deepspec.commands import stages
from deepspec.commands.feature_sources import feature_source
from deepspec.config.loading import load_config
from deepspec.config.schema import RunConfig
from deepspec.data.batching import epoch_batches, split_batch
from deepspec.drafters.registry import drafter_kind
from deepspec.features.extract import batches
from deepspec.machine import describe_machine
from deepspec.records import Sample, TargetFeatures
from deepspec.targets import Target
from deepspec.training.engine import open_engine
from deepspec.training.run_folder import RunFolder
from deepspec.training.trainer import Trainer

QWEN3_4B = {"vocab_size": 151_936, "hidden_size": 2560, "intermediate_size": 9728, "layers": 36}


def main() -> None:
    """Measure and print the three tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("answers", help="a file of deepspec regenerate recipe=tiny")
    parser.add_argument("--vocabulary", type=int, help="of a random target; default: the tiny one")
    parser.add_argument("--hidden", type=int, default=256, help="of the random target")
    parser.add_argument("--layers", type=int, default=8, help="of the random target")
    parser.add_argument("--rows", type=int, default=4, help="samples a forward")
    parser.add_argument("--repeats", type=int, default=15, help="of each, alternating")
    parser.add_argument("--steps", type=int, default=20, help="training steps a turn")
    parser.add_argument("--turns", type=int, default=4, help="of training; 0 leaves it out")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    words = [f"data.path=[{options.answers}]", "regenerate.enabled=false", "data.limit=null"]
    config = load_config("tiny", words)
    target = make_target(config, options)
    samples = stages.load_samples(config, target, Path(options.answers)).samples
    ways = {"plain": plain, "capture": Target.features}
    console = Console()
    console.print(forwards(ways, target, samples, options))
    console.print(padding(samples, config))
    if options.turns:
        console.print(training(config, target, options))
    machine = describe_machine()
    device = ", ".join(machine["accelerators"]) or machine["processor"]
    print(f"{device}, {options.threads} threads, torch {machine['torch']}")


def make_target(config: RunConfig, options: argparse.Namespace) -> Target:
    """recipe=tiny's, or a random one with its tokenizer."""
    cuda = torch.cuda.is_available()
    tiny = stages.open_target(config)
    if options.vocabulary is None and not cuda:
        return tiny
    from transformers import AutoModelForCausalLM, Qwen3Config

    size = {"vocab_size": options.vocabulary, "hidden_size": options.hidden}
    size |= {"intermediate_size": 3 * options.hidden, "layers": options.layers}
    size = QWEN3_4B if options.vocabulary is None else size
    layers = size.pop("layers")
    torch.manual_seed(0)
    with torch.device(tiny.device):
        model = AutoModelForCausalLM.from_config(
            Qwen3Config(**size, num_hidden_layers=layers, tie_word_embeddings=True),
            dtype=torch.bfloat16 if cuda else torch.float32,
        )
    return Target(model, tiny.tokenizer, 5 if cuda else 4, "random")


def plain(target: Target, samples: Sequence[Sample]) -> TargetFeatures:
    """What most training code does: everything, then the part that is needed."""
    ids = torch.nn.utils.rnn.pad_sequence([s.input_ids for s in samples], batch_first=True)
    with torch.no_grad():
        output = target.model(ids.to(target.device), use_cache=False, output_hidden_states=True)
    assert output.logits.shape[-1] == target.vocab_size
    kept = torch.cat([output.hidden_states[layer + 1] for layer in target.layer_ids], dim=-1)
    last = output.hidden_states[-1]
    rows = range(len(samples))
    return TargetFeatures(
        torch.cat([kept[row, : len(samples[row])] for row in rows]),
        torch.cat([last[row, : len(samples[row])] for row in rows]),
    )


def draw(samples: Sequence[Sample], rows: int, count: int) -> list[list[Sample]]:
    """`count` batches as training draws them."""
    order = epoch_batches(len(samples), rows, 0, 0)
    return [[samples[index] for index in batch] for batch in order[:count]]


Way = Callable[[Target, Sequence[Sample]], TargetFeatures]


def forwards(
    ways: dict[str, Way], target: Target, samples: Sequence[Sample], options: argparse.Namespace
) -> Table:
    """Tokens a second, alternating, and peaks."""
    drawn = draw(samples, options.rows, options.repeats + 1)
    one, other = (way(target, drawn[-1]) for way in ways.values())
    torch.testing.assert_close(one.context, other.context, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(one.final, other.final, rtol=1e-3, atol=1e-3)
    clock = time.perf_counter if target.device.type == "cuda" else time.process_time
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for batch in drawn[:-1]:
        for name, way in ways.items():
            begun = clock()
            way(target, batch)
            if target.device.type == "cuda":
                torch.cuda.synchronize()
            rates[name].append(sum(map(len, batch)) / (clock() - begun))
    title = f"forward of {options.rows} samples, V {target.vocab_size}, D {target.hidden_size}"
    table = Table("", "tokens/s", "quartiles", "peak MiB", title=title)
    for name, found in rates.items():
        low, _, high = quantiles(found, n=4)
        size = max(peak_bytes(partial(ways[name], target, batch)) for batch in drawn[:3]) / 2**20
        table.add_row(name, f"{median(found):.0f}", f"{low:.0f} to {high:.0f}", f"{size:.1f}")
    return table


def padding(samples: Sequence[Sample], config: RunConfig) -> Table:
    """The share of a forward's tokens that are padding."""

    def share(cut: Iterable[Sequence[Sample]]) -> str:
        sizes = [(len(batch) * max(map(len, batch)), sum(map(len, batch))) for batch in cut]
        return f"{1 - sum(real for _, real in sizes) / sum(padded for padded, _ in sizes):.1%}"

    table = Table("batches", "padding")
    loads = [len(sample) for sample in samples]
    for size in (4, 16, 64, 512):
        steps = epoch_batches(len(samples), size, 0, 0)
        cut = [
            [samples[index] for index in micro]
            for step in steps
            for micro in split_batch(step, loads, 1, 4)[0]
        ]
        table.add_row(f"4 of a step of {size}, by length", share(cut))
    table.add_row("extract, by length", share(batches(samples, config.extract.batch_tokens)))
    return table


def training(config: RunConfig, target: Target, options: argparse.Namespace) -> Table:
    """Steps of recipe=tiny with and without overlap, in turns."""
    rows: dict[bool, list[dict[str, float]]] = {False: [], True: []}
    with tempfile.TemporaryDirectory() as out:
        trainers = {overlap: make_trainer(target, options, Path(out), overlap) for overlap in rows}
        for turn in range(options.turns + 1):
            for overlap, trainer in trainers.items():
                for _ in range(options.steps):
                    begun = time.perf_counter()
                    metrics = trainer.train_step()
                    metrics["seconds"] = time.perf_counter() - begun
                    if turn:  # the first is a warm-up
                        rows[overlap].append(metrics)
    table = Table("training step", "ms", "quartiles", "waits for features", "loss")
    for overlap, steps in rows.items():
        low, middle, high = (1000 * x for x in quantiles([s["seconds"] for s in steps], n=4))
        wait, loss = median(s["feature_wait"] for s in steps), f"{steps[-1]['loss']:.6f}"
        name = "ahead, in a thread" if overlap else "between the drafter's steps"
        table.add_row(name, f"{middle:.0f}", f"{low:.0f} to {high:.0f}", f"{wait:.0%}", loss)
    return table


def make_trainer(target: Target, options: argparse.Namespace, out: Path, overlap: bool) -> Any:
    """A trainer of recipe=tiny on `target`."""
    words = [f"data.path=[{options.answers}]", "regenerate.enabled=false", "data.limit=null"]
    words += [f"features.overlap={overlap}", "features.prefetch=1"]
    config = load_config("tiny", words)
    folder = RunFolder(out / str(overlap))
    folder.path.mkdir()
    engine = open_engine(config.engine, config.training, config.tracking, folder.path)
    data = stages.load_samples(config, target, folder.answers)
    source = feature_source(config, target, data, folder, engine, None)
    kind = drafter_kind(config.drafter.kind)
    torch.manual_seed(config.seed)
    drafter = kind.build(kind.resolve(config.drafter, target))
    return Trainer(config, target, source, drafter, data.samples, [], folder, engine)


if __name__ == "__main__":
    main()
