"""What decoding gives back."""

from __future__ import annotations

from dataclasses import dataclass

from deepspec.records import DecodeTrace


@dataclass(frozen=True)
class Completion:
    """One request's output. `finish_reason`: "stop" (a stop token, included) or "length"."""

    request: str
    tokens: tuple[int, ...]
    finish_reason: str


@dataclass(frozen=True)
class DecodeResult:
    """Completions in the order of the prompts; one trace row a round; wall seconds of the call.

    Each completion's first token comes from the prefill and belongs to no round.
    """

    completions: list[Completion]
    traces: list[DecodeTrace]
    seconds: float

    @property
    def tokens(self) -> int:
        """New tokens, all requests together."""
        return sum(len(completion.tokens) for completion in self.completions)
