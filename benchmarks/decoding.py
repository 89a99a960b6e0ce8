"""Tokens a second at batch 1, temperature 0: the verifying decoder against two cached baselines.

    python benchmarks/decoding.py runs/tiny
    python benchmarks/decoding.py runs/tiny --prompts 10 --repeats 5 --threads 1

The baselines are `plain_decode` (same cache and sampling, no drafter) and `generate` of
transformers. All three decode the first prompts of each of the run's benchmarks, prefill included,
in one process, by turns: a prompt goes through all three before the next one, in an order that
changes with every prompt and repeat, so a machine that slows down slows all of them. Ratios are
taken within a repeat, over plain_decode. `--clock cpu` counts the processor time of this process
instead of wall time, which other processes disturb less; use it with one thread only.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

from deepspec.commands.sources import open_source
from deepspec.commands.stages import open_target
from deepspec.config.schema import RunConfig
from deepspec.data.chat_template import ChatEncoder
from deepspec.decoding import Decoder, Sampling, plain_decode
from deepspec.drafters.registry import drafter_kind
from deepspec.evaluation.benchmarks import load_prompts
from deepspec.evaluation.metrics import accepted_length
from deepspec.machine import describe_machine
from deepspec.records import DecodeTrace
from deepspec.targets import Target

GREEDY = Sampling(0.0)
PLAIN = "plain_decode"
WARM_UP_TOKENS = 16  # first calls allocate buffers and choose kernels


@dataclass(frozen=True)
class Output:
    """New tokens of one prompt, and the rounds they took (none without a drafter)."""

    tokens: tuple[int, ...]
    traces: list[DecodeTrace]


Decode = Callable[[list[int], int], Output]


def main() -> None:
    """Decode and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="a run folder, a checkpoint, or an export")
    parser.add_argument("--prompts", type=int, default=4, help="of each benchmark")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    options = parser.parse_args()
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    torch.set_num_threads(options.threads)

    source = open_source(options.run)
    target = open_target(source.config)
    drafter = source.load(target).to(target.device)
    decoder = Decoder(target, drafter_kind(source.kind).proposer(drafter, target))
    decoders: dict[str, Decode] = {
        PLAIN: plain(target),
        "transformers": transformers_generate(target),
        "verifying": verifying(decoder),
    }
    prompts = read_prompts(source.config, target, options.prompts)
    for decode in decoders.values():
        decode(prompts[0], WARM_UP_TOKENS)

    limit = source.config.decoding.max_new_tokens
    speeds: dict[str, list[float]] = {name: [] for name in decoders}
    for repeat in range(options.repeats):
        outputs: dict[str, list[Output]] = {name: [] for name in decoders}
        seconds = dict.fromkeys(decoders, 0.0)
        for number, prompt in enumerate(prompts, start=repeat):
            for name in turned(list(decoders), number):
                begun = clock()
                outputs[name].append(decoders[name](prompt, limit))
                seconds[name] += clock() - begun
        for name in decoders:
            speeds[name].append(sum(len(out.tokens) for out in outputs[name]) / seconds[name])
    Console().print(summary(speeds, outputs, len(prompts)))
    machine = describe_machine()
    print(f"{machine['processor']}, {options.threads} threads, torch {machine['torch']}")


def turned(names: list[str], by: int) -> list[str]:
    """`names`, begun `by` places later."""
    first = by % len(names)
    return names[first:] + names[:first]


def read_prompts(config: RunConfig, target: Target, count: int) -> list[list[int]]:
    """Token ids of the first `count` prompts of each of the run's benchmarks."""
    data = config.data
    encoder = ChatEncoder(target.tokenizer, data.max_length, data.thinking, data.system_prompt)
    return [
        encoder.prompt(conversation.messages)
        for name in config.evaluation.benchmarks
        for conversation in load_prompts(name, count, data.fields)[1]
    ]


def verifying(decoder: Decoder) -> Decode:
    """Drafts, verified by the target."""

    def decode(prompt: list[int], limit: int) -> Output:
        result = decoder.generate([prompt], GREEDY, limit)
        return Output(result.completions[0].tokens, result.traces)

    return decode


def plain(target: Target) -> Decode:
    """One token a forward, in our own loop."""

    def decode(prompt: list[int], limit: int) -> Output:
        return Output(plain_decode(target, [prompt], GREEDY, limit).completions[0].tokens, [])

    return decode


def transformers_generate(target: Target) -> Decode:
    """One token a forward, in transformers' loop, on its own cache."""

    def decode(prompt: list[int], limit: int) -> Output:
        ids = torch.tensor([prompt], device=target.device)
        with torch.inference_mode():
            generated = target.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                use_cache=True,
                max_new_tokens=limit,
                eos_token_id=target.stop_token_ids,
                pad_token_id=target.stop_token_ids[0],
            )
        return Output(tuple(generated[0, len(prompt) :].tolist()), [])

    return decode


def summary(
    speeds: dict[str, list[float]], outputs: dict[str, list[Output]], prompts: int
) -> Table:
    """A row a decoder: median and range of its speed, ratio over plain_decode, agreement."""
    baseline, expected = speeds[PLAIN], outputs[PLAIN]
    table = Table(title=f"{prompts} prompts, batch 1, greedy, {len(baseline)} repeats")
    for column in ("", "tokens/s", "range", "ratio", "range", "accepted", "same"):
        table.add_column(column, justify="right" if column else "left")
    for name, found in speeds.items():
        ratios = [ours / theirs for ours, theirs in zip(found, baseline, strict=True)]
        numerator, rounds = accepted_length([t for out in outputs[name] for t in out.traces])
        same = sum(
            ours.tokens == theirs.tokens
            for ours, theirs in zip(outputs[name], expected, strict=True)
        )
        table.add_row(
            name,
            f"{median(found):.0f}",
            f"{min(found):.0f}-{max(found):.0f}",
            f"{median(ratios):.2f}",
            f"{min(ratios):.2f}-{max(ratios):.2f}",
            f"{numerator / rounds:.2f}" if rounds else "1",
            f"{same}/{prompts}",
        )
    return table


if __name__ == "__main__":
    main()
