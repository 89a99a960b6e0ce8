"""Decode benchmarks with a drafter, plainly and by prompt lookup; give numbers and traces.

All decoders run in the same process on the same prompts, so tokens a second are compared fairly and
outputs token by token.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean

from deepspec.atomic import atomic_file
from deepspec.config.schema import RunConfig
from deepspec.data.chat_template import ChatEncoder
from deepspec.decoding import Decoder, DecodeResult, Sampling, plain_decode
from deepspec.decoding.decoder import Schedule
from deepspec.decoding.exactness import first_difference
from deepspec.drafters.base import Proposer
from deepspec.drafters.ngram import NgramConfig, NgramProposer
from deepspec.errors import DataError, TemplateRefusal
from deepspec.evaluation import metrics
from deepspec.evaluation.benchmarks import check_benchmarks, load_prompts
from deepspec.evaluation.results import (
    Average,
    Baseline,
    BenchmarkResult,
    Lookup,
    mean_over_seeds,
)
from deepspec.progress import Progress
from deepspec.records import DecodeTrace
from deepspec.scheduling.calibration_file import Calibration
from deepspec.scheduling.schedulers import open_policy, open_schedule
from deepspec.targets import Target

WARM_UP_TOKENS = 16  # first calls allocate buffers and choose kernels


@dataclass(frozen=True)
class Prompt:
    """A tokenised prompt; `request` names it in traces and seeds its random draws."""

    request: str
    tokens: list[int]


@dataclass
class Evaluation:
    """Results; every decoding round as (benchmark, temperature, seed, trace); rows left out."""

    results: list[BenchmarkResult] = field(default_factory=list)
    traces: list[tuple[str, float, int, DecodeTrace]] = field(default_factory=list)
    skipped: dict[str, dict[str, int]] = field(default_factory=dict)

    def save_traces(self, path: Path) -> None:
        """One JSON line a round: benchmark, temperature, seed, and the fields of DecodeTrace."""
        with atomic_file(path) as unfinished, unfinished.open("w", encoding="utf-8") as stream:
            for benchmark, temperature, seed, trace in self.traces:
                place = {"benchmark": benchmark, "temperature": temperature, "seed": seed}
                stream.write(json.dumps({**place, **asdict(trace)}) + "\n")


def evaluate(
    config: RunConfig,
    target: Target,
    proposer: Proposer,
    calibration: Calibration | None = None,
    *,
    show: bool = True,
) -> Evaluation:
    """Every benchmark of `config.evaluation` at every temperature and seed.

    The scheduler of `config.decoding` sees confidences as `calibration` makes them; None leaves
    them as the drafter gives them. Raises ConfigError for no benchmark or an unknown one, a
    throughput table that cannot be used, and a temperature that `calibration` has no fit for;
    DataError for a benchmark without a usable prompt.
    """
    check_benchmarks(config.evaluation.benchmarks)
    decoding = config.decoding
    table = getattr(open_policy(decoding), "throughput", None)  # read once, before any decoding
    scalings = {
        temperature: None
        if calibration is None
        else calibration.scaling(temperature, decoding.top_p, decoding.top_k)
        for temperature in config.evaluation.temperatures
    }
    evaluation = Evaluation()
    benchmarks: dict[str, list[Prompt]] = {}
    for name in config.evaluation.benchmarks:
        short, prompts, skips = load_benchmark(name, config, target)
        benchmarks[short] = prompts
        if skips:
            evaluation.skipped[f"benchmark {short}"] = skips
    seeds = config.evaluation.seeds
    runs = [
        (short, temperature, seed)
        for short in benchmarks
        for temperature in config.evaluation.temperatures
        for seed in (seeds if temperature else seeds[:1])  # greedy output has no seed
    ]
    total = sum(len(benchmarks[short]) for short, _, _ in runs)
    with Progress("evaluate", total, "prompts", show=show) as progress:
        for short, temperature, seed in runs:
            schedule = partial(open_schedule, decoding, scalings[temperature], table)
            run = _Run(config, target, proposer, schedule, temperature, seed, progress)
            # one seed is enough for the speed-up and the comparison with plain decoding
            compared = config.evaluation.baseline_prompts if seed == seeds[0] else 0
            result, traces = run.benchmark(short, benchmarks[short], compared)
            evaluation.results.append(result)
            evaluation.traces += [(short, temperature, seed, trace) for trace in traces]
    return evaluation


def load_benchmark(
    name: str, config: RunConfig, target: Target
) -> tuple[str, list[Prompt], dict[str, int]]:
    """(short name, tokenised prompts, rows left out by reason) of one benchmark."""
    data, context = config.data, target.context_length
    encoder = ChatEncoder.of(data, target.tokenizer)
    short, conversations, skips = load_prompts(name, config.evaluation.limit, data.fields)
    prompts = []
    for conversation in conversations:
        try:
            tokens = encoder.prompt(conversation.messages, conversation.tools)
        except TemplateRefusal as refusal:
            skips[refusal.reason] += 1
            continue
        if len(tokens) > data.max_length:
            skips["prompt longer than data.max_length"] += 1
        elif context is not None and len(tokens) >= context:
            skips[f"prompt leaves no room for an answer in the target's context, {context}"] += 1
        else:
            prompts.append(Prompt(f"{short}/{conversation.id}", tokens))
    if not prompts:
        raise DataError(
            f"evaluation.benchmarks: {name} has no usable prompt ({dict(skips)}); raise "
            "data.max_length, or name another one"
        )
    return short, prompts, dict(skips)


def average(results: Sequence[BenchmarkResult]) -> list[Average]:
    """Mean over benchmarks, each first averaged over its seeds, at every temperature."""
    averages = []
    by_temperature: dict[float, list[BenchmarkResult]] = {}
    for result in mean_over_seeds(results):
        by_temperature.setdefault(result.temperature, []).append(result)
    for temperature, same in by_temperature.items():
        speedups = [result.baseline.speedup for result in same if result.baseline]
        averages.append(
            Average(
                temperature=temperature,
                accepted_length=fmean(result.accepted_length for result in same),
                tokens_per_second=fmean(result.tokens_per_second for result in same),
                speedup=fmean(speedups) if speedups else None,
            )
        )
    return averages


class _Run:
    """All decoders at one temperature and seed. `schedule` opens a new one each time: what a
    schedule has seen of one benchmark, or of the warm-up, is not carried into another."""

    def __init__(
        self,
        config: RunConfig,
        target: Target,
        proposer: Proposer,
        schedule: Callable[[], Schedule | None],
        temperature: float,
        seed: int,
        progress: Progress,
    ) -> None:
        decoding = config.decoding
        self.target, self.seed, self.progress = target, seed, progress
        self.block_size, self.batch_size = proposer.block_size, decoding.batch_size
        self.limit, self.stop = decoding.max_new_tokens, decoding.stop_token_ids
        self.compiled = decoding.compile
        self.sampling = Sampling(temperature)
        if temperature:
            self.sampling = Sampling(temperature, decoding.top_p, decoding.top_k)
        self.proposer, self.schedule = proposer, schedule
        self.lookup: Decoder | None = None
        if config.evaluation.ngram and not isinstance(proposer, NgramProposer):
            longest, shortest = config.drafter.ngram_max, config.drafter.ngram_min
            wanted = NgramConfig(self.block_size, longest, shortest)
            lookup = NgramProposer(wanted)
            self.lookup = Decoder(
                target, lookup, self.batch_size, self.stop, compiled=self.compiled
            )

    def benchmark(
        self, name: str, prompts: list[Prompt], compared: int
    ) -> tuple[BenchmarkResult, list[DecodeTrace]]:
        """Draft for all `prompts`; decode the first `compared` plainly and by lookup too."""
        self._draft(self._open_decoder(), prompts[: self.batch_size], WARM_UP_TOKENS)
        draft = partial(self._draft, self._open_decoder())
        first = self._decode(draft, prompts[:compared], self.progress)
        baseline = lookup = None
        if compared:
            self._plain(prompts[: self.batch_size], WARM_UP_TOKENS)
            plain = self._decode(self._plain, prompts[:compared], None)
            baseline = self._compare(prompts[:compared], plain, first)
            lookup = self._look_up(prompts[:compared], first)
        rest = self._decode(draft, prompts[compared:], self.progress)

        traces = first.traces + rest.traces
        tokens, seconds = first.tokens + rest.tokens, first.seconds + rest.seconds
        ratios = [metrics.accepted_length, metrics.acceptance_rate, metrics.verify_rate]
        length, rate, verified = (metrics.divide(ratio(traces)) or 0.0 for ratio in ratios)
        conditional = metrics.conditional_acceptance(traces, self.block_size)
        survival = metrics.prefix_survival(traces, self.block_size)
        result = BenchmarkResult(
            benchmark=name,
            temperature=self.sampling.temperature,
            seed=self.seed,
            prompts=len(prompts),
            tokens=tokens,
            rounds=len(traces),
            seconds=seconds,
            tokens_per_second=tokens / seconds,
            accepted_length=length,
            acceptance_rate=rate,
            verify_rate=verified,
            conditional_acceptance=[metrics.divide(pair) for pair in conditional],
            prefix_survival=[metrics.divide(pair) for pair in survival],
            baseline=baseline,
            lookup=lookup,
        )
        return result, traces

    def _open_decoder(self) -> Decoder:
        return Decoder(
            self.target,
            self.proposer,
            self.batch_size,
            self.stop,
            self.schedule(),
            self.compiled,
        )

    def _draft(self, decoder: Decoder, prompts: Sequence[Prompt], limit: int) -> DecodeResult:
        names = [prompt.request for prompt in prompts]
        tokens = [prompt.tokens for prompt in prompts]
        return decoder.generate(tokens, self.sampling, limit, self.seed, names)

    def _plain(self, prompts: Sequence[Prompt], limit: int) -> DecodeResult:
        names = [prompt.request for prompt in prompts]
        tokens = [prompt.tokens for prompt in prompts]
        return plain_decode(
            self.target,
            tokens,
            self.sampling,
            limit,
            self.seed,
            names,
            self.batch_size,
            self.stop,
            self.compiled,
        )

    def _decode(
        self,
        decode: Callable[[Sequence[Prompt], int], DecodeResult],
        prompts: Sequence[Prompt],
        progress: Progress | None,
    ) -> DecodeResult:
        """A batch at a time, neighbours in length together; completions in order of `prompts`."""
        whole = DecodeResult([], [], 0.0)
        ordered = sorted(prompts, key=lambda prompt: len(prompt.tokens))
        for start in range(0, len(ordered), self.batch_size):
            group = ordered[start : start + self.batch_size]
            part = decode(group, self.limit)
            whole = DecodeResult(
                whole.completions + part.completions,
                whole.traces + part.traces,
                whole.seconds + part.seconds,
            )
            if progress is not None:
                progress.advance(len(group))
        found = {completion.request: completion for completion in whole.completions}
        return DecodeResult([found[p.request] for p in prompts], whole.traces, whole.seconds)

    def _look_up(self, prompts: Sequence[Prompt], drafted: DecodeResult) -> Lookup | None:
        """What drafting gives that costs no training."""
        if self.lookup is None:
            return None
        decode = partial(self._draft, self.lookup)
        decode(prompts[: self.batch_size], WARM_UP_TOKENS)
        found = self._decode(decode, prompts, None)
        lengths = [metrics.accepted_length(result.traces) for result in (found, drafted)]
        return Lookup(
            prompts=len(prompts),
            accepted_length=metrics.divide(lengths[0]) or 0.0,
            tokens_per_second=found.tokens / found.seconds,
            drafter_accepted_length=metrics.divide(lengths[1]) or 0.0,
        )

    def _compare(
        self, prompts: Sequence[Prompt], plain: DecodeResult, drafted: DecodeResult
    ) -> Baseline:
        """Speeds; at temperature 0 also whether the tokens are the same, and if not, why."""
        plain_speed = plain.tokens / plain.seconds
        speeds = {
            "prompts": len(prompts),
            "tokens_per_second": plain_speed,
            "speedup": drafted.tokens / drafted.seconds / plain_speed,
        }
        if not self.sampling.greedy:
            return Baseline(**speeds)  # type: ignore[arg-type]
        outputs = zip(prompts, plain.completions, drafted.completions, strict=True)
        differences = [
            difference
            for prompt, expected, found in outputs
            if (
                difference := first_difference(
                    self.target, prompt.request, prompt.tokens, expected.tokens, found.tokens
                )
            )
        ]
        gaps = [difference.gap for difference in differences if math.isfinite(difference.gap)]
        explained = sum(difference.explained for difference in differences)
        return Baseline(
            **speeds,  # type: ignore[arg-type]
            identical=len(prompts) - len(differences),
            explained=explained,
            unexplained=len(differences) - explained,
            largest_gap=max(gaps, default=None if differences else 0.0),
        )
