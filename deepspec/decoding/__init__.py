"""The verifying decoder: drafts, verifies, and changes not one token of the target's output."""

from deepspec.decoding.continuous import ContinuousBatch, NoDrafts
from deepspec.decoding.decoder import Decoder
from deepspec.decoding.plain import plain_decode
from deepspec.decoding.results import Completion, DecodeResult
from deepspec.decoding.sampling import Sampling
from deepspec.decoding.state import require_rollback, require_state

__all__ = [
    "Completion",
    "ContinuousBatch",
    "DecodeResult",
    "Decoder",
    "NoDrafts",
    "Sampling",
    "plain_decode",
    "require_rollback",
    "require_state",
]
