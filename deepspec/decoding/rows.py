"""The requests of a batch while they run: the target's side of a round, shared by both decoders.

Legend: B running rows, Q new tokens, V vocabulary.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from deepspec.decoding.results import Completion
from deepspec.decoding.state import open_state
from deepspec.targets import Target, TargetOutput


class Rows:
    """Prompts being continued: tokens and lengths on the host, the target's state on the device.

    Each by at most `max_new_tokens`, and not beyond the target's context; `fixed`: see
    `open_state`.
    """

    def __init__(
        self,
        target: Target,
        requests: Sequence[str],
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        stop_token_ids: Sequence[int],
        fixed: int | None = None,
    ) -> None:
        self.target = target
        self.requests = list(requests)
        self.prompt_lengths = [len(prompt) for prompt in prompts]
        self.emitted: list[list[int]] = [[] for _ in prompts]
        self._stop = set(stop_token_ids)
        room = target.context_length or sys.maxsize
        self._limits = [max(1, min(max_new_tokens, room - n)) for n in self.prompt_lengths]
        self._prompts = [list(prompt) for prompt in prompts]
        self._state = open_state(target, len(prompts), fixed)
        self._finished: list[Completion] = []

    def __len__(self) -> int:
        return len(self.requests)

    def prefill(self, with_context: bool) -> tuple[Tensor, TargetOutput]:
        """Run the prompts, right-padded: (tokens [B, P], output). No real token sees padding."""
        width = max(self.prompt_lengths)
        padded = [prompt + [0] * (width - len(prompt)) for prompt in self._prompts]
        tokens = torch.tensor(padded, device=self.target.device)
        starts = torch.zeros(len(self), dtype=torch.int64, device=self.target.device)
        return tokens, self.forward(tokens, starts, width, with_context, self.prompt_lengths)

    def forward(
        self,
        tokens: Tensor,
        starts: Tensor,
        end: int,
        with_context: bool,
        lengths: Sequence[int] | None = None,
    ) -> TargetOutput:
        """See `TargetState.forward`."""
        return self._state.forward(tokens, starts, end, with_context, lengths)

    def keep(self, counts: Sequence[int]) -> None:
        """See `TargetState.keep`."""
        self._state.keep(counts)

    def last_logits(self, output: TargetOutput) -> Tensor:
        """[B, V] at the end of each prompt, after `prefill`."""
        row = torch.arange(len(self), device=output.final.device)
        last = torch.tensor(self.prompt_lengths, device=output.final.device) - 1
        return self.target.head(output.final[row, last])

    def positions(self) -> list[int]:
        """Position of each row's anchor: its newest token, which the target has not seen."""
        return [
            length + len(tokens) - 1
            for length, tokens in zip(self.prompt_lengths, self.emitted, strict=True)
        ]

    def remaining(self) -> list[int]:
        """Tokens each row may still emit."""
        return [
            limit - len(tokens) for limit, tokens in zip(self._limits, self.emitted, strict=True)
        ]

    def emit(self, row: int, tokens: Sequence[int]) -> int:
        """Append until a stop token; how many were taken."""
        for count, token in enumerate(tokens, start=1):
            self.emitted[row].append(token)
            if token in self._stop or len(self.emitted[row]) >= self._limits[row]:
                return count
        return len(tokens)

    def leave(self) -> list[int] | None:
        """Let finished rows go; the indices that stay, or None when nobody left.

        The last rows take the places of those that left: all others need not be moved.
        """
        stay = []
        for row, tokens in enumerate(self.emitted):
            stopped = tokens[-1] in self._stop
            if stopped or len(tokens) >= self._limits[row]:
                reason = "stop" if stopped else "length"
                self._finished.append(Completion(self.requests[row], tuple(tokens), reason))
            else:
                stay.append(row)
        if len(stay) == len(self):
            return None
        behind = [row for row in stay if row >= len(stay)]
        kept = set(stay)
        stay = [row if row in kept else behind.pop() for row in range(len(stay))]
        self.requests = [self.requests[row] for row in stay]
        self.prompt_lengths = [self.prompt_lengths[row] for row in stay]
        self.emitted = [self.emitted[row] for row in stay]
        self._limits = [self._limits[row] for row in stay]
        if stay:
            self._state.select(stay)
        return stay

    def join(self, other: Rows) -> None:
        """Append the rows of `other`, which have read their prompts."""
        self.requests += other.requests
        self.prompt_lengths += other.prompt_lengths
        self.emitted += other.emitted
        self._limits += other._limits
        self._state.join(other._state)

    def take_finished(self) -> list[Completion]:
        """Completions since the last time that this was asked."""
        taken, self._finished = self._finished, []
        return taken

    @property
    def finished(self) -> list[Completion]:
        """Completions so far, in the order they ended."""
        return self._finished
