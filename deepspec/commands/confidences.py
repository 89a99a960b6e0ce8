"""A drafter's confidences: fitted to held-out prompts, and found again when it decodes."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from deepspec import __version__
from deepspec.commands.seen import held_out_prompts
from deepspec.commands.sources import Source
from deepspec.config.schema import DecodingConfig
from deepspec.data.chat_template import ChatEncoder
from deepspec.drafters.base import Drafter
from deepspec.drafters.registry import open_proposer
from deepspec.errors import ConfigError
from deepspec.evaluation.benchmarks import check_benchmarks
from deepspec.evaluation.calibrate import decode_everything, fit_all, write_calibration_report
from deepspec.progress import say
from deepspec.scheduling.calibration_file import (
    Calibration,
    read_calibration,
    weights_digest,
)
from deepspec.targets import Target


def calibrate_drafter(
    source: Source, target: Target, drafter: Drafter, method: str, out: Path
) -> tuple[Calibration, Path]:
    """Fit by `method` (sts or platt), save beside the drafter and report in the folder `out`: the
    calibration and its file, which keeps the drafter's fits for other ways of decoding.

    Raises ConfigError without a confidence head, DataError for prompts of the training.
    """
    assert source.place is not None, "what needs no training has no confidences either"
    config, data = source.config, source.config.data
    check_benchmarks(config.evaluation.benchmarks)
    require_confidences(drafter.config, "deepspec calibrate")
    encoder = ChatEncoder.of(data, target.tokenizer)
    prompts, checked = held_out_prompts(source, encoder)
    if not checked:
        say(f"{source.place} has no training data at hand: that the prompts are new is not checked")
    proposer = open_proposer(source.kind, drafter, target)
    evaluation = decode_everything(config, target, proposer)
    benchmarks = tuple(Path(name).name for name in config.evaluation.benchmarks)
    fits = tuple(
        replace(fit, method=method, benchmarks=benchmarks, prompts=prompts, checked=checked)
        for fit in fit_all(config, evaluation, method)
    )
    calibration = Calibration(fits, weights_digest(source.place))
    half = fits[0].halves
    about = {
        "title": config.recipe,
        "target": target.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": __version__,
        "facts": {
            "method": {"sts": "Sequential Temperature Scaling", "platt": "Platt scaling"}[method],
            "drafter": str(source.place),
            "benchmarks": benchmarks,
            "prompts": {f"{name} half": each.prompts for name, each in half.items()},
            "held against the training data": checked,
            "top_p": config.decoding.top_p,
            "top_k": config.decoding.top_k,
        },
    }
    write_calibration_report(calibration, about, evaluation, out)
    return calibration, calibration.beside(source.place).save(source.place)


def calibration_of(source: Source, drafter: Drafter) -> Calibration | None:
    """What `decoding.scheduler` is to see confidences through; None: as they are.

    Raises ConfigError where it needs some and the drafter has none, CheckpointError for a damaged
    calibration.json.
    """
    decoding = source.config.decoding
    if not require_scheduled(drafter.config, decoding):
        return None
    if decoding.calibration == "none" or source.place is None:
        return None
    found = read_calibration(source.place)
    if found is None:
        say(
            f"no calibration.json beside {source.place}: the scheduler takes confidences as they "
            "are (deepspec calibrate makes one)"
        )
    return found


def require_scheduled(shape: Any, decoding: DecodingConfig) -> bool:
    """Whether `decoding.scheduler` looks at confidences. Raises ConfigError where it does and a
    drafter of `shape` has none."""
    looks = decoding.scheduler not in ("none", "fixed")
    if looks:
        require_confidences(shape, f"decoding.scheduler={decoding.scheduler}")
    return looks


def require_confidences(shape: Any, what: str) -> None:
    """Raises ConfigError where a drafter of `shape` has no confidence head."""
    if not getattr(shape, "confidence_head", False):
        raise ConfigError(
            f"{what} needs a drafter with a confidence head, which this one was trained without; "
            "train one with drafter.kind=dspark drafter.confidence_head=true, or set "
            "decoding.scheduler=fixed, or none"
        )
