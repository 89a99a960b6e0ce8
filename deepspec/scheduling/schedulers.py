"""How many drafts of each request to verify (dspark.md, "Confidence scheduling").

A scheduler gets a round's prefix survivals and gives a length a row. What keeps decoding lossless:
whether draft j is admitted must not depend on token j itself. Confidence c_j is made from the
tokens before j; c_{j+1} and later ones have seen it. So no rule here looks, on its way to deciding
about j, at any later draft of that row. Legend: R rows, K block size, B tokens verified in a step.

A draft that leaves the throughput the same is not admitted: it would take room in the cache and
bring nothing. Throughputs within `TIE` of each other count as the same, so that the order in which
a sum is rounded does not decide.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from deepspec.config.schema import DecodingConfig
from deepspec.errors import ConfigError
from deepspec.records import Proposal
from deepspec.scheduling.calibration import Bools, Floats, Scaling, calibrated, survival
from deepspec.scheduling.drafting import DraftingPays
from deepspec.scheduling.throughput import Throughput, read_throughput

Ints = NDArray[np.int64]
Policy = Callable[[Floats, Ints], Ints]
"""(survival [R, K], limits [R]) -> lengths [R], each at most its limit."""
TIE = 1e-9  # relative; the rounding of fp64 is far below it, what a table can measure far above


def rises(raised: ArrayLike, theta: ArrayLike) -> Bools:
    """Whether the throughput `raised` is above `theta` by more than a tie."""
    return np.asarray(raised) > np.asarray(theta) * (1 + TIE)


class FixedLength:
    """The same length for every row; it looks at no survival."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __call__(self, survival: Floats, limits: Ints) -> Ints:
        """See `Policy`."""
        return np.minimum(limits, self._length)


class Threshold:
    """Every draft whose survival is at least `least`."""

    def __init__(self, least: float) -> None:
        self._least = least

    def __call__(self, survival: Floats, limits: Ints) -> Ints:
        """See `Policy`. Survival never rises along a row, so what it keeps is a prefix."""
        return np.minimum(limits, (survival >= self._least).sum(axis=1))


class Algorithm1:
    """The paper's algorithm 1: admit by descending survival while the throughput rises.

    Theta = tau * SPS(B): tokens a step, tau = R + the admitted survivals, times steps a second at
    B = R + admitted tokens. It stops at the first admission that does not raise Theta (`rises`): to
    look further would be to let the drafts behind j decide about j.
    """

    def __init__(self, throughput: Throughput) -> None:
        self.throughput = throughput
        self._theta = _Theta(throughput)

    def __call__(self, survival: Floats, limits: Ints) -> Ints:
        """See `Policy`."""
        rows, values = _ranked(survival, limits)
        theta = self._theta(values, len(limits))
        raised = rises(theta[1:], theta[:-1])
        admitted = len(raised) if raised.all() else int(raised.argmin())
        return np.bincount(rows[:admitted], minlength=len(limits))


class Asynchronous:
    """The paper's variant for engines that launch a step before the last one's outcome is known.

    How many drafts to verify, all rows together, is what would have been best two rounds ago, by an
    unconstrained search, the fewest of equals; which ones, is this round's rank. Until two rounds
    of a batch have been seen, everything is verified.
    """

    def __init__(self, throughput: Throughput) -> None:
        self.throughput = throughput
        self._theta = _Theta(throughput)
        self._budgets: deque[int] = deque(maxlen=2)

    def start(self) -> None:
        """A new batch: budgets of the last one were for its rows."""
        self._budgets.clear()

    def __call__(self, survival: Floats, limits: Ints) -> Ints:
        """See `Policy`."""
        rows, values = _ranked(survival, limits)
        budget = self._budgets[0] if len(self._budgets) == 2 else len(rows)
        theta = self._theta(values, len(limits))
        self._budgets.append(int(rises(theta.max(), theta).argmin()))
        return np.bincount(rows[:budget], minlength=len(limits))


class ConfidenceSchedule:
    """A policy as the decoder calls it: on a proposal's confidences, calibrated.

    `pays` is told of them, for later rounds.
    """

    def __init__(
        self, policy: Policy, scaling: Scaling | None = None, pays: DraftingPays | None = None
    ) -> None:
        self._policy = policy
        self._scaling = scaling
        self.pays = pays

    def start(self) -> None:
        """A new batch of the decoder."""
        if isinstance(self._policy, Asynchronous):
            self._policy.start()

    def __call__(self, proposal: Proposal, limits: Sequence[int]) -> list[int]:
        """Drafts of each row to verify, of at most `limits` [R].

        Raises ConfigError where the drafter gives no confidences.
        """
        if not any(limits):
            return list(limits)
        if proposal.confidence is None:
            raise ConfigError(
                "decoding.scheduler needs a drafter with a confidence head (drafter.confidence_head"
                "=true when it was trained); set decoding.scheduler=fixed, or none"
            )
        confidence = proposal.confidence.double().cpu().numpy()
        chances = survival(calibrated(confidence, self._scaling))
        if self.pays is not None:
            self.pays.saw(chances)
        return self._policy(chances, np.asarray(limits)).tolist()


def open_policy(config: DecodingConfig, table: Throughput | None = None) -> Policy | None:
    """The policy that `config.scheduler` names, new; None verifies all.

    `table` stands for the file of `config.throughput`; raises ConfigError where that is asked and
    cannot be used.
    """
    match config.scheduler:
        case "none":
            return None
        case "fixed":
            return FixedLength(int(config.verify_length or 0))
        case "threshold":
            return Threshold(config.threshold)
    table = table or read_throughput(str(config.throughput))
    return Algorithm1(table) if config.scheduler == "algorithm1" else Asynchronous(table)


def open_schedule(
    config: DecodingConfig, scaling: Scaling | None, table: Throughput | None = None
) -> Callable[[Proposal, Sequence[int]], Sequence[int]] | None:
    """The schedule of `open_policy`, as the decoder takes it.

    `scaling` of confidences; None takes them as the drafter gives them.
    """
    policy = open_policy(config, table)
    if isinstance(policy, FixedLength):
        fixed, nothing = policy, np.empty((0, 0))
        return lambda proposal, limits: fixed(nothing, np.asarray(limits)).tolist()
    return None if policy is None else ConfidenceSchedule(policy, scaling, open_pays(policy))


def open_pays(policy: Policy | None) -> DraftingPays | None:
    """Whether drafting pays, new, for a policy whose table knows what it costs; else None."""
    if isinstance(policy, Algorithm1 | Asynchronous) and policy.throughput.knows_drafting:
        return DraftingPays(policy.throughput)
    return None


def _ranked(survival: Floats, limits: Ints) -> tuple[Ints, Floats]:
    """All drafts within the limits by descending survival: their rows and their survivals.

    Equals stay in the order of rows, and of positions inside a row: no draft comes before an
    earlier one of its row, and no later one's value moves it.
    """
    within = np.arange(survival.shape[1]) < limits[:, None]
    values = survival[within]
    order = np.argsort(-values, kind="stable")
    return np.repeat(np.arange(len(limits)), limits)[order], values[order]


class _Theta:
    """The throughput model, with seconds tabulated: a round is too short for an interpolation."""

    def __init__(self, throughput: Throughput) -> None:
        self._throughput = throughput
        self._seconds = self._propose = np.empty(0)

    def __call__(self, values: Floats, rows: int) -> Floats:
        """Theta [n + 1] behind 0 to n admissions of survivals `values` [n], best first."""
        last = rows + len(values)
        if len(self._seconds) <= last:
            counts = np.arange(2 * last + 1)
            table = self._throughput
            self._seconds = table.seconds(counts) + table.observe_seconds(counts)
            self._propose = table.propose_seconds(counts)
        tokens = np.cumsum(np.concatenate(([rows], values)))
        return tokens / (self._seconds[rows : last + 1] + self._propose[rows])
