"""Policies by name: how a load is decoded.

plain (no drafts), fixed (whole blocks), fixed:N, threshold (that of decoding.threshold),
threshold:X, algorithm1 and async.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from deepspec.config.schema import DecodingConfig
from deepspec.errors import ConfigError

PLAIN, WHOLE = "plain", "fixed"
BY_TABLE = ("algorithm1", "async")
DEFAULT = (PLAIN, WHOLE, "threshold", *BY_TABLE)


def parse_policies(words: Sequence[str]) -> list[str]:
    """`words`, each once. Raises ConfigError for none, and for one that names no policy."""
    if not words:
        raise ConfigError(f"policies=[] must be one or several of {', '.join(DEFAULT)}")
    for word in words:
        name, colon, value = word.partition(":")
        fine = word in DEFAULT
        if colon and name == "fixed":
            fine = value.isdecimal()
        elif colon and name == "threshold":
            fine = value.replace(".", "", 1).isdecimal() and float(value) <= 1
        if not fine:
            raise ConfigError(
                f"policies: {word} must be one of {', '.join(DEFAULT)}, fixed:N or threshold:X "
                "with X from 0 to 1"
            )
    return list(dict.fromkeys(words))


def decoding_by(policy: str, config: DecodingConfig) -> DecodingConfig:
    """`config` with the scheduler of `policy`, which is not plain."""
    name, _, value = policy.partition(":")
    if policy == WHOLE:
        return replace(config, scheduler="none")
    if name == "fixed":
        return replace(config, scheduler="fixed", verify_length=int(value))
    if value:
        return replace(config, scheduler="threshold", threshold=float(value))
    return replace(config, scheduler=name)


def needs_confidence(policy: str) -> bool:
    """Whether `policy` looks at the drafter's confidences."""
    return policy.partition(":")[0] not in (PLAIN, WHOLE)
