"""Tokens a second, greedy: the verifying decoder against plain decoding and against Transformers.

    OMP_NUM_THREADS=1 python benchmarks/decoding.py runs/tiny
    OMP_NUM_THREADS=1 python benchmarks/decoding.py runs/tiny --batches 16 --verify 2,3,5 --compile

For each batch size a table of

- `plain`: `plain_decode`, one token a forward on our cache, without a drafter;
- `transformers`: its `generate` with a cache, padded on the left where there are several prompts;
- `prompt lookup` and `assistant`: its own assisted generation, which takes one prompt at a time.
  The assistant is made of the target's own first layers, its norm and its head (`--layers`);
- `verifying N`: our decoder with the run's drafter, N drafts of a block verified a round.

All decode the first prompts of each of the run's benchmarks, prefill included, in one process and
by turns: a group of prompts goes through all of them before the next one, in an order that changes
with every group and repeat, so a machine that slows down slows all. Speeds are by wall and by
processor time of this process, which other processes disturb less (with one thread only); ratios
are of processor time (`--clock wall`: of wall time), taken within a repeat. "same": outputs that
equal those of `plain`, token by token.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from deepspec.commands.sources import open_source
from deepspec.commands.stages import open_target
from deepspec.config.schema import RunConfig
from deepspec.data.chat_template import ChatEncoder
from deepspec.decoding import Decoder, DecodeResult, Sampling, plain_decode
from deepspec.drafters.base import Proposer
from deepspec.drafters.registry import open_proposer
from deepspec.evaluation.benchmarks import load_prompts
from deepspec.evaluation.metrics import accepted_length
from deepspec.machine import describe_machine
from deepspec.records import DecodeTrace
from deepspec.targets import Target

GREEDY = Sampling(0.0)
PLAIN, THEIRS, COMPILED = "plain", "transformers", ", compiled"
WARM_UP_TOKENS = 24  # first calls allocate buffers and choose kernels


@dataclass
class Measured:
    """One decoder in one repeat: outputs by prompt, rounds of whole batches (none without a
    drafter), wall and processor seconds."""

    outputs: list[tuple[int, ...]] = field(default_factory=list)
    traces: list[DecodeTrace] = field(default_factory=list)
    rounds: int = 0
    wall: float = 0.0
    cpu: float = 0.0

    @property
    def tokens(self) -> int:
        """New tokens."""
        return sum(len(output) for output in self.outputs)

    def speed(self, clock: str) -> float:
        """Tokens a second."""
        return self.tokens / (self.wall if clock == "wall" else self.cpu)


Prompts = Sequence[list[int]]
Outputs = tuple[list[tuple[int, ...]], list[DecodeTrace]]
Decode = Callable[[Prompts, int], Outputs]


def main() -> None:
    """Decode and print a table a batch size."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="a run folder, a checkpoint, or an export")
    parser.add_argument("--prompts", type=int, default=4, help="of each benchmark")
    parser.add_argument("--skip", default="", help="ids of prompts that are left out, by commas")
    parser.add_argument("--batches", default="1", help="batch sizes, by commas")
    parser.add_argument(
        "--verify", default="", help="drafts verified, by commas; else whole blocks"
    )
    parser.add_argument("--compile", action="store_true", help="also with decoding.compile=true")
    parser.add_argument("--layers", type=int, default=2, help="of the assistant; 0 for none")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=("wall", "cpu"), default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    source = open_source(options.run)
    target = open_target(source.config)
    proposer = partial(open_proposer, source.kind, source.load(target), target)
    lengths = [int(n) for n in options.verify.split(",") if n] or [proposer().block_size]
    prompts = read_prompts(source.config, target, options.prompts, options.skip.split(","))
    limit = source.config.decoding.max_new_tokens
    console = Console()
    for size in (int(number) for number in options.batches.split(",")):
        decoders = ours(target, proposer, size, lengths, compiled=False)
        if options.compile:
            decoders |= ours(target, proposer, size, lengths, compiled=True)
        decoders[THEIRS] = partial(transformers_generate, target)
        if size == 1:
            decoders |= assisted(target, proposer().block_size, options.layers)
        groups = [prompts[first : first + size] for first in range(0, len(prompts), size)]
        for name, decode in decoders.items():  # what is compiled is so for every length
            decode(groups[-1], limit if COMPILED in name else WARM_UP_TOKENS)
        repeats = [measured(decoders, groups, limit, number) for number in range(options.repeats)]
        console.print(summary(repeats, options.clock, f"{len(prompts)} prompts, batch {size}"))
    machine = describe_machine()
    print(
        f"{machine['processor']}, {options.threads} threads, torch {machine['torch']}, "
        f"transformers {machine['transformers']}; {options.repeats} repeats"
    )


def read_prompts(
    config: RunConfig, target: Target, count: int, skip: Sequence[str]
) -> list[list[int]]:
    """Token ids of the first `count` prompts of each of the run's benchmarks but those of ids
    `skip`, neighbours in length together."""
    data = config.data
    encoder = ChatEncoder.of(data, target.tokenizer)
    prompts = [
        encoder.prompt(conversation.messages, conversation.tools)
        for name in config.evaluation.benchmarks
        for conversation in load_prompts(name, count, data.fields)[1]
        if conversation.id not in skip
    ]
    return sorted(prompts, key=len)


def ours(
    target: Target,
    proposer: Callable[[], Proposer],
    size: int,
    lengths: Sequence[int],
    compiled: bool,
) -> dict[str, Decode]:
    """Plain and verifying decoding at batch `size`."""

    def outputs(result: DecodeResult) -> Outputs:
        return [completion.tokens for completion in result.completions], result.traces

    def plain(prompts: Prompts, limit: int) -> Outputs:
        return outputs(
            plain_decode(target, prompts, GREEDY, limit, batch_size=size, compiled=compiled)
        )

    def verifying(length: int) -> Decode:
        drafting = proposer()
        drafting.block_size = length  # what is not verified is not drafted either
        decoder = Decoder(target, drafting, size, compiled=compiled)
        return lambda prompts, limit: outputs(decoder.generate(prompts, GREEDY, limit))

    how = COMPILED if compiled else ""
    drafting = {f"verifying {length}{how}": verifying(length) for length in lengths}
    return {f"{PLAIN}{how}": plain, **drafting}


def transformers_generate(target: Target, prompts: Prompts, limit: int, **options: Any) -> Outputs:
    """Transformers' `generate`, greedy, on its own cache; no traces."""
    stop, width = target.stop_token_ids, max(map(len, prompts))
    ids = torch.tensor([[stop[0]] * (width - len(p)) + p for p in prompts], device=target.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    with torch.inference_mode():
        generated = target.model.generate(
            ids,
            attention_mask=mask.to(target.device),
            do_sample=False,
            use_cache=True,
            max_new_tokens=limit,
            eos_token_id=stop,
            pad_token_id=stop[0],
            **options,
        )
    return [ended(row, stop) for row in generated[:, width:].tolist()], []


def ended(tokens: list[int], stop: Sequence[int]) -> tuple[int, ...]:
    """`tokens` without the padding behind the first stop token."""
    ends = [place for place, token in enumerate(tokens, start=1) if token in stop]
    return tuple(tokens[: ends[0]] if ends else tokens)


def assisted(target: Target, drafts: int, layers: int) -> dict[str, Decode]:
    """Transformers' assisted generation, with `drafts` of prompt lookup, and an assistant of the
    target's own first `layers` (none for 0)."""
    lookup = partial(transformers_generate, target, prompt_lookup_num_tokens=drafts)
    if not layers:
        return {"prompt lookup": lookup}
    assistant = copy.copy(target.model)
    assistant._modules = dict(target.model._modules)
    assistant.config = copy.deepcopy(target.model.config)
    assistant.config.num_hidden_layers = layers
    assistant.generation_config = copy.deepcopy(target.model.generation_config)
    backbone = copy.copy(target.backbone)
    backbone._modules = dict(target.backbone._modules)
    backbone.config = assistant.config
    backbone.layers = nn.ModuleList(target.backbone.layers[:layers])
    setattr(assistant, target.model.base_model_prefix, backbone)
    return {
        "prompt lookup": lookup,
        f"assistant, {layers} layers": partial(
            transformers_generate, target, assistant_model=assistant
        ),
    }


def measured(
    decoders: dict[str, Decode], groups: Sequence[Prompts], limit: int, repeat: int
) -> dict[str, Measured]:
    """Every group through every decoder once."""
    found = {name: Measured() for name in decoders}
    for number, group in enumerate(groups, start=repeat):
        for name in turned(list(decoders), number):
            begun = time.perf_counter(), time.process_time()
            outputs, traces = decoders[name](group, limit)
            found[name].wall += time.perf_counter() - begun[0]
            found[name].cpu += time.process_time() - begun[1]
            found[name].outputs += outputs
            found[name].traces += traces
            found[name].rounds += len({trace.round for trace in traces})
    return found


def turned(names: list[str], by: int) -> list[str]:
    """`names`, begun `by` places later."""
    first = by % len(names)
    return names[first:] + names[:first]


def summary(repeats: Sequence[dict[str, Measured]], clock: str, title: str) -> Table:
    """A row a decoder: median speeds, ratios with their range, accepted length, agreement."""
    table = Table(title=f"{title}, greedy; ratios of {clock} time")
    columns = ("", "tokens/s wall", "tokens/s cpu", "over plain", "over transformers")
    for column in (*columns, "rounds/s", "accepted", "same"):
        table.add_column(column, justify="right" if column else "left")
    expected = repeats[0][PLAIN].outputs
    for name in repeats[0]:
        own = [repeat[name] for repeat in repeats]
        ratios = [
            spread([r[name].speed(clock) / r[baseline].speed(clock) for r in repeats])
            for baseline in (PLAIN, THEIRS)
        ]
        numerator, steps = accepted_length(own[0].traces)
        seconds = median([m.wall if clock == "wall" else m.cpu for m in own])
        table.add_row(
            name,
            f"{median([m.speed('wall') for m in own]):.0f}",
            f"{median([m.speed('cpu') for m in own]):.0f}",
            *ratios,
            f"{own[0].rounds / seconds:.0f}" if steps else "",
            f"{numerator / steps:.2f}" if steps else "",
            f"{sum(a == b for a, b in zip(own[0].outputs, expected, strict=True))}/{len(expected)}",
        )
    return table


def spread(ratios: Sequence[float]) -> str:
    """Median and range."""
    return f"{median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


if __name__ == "__main__":
    main()
