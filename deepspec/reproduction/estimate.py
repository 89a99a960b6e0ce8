"""How long jobs take: seconds measured on one machine, scaled by a short measurement on this one.

An estimate and no more. The seconds are processor time with the recipe tiny, a thread a job, on two
cores of an AMD EPYC (AVX2) that had other work too; `probe` took what it says there then.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Sequence

from deepspec.config.schema import RunConfig
from deepspec.reproduction.jobs import Job, Training

START = 12.0  # imports, the target, the answers' tokens, export and report
# seconds of a step: on its own, for each decoder layer, for each draft of a block
STEP = {
    "dspark": (0.0, 0.036, 0.033),
    "dflash": (0.0, 0.025, 0.034),
    "eagle3": (0.0, 0.036, 0.038),
    "mtp": (0.08, 0.036, 0.037),
}
RNN = 0.005  # more for each draft, with the rnn head
PROMPT = 0.25  # seconds that a prompt is decoded, 16 at a time
ANSWER = 0.035  # seconds that an answer takes, 256 at a time
PROFILE = 90.0  # seconds that steps a second by tokens take to measure
PROMPTS, DOMAINS, ANSWERS = 100, 3, 3598  # of the recipe tiny
PROBE = 0.33  # seconds that `probe` takes there


def training(shape: Training, config: RunConfig) -> float:
    """Seconds of a training and its evaluation."""
    base, layer, draft = STEP[shape.kind]
    if shape.head == "rnn":
        draft += RNN
    step = base + layer * shape.layers + draft * shape.block
    decoding = evaluation(config, config.reproduce.prompts, 2) - START
    return START + config.reproduce.steps * step + decoding


def evaluation(config: RunConfig, prompts: int | None, times: int) -> float:
    """Seconds of decoding so many prompts (None: all) of every benchmark, so many times."""
    return START + times * DOMAINS * (prompts or PROMPTS) * PROMPT


def answers(config: RunConfig) -> float:
    """Seconds of answering the training's prompts."""
    return START + (config.reproduce.samples or ANSWERS) * ANSWER


def load(contenders: int, config: RunConfig) -> float:
    """Seconds of a load test of so many policies, and of the table that it measures first."""
    return (
        START + PROFILE + contenders * len(config.reproduce.loads) * config.reproduce.load_seconds
    )


def probe() -> float:
    """Seconds of arithmetic such as a training step's, on one thread: the best of several."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    hidden, head = torch.randn(1024, 192), torch.randn(192, 4096)
    seconds = []
    for _ in range(5):
        begun = time.perf_counter()
        for _ in range(4):
            probabilities = torch.softmax(hidden @ head, dim=-1)
            _ = probabilities @ head.T, hidden.T @ probabilities
        seconds.append(time.perf_counter() - begun)
    torch.set_num_threads(threads)
    return min(seconds)


def makespan(jobs: Sequence[Job], at_once: int) -> float:
    """Seconds until all are done, `at_once` at a time in their order, those alone by themselves."""
    workers = [0.0] * at_once
    for job in jobs:
        if job.alone:
            workers = [max(workers) + job.work] * at_once
        else:
            heapq.heapify(workers)
            heapq.heapreplace(workers, workers[0] + job.work)
    return max(workers)
