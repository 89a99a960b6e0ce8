"""Which commands have to run for which figures.

Every job's results lie in a folder of its name, `OUT/runs/NAME`, so figures share what they share.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from deepspec.config.loading import load_config
from deepspec.config.schema import FIGURES, RunConfig
from deepspec.errors import ConfigError
from deepspec.reproduction import estimate
from deepspec.reproduction.jobs import Job, Training, listed

ANSWERS, NGRAM, LOAD = "answers", "ngram", "load"
METHODS = ("sts", "platt")  # in this order: schedulers see confidences through the last

POLICIES = ("plain", "fixed", "threshold", "algorithm1", "async")  # MTP-1 stands beside them


@dataclass(frozen=True)
class Plan:
    """`jobs` in the order of their importance; `figures`: the jobs that each wanted one is made of,
    apart from what these need in turn."""

    out: Path
    config: RunConfig
    jobs: tuple[Job, ...]
    figures: dict[str, tuple[str, ...]]

    def folder(self, name: str) -> Path:
        """Where a job of that name leaves its results."""
        return self.out / "runs" / name


def main_training(config: RunConfig, kind: str, seed: int = 0) -> Training:
    """The drafter of a kind that table 1 compares, and that other figures go on with."""
    layers = 1 if kind in ("eagle3", "mtp") else config.drafter.num_layers
    return Training(kind, layers, 1 if kind == "mtp" else config.reproduce.block_size, seed=seed)


def compared(config: RunConfig) -> dict[str, list[Training]]:
    """By kind, a training a seed: those of table 1 and of the figure positions."""
    kinds, seeds = ("dspark", "dflash", "eagle3", "mtp"), range(config.reproduce.seeds)
    return {kind: [main_training(config, kind, seed) for seed in seeds] for kind in kinds}


def by_depth(config: RunConfig) -> dict[str, list[Training]]:
    """By kind, a training a depth."""
    block, depths = config.reproduce.block_size, config.reproduce.depths
    return {kind: [Training(kind, n, block) for n in depths] for kind in ("dspark", "dflash")}


def by_block(config: RunConfig) -> dict[str, list[Training]]:
    """By sequential head, a training a block size."""
    layers, blocks = config.drafter.num_layers, config.reproduce.blocks
    return {
        head: [Training("dspark", layers, size, head) for size in blocks]
        for head in ("vanilla", "rnn")
    }


def threshold_name(threshold: float) -> str:
    """The job that decodes with drafts verified at this survival probability."""
    return f"threshold-{threshold:g}"


def make_plan(config: RunConfig, words: Sequence[str], out: Path) -> Plan:
    """The jobs for `config.reproduce.figures`. `words`: the recipe= and the overrides that made
    `config`, which the trainings take over. However `out` is written, the jobs are the same."""
    out = out.resolve()
    planner = _Planner(config, words, out)
    needed = {figure: getattr(planner, f"_{figure}")() for figure in FIGURES}
    figures = {name: needed[name] for name in FIGURES if name in config.reproduce.figures}
    return Plan(out, config, tuple(_closure(planner.jobs, figures.values())), figures)


def check_jobs(jobs: Iterable[Job]) -> None:
    """Raises ConfigError where a job would refuse its settings, which may suit some kinds of
    drafter only. Those that go by a run have that of its training."""
    for job in jobs:
        recipe, *words = job.words[1:]
        key, _, name = recipe.partition("=")
        if key != "recipe":
            continue
        try:
            load_config(name, words)
        except ConfigError as error:
            raise ConfigError(f"{job.name}, which has to run too: {error}") from None


def _closure(jobs: dict[str, Job], wanted: Iterable[Sequence[str]]) -> list[Job]:
    """What is wanted and all that it needs: further seeds behind the rest, what is timed last."""
    names: set[str] = set()
    queue = [name for each in wanted for name in each]
    while queue:
        name = queue.pop()
        if name not in names:
            names.add(name)
            queue += jobs[name].needs
    kept = [job for name, job in jobs.items() if name in names]
    return sorted(kept, key=lambda job: (job.alone and bool(job.needs), _seed(job)))


def _seed(job: Job) -> int:
    return int(job.name.rpartition("-seed")[2]) if "-seed" in job.name else 0


class _Planner:
    """Collects jobs, each once; a method a figure gives the names of those that it is made of."""

    def __init__(self, config: RunConfig, words: Sequence[str], out: Path) -> None:
        self.config, self.wanted, self.words, self.out = config, config.reproduce, words, out
        self.jobs: dict[str, Job] = {}
        self._needs: tuple[str, ...] = ()
        self._data: list[str] = []
        limit = f"data.limit={_value(self.wanted.samples)}"
        if config.regenerate.enabled:
            answers = out / "answers.jsonl"
            command = ("regenerate", *words, limit, f"out={answers}")
            self._add(Job(ANSWERS, command, work=estimate.answers(config), alone=True))
            self._needs = (ANSWERS,)
            self._data = [f"data.path={listed([str(answers)])}", "regenerate.enabled=false"]
            limit = "data.limit=null"
        self._data.append(limit)

    def _add(self, job: Job) -> str:
        return self.jobs.setdefault(job.name, job).name

    def _measured(self, temperatures: Sequence[int], prompts: int | None) -> list[str]:
        """Settings of an evaluation that counts and takes no time."""
        return [
            f"evaluation.limit={_value(prompts)}",
            f"evaluation.temperatures={listed(list(temperatures))}",
            "evaluation.baseline_prompts=0",
            f"decoding.batch_size={self.wanted.batch_size}",
        ]

    def _train(self, training: Training) -> str:
        words = [
            *self.words,
            *self._data,
            *training.words,
            f"training.max_steps={self.wanted.steps}",
            "training.epochs=1000",  # as many as the steps take
            *self._measured((0, 1), self.wanted.prompts),
            f"out={self.out / 'runs' / training.name}",
        ]
        work = estimate.training(training, self.config)
        return self._add(Job(training.name, ("train", *words), self._needs, work))

    def _table1(self) -> tuple[str, ...]:
        words = [
            *self.words,
            "drafter.kind=ngram",
            f"drafter.block_size={self.wanted.block_size}",
            *self._measured((0, 1), self.wanted.prompts),
            f"out={self.out / 'runs' / NGRAM}",
        ]
        work = estimate.evaluation(self.config, self.wanted.prompts, 2)
        return (*self._positions(), self._add(Job(NGRAM, ("evaluate", *words), (), work)))

    def _positions(self) -> tuple[str, ...]:
        return tuple(self._train(one) for same in compared(self.config).values() for one in same)

    def _depth(self) -> tuple[str, ...]:
        return tuple(self._train(one) for same in by_depth(self.config).values() for one in same)

    def _blocks(self) -> tuple[str, ...]:
        return tuple(self._train(one) for same in by_block(self.config).values() for one in same)

    def _calibrate(self, method: str) -> str:
        drafter = self._train(main_training(self.config, "dspark"))
        needs = [drafter]
        if method != METHODS[0]:  # both write the calibration beside the drafter
            needs.append(self._calibrate(METHODS[METHODS.index(method) - 1]))
        seeds, prompts = self.wanted.calibration_seeds, self.wanted.calibration_prompts
        name = f"calibrate-{method}"
        words = [
            f"run={self.out / 'runs' / drafter}",
            f"method={method}",
            *self._measured((1,), prompts),
            f"evaluation.seeds={listed(list(range(seeds)))}",
            f"out={self.out / 'runs' / name}",
        ]
        work = estimate.evaluation(self.config, prompts, seeds)
        return self._add(Job(name, ("calibrate", *words), tuple(needs), work))

    def _reliability(self) -> tuple[str, ...]:
        return tuple(self._calibrate(method) for method in METHODS)

    def _thresholds(self) -> tuple[str, ...]:
        drafter = self._train(main_training(self.config, "dspark"))
        fitted = self._calibrate(METHODS[-1])
        names = []
        for threshold in self.wanted.thresholds:
            name = threshold_name(threshold)
            words = [
                f"run={self.out / 'runs' / drafter}",
                "decoding.scheduler=threshold",
                f"decoding.threshold={threshold:g}",
                *self._measured((1,), self.wanted.prompts),
                f"out={self.out / 'runs' / name}",
            ]
            work = estimate.evaluation(self.config, self.wanted.prompts, 1)
            names.append(self._add(Job(name, ("evaluate", *words), (drafter, fitted), work)))
        return tuple(names)

    def _throughput(self) -> tuple[str, ...]:
        drafter, other = (self._train(main_training(self.config, k)) for k in ("dspark", "mtp"))
        fitted = self._calibrate(METHODS[-1])
        runs, loads = self.out / "runs", self.wanted.loads
        words = [
            f"run={runs / drafter}",
            f"against={listed([str(runs / other)])}",
            f"policies=[{','.join(POLICIES)}]",
            f"concurrency=[{','.join(map(str, loads))}]",
            f"seconds={self.wanted.load_seconds:g}",
            f"out={runs / LOAD}",
        ]
        work = estimate.load(len(POLICIES) + 1, self.config)
        needs = (drafter, other, fitted)
        return (self._add(Job(LOAD, ("load", *words), needs, work, alone=True)),)

    def _budget(self) -> tuple[str, ...]:
        return self._throughput()


def _value(value: object) -> str:
    return "null" if value is None else str(value)
