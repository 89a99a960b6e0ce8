"""calibration.json, beside a drafter's weights: how confidences are scaled, what that was fitted
on, and what it brought. The scaling alone also travels in an export's config.json.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from deepspec.atomic import sha256, write_text
from deepspec.errors import CheckpointError, ConfigError
from deepspec.json_files import as_kind, read_json
from deepspec.scheduling.calibration import Scaling

NAME = "calibration.json"
FORMAT = 2  # 1 said once, for all fits, how they were made
AGAIN = "run deepspec calibrate again"
MADE = ("method", "benchmarks", "prompts", "checked")  # of a fit: how
CARRIED = ("temperature", "top_p", "top_k", "scaling", "method")  # of a fit, into exports
FIT, HELD_OUT = "fit", "held_out"  # the two halves of the prompts


@dataclass(frozen=True)
class Bin:
    """Predictions of one interval: how many, their mean, and the rate of what happened."""

    count: int
    predicted: float
    happened: float


@dataclass(frozen=True)
class Reliability:
    """Prefix survival predicted for one `position` (from 1) against what happened, over `samples`
    verified drafts, of which the share `survived` did.

    `ece` over `calibration.BINS` bins; `noise`: the ECE that predictions would show at this many
    independent samples if they were exactly right. `auc` of telling survivors from others, None
    where there is one kind only; `brier` the mean squared error. `bins`: those that are not empty.
    """

    position: int
    samples: int
    survived: float
    ece: float
    noise: float
    auc: float | None
    brier: float
    bins: tuple[Bin, ...]


@dataclass(frozen=True)
class Half:
    """One half of the prompts: its size, its rounds, and the reliability by position of confidences
    as the drafter gives them and scaled."""

    prompts: int
    rounds: int
    before: tuple[Reliability, ...]
    after: tuple[Reliability, ...]


@dataclass(frozen=True)
class Fit:
    """The `scaling` of confidences for one way of decoding: its sampling `temperature`, `top_p` and
    `top_k`. `halves`: "fit", whose rounds chose it, and "held_out".

    `method`: "sts" (`calibration.fit_sts`) or "platt" (`platt.fit_platt`). `prompts`: digest of the
    prompts' texts, from `benchmarks`; `checked`: whether these were held against the drafter's
    training data.
    """

    temperature: float
    top_p: float
    top_k: int
    scaling: Scaling
    halves: Mapping[str, Half] = field(default_factory=dict)
    method: str = "sts"
    benchmarks: tuple[str, ...] = ()
    prompts: str = ""
    checked: bool = False

    @property
    def way(self) -> tuple[float, ...]:
        """Of decoding; greedy decoding has no top_p and top_k."""
        return _way(self.temperature, self.top_p, self.top_k)


@dataclass(frozen=True)
class Calibration:
    """Fits, one a way of decoding, of a drafter's `weights` (`weights_digest`)."""

    fits: tuple[Fit, ...]
    weights: str = ""

    def scaling(self, temperature: float, top_p: float, top_k: int) -> Scaling:
        """That of the fit for this way of decoding. Raises ConfigError where there is none."""
        for fit in self.fits:
            if fit.way == _way(temperature, top_p, top_k):
                return fit.scaling
        shown = [f"{fit.temperature:g} ({fit.top_p:g}, {fit.top_k})" for fit in self.fits]
        raise ConfigError(
            f"the drafter's calibration has no fit for decoding at temperature {temperature:g} "
            f"(top_p {top_p:g}, top_k {top_k}), only for {', '.join(shown)}; run deepspec "
            f"calibrate with evaluation.temperatures=[{temperature:g}] and these, or set "
            "decoding.calibration=none"
        )

    def beside(self, folder: Path) -> Calibration:
        """These fits, behind those that the drafter in `folder` has for other ways of decoding."""
        try:
            earlier = read_calibration(folder)
        except CheckpointError:  # damaged, or of other weights: of no use
            earlier = None
        ways = {fit.way for fit in self.fits}
        kept = [fit for fit in earlier.fits if fit.way not in ways] if earlier else []
        return replace(self, fits=(*kept, *self.fits))

    def embedded(self) -> dict[str, Any]:
        """What an export's config.json carries, under deepspec.calibration."""
        fits = [
            {key: value for key, value in asdict(fit).items() if key in CARRIED}
            for fit in self.fits
        ]
        return {"format": FORMAT, "fits": fits}

    def save(self, folder: Path) -> Path:
        """Write into `folder`, whole or not at all; gives the file. Raises OSError."""
        path = folder / NAME
        text = json.dumps({"format": FORMAT, **asdict(self)}, indent=2)
        write_text(path, text + "\n")
        return path


def read_calibration(folder: Path) -> Calibration | None:
    """That of the drafter in `folder`, a checkpoint or an export; None where it has none.

    Raises CheckpointError where it cannot be read, or was fitted to other weights.
    """
    path = folder / NAME
    if path.is_file():
        found = read_calibration_file(path)
        if found.weights != weights_digest(folder):
            raise CheckpointError(
                f"{path} was fitted to other weights than those beside it; run deepspec calibrate "
                "again, or set decoding.calibration=none"
            )
        return found
    config = folder / "config.json"
    if not config.is_file():
        return None
    embedded = _json(config).get("deepspec", {}).get("calibration")
    return None if embedded is None else _parsed(config, embedded)


def read_calibration_file(path: Path) -> Calibration:
    """What a calibration.json says, as a report has one too; whose weights lie beside it is not
    looked at. Raises CheckpointError."""
    return _parsed(path, _json(path))


def weights_digest(folder: Path) -> str:
    """Of the drafter's safetensors in a checkpoint or an export; the optimizer's are not its."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        if file.name != "optimizer.safetensors":
            digest.update(f"{file.name} {sha256(file)}\n".encode())
    return digest.hexdigest()


def _way(temperature: float, top_p: float, top_k: int) -> tuple[float, ...]:
    return (temperature, top_p, top_k) if temperature else (temperature,)


def _json(path: Path) -> dict[str, Any]:
    try:
        return read_json(path, CheckpointError, AGAIN)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is unreadable: {error}") from None


def _parsed(path: Path, raw: dict[str, Any]) -> Calibration:
    if raw.get("format") not in (1, FORMAT):
        raise CheckpointError(f"the calibration in {path} was written by another version; {AGAIN}")
    made = {key: raw[key] for key in MADE if key in raw}
    try:
        fits = as_kind(list[dict[str, Any]], raw.get("fits"))
        return as_kind(Calibration, {**raw, "fits": [{**made, **fit} for fit in fits]})
    except ValueError as error:
        raise CheckpointError(f"the calibration in {path} is damaged ({error}); {AGAIN}") from None
