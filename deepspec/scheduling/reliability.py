"""How far prefix survival can be believed, position by position: ECE, AUC, Brier score, bins.

Apart from `calibration`, because decoding needs that one and not scikit-learn.
"""

from __future__ import annotations

import numpy as np

from deepspec.scheduling.calibration import (
    BINS,
    Bools,
    Floats,
    Rounds,
    Scaling,
    bin_of,
    calibrated,
    calibration_error,
    survival,
)
from deepspec.scheduling.calibration_file import Bin, Reliability


def measure(rounds: Rounds, scaling: Scaling | None = None) -> tuple[Reliability, ...]:
    """One a position that has samples, its confidences scaled (None: as they are)."""
    predicted = survival(calibrated(rounds.confidence, scaling))
    return tuple(
        _reliability(position + 1, predicted[known, position], rounds.survived[known, position])
        for position, known in enumerate(rounds.known.T)
        if known.any()
    )


def _reliability(position: int, predicted: Floats, happened: Bools) -> Reliability:
    from sklearn.metrics import brier_score_loss, roc_auc_score  # a second, as in `platt`

    index = bin_of(predicted)
    counts = np.bincount(index, minlength=BINS)
    sums = [np.bincount(index, values, minlength=BINS) for values in (predicted, happened)]
    # |mean of n Bernoullis - its expectation| is on average sqrt(2 / pi) standard deviations
    variance = np.bincount(index, predicted * (1 - predicted), minlength=BINS)
    noise = float(np.sqrt(2 / np.pi) * np.sqrt(variance).sum() / len(predicted))
    both = 0 < happened.sum() < len(happened)
    return Reliability(
        position=position,
        samples=len(predicted),
        survived=float(happened.mean()),
        ece=calibration_error(predicted, happened),
        noise=noise,
        auc=float(roc_auc_score(happened, predicted)) if both else None,
        brier=float(brier_score_loss(happened, predicted, labels=[False, True])),
        bins=tuple(
            Bin(int(count), float(mean / count), float(rate / count))
            for count, mean, rate in zip(counts, *sums, strict=True)
            if count
        ),
    )
