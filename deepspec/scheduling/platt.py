"""Platt scaling of confidences: a temperature and a shift a position, by logistic regression.

Temperatures alone leave a confidence of one half where it is. Where a drafter believes too much, or
too little, on the whole, that is not enough: its confidences were learned at temperature 1, and
greedy decoding accepts by another rule. Apart from `calibration`, because decoding needs that one
and not scikit-learn.
"""

from __future__ import annotations

import numpy as np

from deepspec.scheduling.calibration import Rounds, Scaling, logit

STEEPEST = 16.0  # temperatures are kept within 1/16 and 16, as those of the grid of `fit_sts`


def fit_platt(rounds: Rounds) -> Scaling:
    """The most likely temperature and shift a position, by the rounds whose earlier drafts survived
    (what c_j speaks of); none where these know of one outcome only."""
    from sklearn.linear_model import LogisticRegression  # a second, which others need not wait

    temperatures, shifts = [], []
    alive = np.ones(len(rounds), dtype=bool)
    for position in range(rounds.confidence.shape[1]):
        reached = alive & rounds.known[:, position]
        happened = rounds.survived[reached, position]
        slope, shift = 1.0, 0.0
        if len(set(happened.tolist())) == 2:
            odds = logit(rounds.confidence[reached, position])
            model = LogisticRegression().fit(odds[:, None], happened)
            slope, shift = float(model.coef_[0, 0]), float(model.intercept_[0])
            if not 1 / STEEPEST <= slope <= STEEPEST:  # confidences that say nothing, or all
                slope = float(np.clip(slope, 1 / STEEPEST, STEEPEST))
                shift = float(logit(happened.mean()) - slope * odds.mean())
        temperatures.append(1 / slope)
        shifts.append(shift)
        alive &= rounds.survived[:, position]
    return Scaling(tuple(temperatures), tuple(shifts))
