"""The decode loop: propose, schedule, verify, repeat (dspark.md, "The cycle").

The anchor is the newest token: chosen, but not yet seen by the target. A round drafts behind it,
runs [anchor, drafts] through the target once, keeps the accepted prefix and one more token, which
is the next anchor. The features of *every* verified position go back to the drafter.
Legend: B running rows, K block size, W verified drafts, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from deepspec.decoding.packing import packed
from deepspec.decoding.results import Completion, DecodeResult
from deepspec.decoding.rows import Rows
from deepspec.decoding.sampling import RandomRows, Sampling, draw
from deepspec.decoding.skipping import SkippingProposer
from deepspec.decoding.state import require_rollback
from deepspec.decoding.transfers import download, integers, upload
from deepspec.decoding.verification import verify
from deepspec.drafters.base import Draw, Observation, Proposer, greedy
from deepspec.drafters.compiling import Compilable
from deepspec.records import DecodeTrace, Proposal, Verification
from deepspec.targets import Target, TargetOutput

Schedule = Callable[[Proposal, Sequence[int]], Sequence[int]]
"""How many drafts of each row to verify, by the proposal's confidences and the most that each row
can use; must not depend on a token that it admits (that is what keeps it lossless). One with an
attribute `pays` (see `scheduling.drafting`) may have rounds without drafts; one with a method
`start` is told of every new batch."""


class Decoder:
    """A frozen target with a proposer. Greedy output equals plain decoding token by token;
    sampled output has the target's distribution. `compiled`: the forwards of a round are; the
    target's at one width, so that what a schedule leaves out is computed too."""

    def __init__(
        self,
        target: Target,
        proposer: Proposer,
        batch_size: int = 1,
        stop_token_ids: Sequence[int] | None = None,
        schedule: Schedule | None = None,
        compiled: bool = False,
    ) -> None:
        require_rollback(target)
        self.target = target
        pays = getattr(schedule, "pays", None)
        self.proposer = proposer if pays is None else SkippingProposer(proposer, pays)
        self._with_context = getattr(self.proposer, "reads_features", True)
        self.batch_size = batch_size
        self.stop_token_ids = target.stop_token_ids if stop_token_ids is None else stop_token_ids
        self._schedule = schedule
        self._start_schedule = getattr(schedule, "start", None)
        self.fixed = proposer.block_size + 1 if compiled else None
        if compiled and isinstance(proposer, Compilable):
            proposer.compile()

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        max_new_tokens: int,
        seed: int = 0,
        requests: Sequence[str] | None = None,
    ) -> DecodeResult:
        """Continue each prompt (token ids) by at most `max_new_tokens`, `batch_size` at a time.

        `requests` name the prompts in traces and seed their random streams.
        """
        names = list(requests) if requests is not None else [str(i) for i in range(len(prompts))]
        assert len(set(names)) == len(names), "two requests of one name would share an output"
        begun = time.perf_counter()
        completions: dict[str, Completion] = {}
        traces: list[DecodeTrace] = []
        # neighbours in length share a batch: less padding in the prefill
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for first in range(0, len(order), self.batch_size):
            group = order[first : first + self.batch_size]
            rows = Rows(
                self.target,
                [names[i] for i in group],
                [prompts[i] for i in group],
                max_new_tokens,
                self.stop_token_ids,
                self.fixed,
            )
            random = RandomRows(seed, rows.requests, self.target.device)
            self._run(rows, random, sampling, traces)
            completions.update((completion.request, completion) for completion in rows.finished)
        seconds = time.perf_counter() - begun
        return DecodeResult([completions[name] for name in names], traces, seconds)

    def _run(
        self, rows: Rows, random: RandomRows, sampling: Sampling, traces: list[DecodeTrace]
    ) -> None:
        """Prefill one group, then rounds until its last row has finished."""
        if self._start_schedule is not None:
            self._start_schedule()
        self.begin(rows, random, sampling)
        number = 0
        while len(rows):
            traces += self.round(rows, random, sampling, number)
            number += 1

    def begin(self, rows: Rows, random: RandomRows, sampling: Sampling) -> None:
        """Prefill `rows`, the only requests of the proposer from now on; each says a token."""
        tokens, output = rows.prefill(self._with_context)
        self.proposer.start(len(rows))
        starts = torch.zeros(len(rows), dtype=torch.int64, device=tokens.device)
        self._observe(tokens, output, rows.prompt_lengths, starts, tokens.shape[1])
        logits = rows.last_logits(output)
        first = (
            logits.argmax(-1)
            if sampling.greedy
            else draw(sampling.probabilities(logits), random.uniforms(1)[:, 0])
        )
        for row, token in enumerate(first.tolist()):
            rows.emit(row, [token])
        self._let_go(rows, random)

    def round(
        self, rows: Rows, random: RandomRows, sampling: Sampling, number: int
    ) -> list[DecodeTrace]:
        """One round of every running row; those that finish leave."""
        traces = self._round(rows, random, sampling, number)
        self._let_go(rows, random)
        return traces

    def _round(
        self, rows: Rows, random: RandomRows, sampling: Sampling, number: int
    ) -> list[DecodeTrace]:
        begun = time.perf_counter()
        device, size = self.target.device, self.proposer.block_size
        starts = rows.positions()
        newest = [tokens[-1] for tokens in rows.emitted]
        positions, anchors = upload([starts, newest], device)
        uniforms = None if sampling.greedy else random.uniforms(2 * size + 1)

        proposal = self.proposer.propose(
            anchors, positions, max(starts) + 1, _draw_by(sampling, uniforms)
        )
        proposed = (size,) * len(rows) if proposal.lengths is None else proposal.lengths
        # a round emits at most scheduled + 1 tokens: nothing behind the limit is verified
        scheduled = [
            min(made, left - 1) for made, left in zip(proposed, rows.remaining(), strict=True)
        ]
        if self._schedule is not None:
            wished = self._schedule(proposal, scheduled)
            scheduled = [min(a, b) for a, b in zip(scheduled, wished, strict=True)]
        width = max(scheduled)

        block = anchors[:, None]
        if width:
            block = torch.cat((block, proposal.tokens[:, :width]), dim=1)
        lengths = [count + 1 for count in scheduled]
        end = max(starts) + width + 1
        output = rows.forward(block, positions, end, self._with_context, lengths)
        verdict = self._judge(proposal, output, scheduled, sampling, uniforms)
        # the round's only synchronisation: what was accepted, and the tokens
        confidence = proposal.confidence
        verdicts = torch.stack((verdict.accepted, verdict.next_token), dim=1)
        judged, drafts, confidences = download(
            verdicts, block[:, 1:], block[:, :0] if confidence is None else confidence
        )
        accepted, last = zip(*integers(judged), strict=True)

        emitted = [
            rows.emit(row, [*own[: accepted[row]], last[row]])
            for row, own in enumerate(integers(drafts))
        ]
        kept = [count + 1 for count in accepted]
        rows.keep(kept)
        self._observe(block, output, kept, positions, end)
        seconds = (time.perf_counter() - begun) / len(rows)
        return [
            DecodeTrace(
                request=rows.requests[row],
                round=number,
                position=starts[row],
                proposed=proposed[row],
                scheduled=scheduled[row],
                accepted=accepted[row],
                emitted=emitted[row],
                confidences=tuple(confidences[row][: proposed[row]]),
                seconds=seconds,
            )
            for row in range(len(rows))
        ]

    def _judge(
        self,
        proposal: Proposal,
        output: TargetOutput,
        scheduled: Sequence[int],
        sampling: Sampling,
        uniforms: Tensor | None,
    ) -> Verification:
        """What of the scheduled drafts the target accepts; see `verify`."""
        width = max(scheduled)
        return verify(
            proposal.tokens[:, :width],
            None if proposal.probabilities is None else proposal.probabilities[:, :width],
            self.target.head(packed(output.final, [count + 1 for count in scheduled])),
            upload(scheduled, self.target.device),
            sampling,
            None if uniforms is None else uniforms[:, self.proposer.block_size :],
        )

    def _observe(
        self,
        tokens: Tensor,
        output: TargetOutput,
        counts: Sequence[int],
        starts: Tensor,
        end: int,
    ) -> None:
        self.proposer.observe(
            Observation(
                tokens=tokens,
                context=output.final[..., :0] if output.context is None else output.context,
                final=output.final,
                starts=starts,
                counts=upload(counts, tokens.device),
                end=end,
            )
        )

    def _let_go(self, rows: Rows, random: RandomRows) -> None:
        stay = rows.leave()
        if stay:
            self.proposer.select(torch.tensor(stay, device=self.target.device))
        if stay is not None:
            random.select(stay)


def _draw_by(sampling: Sampling, uniforms: Tensor | None) -> Draw:
    """The drafter's sampling rule: the target's own, on the row's own random numbers."""
    if uniforms is None:
        return greedy
    slot = 0

    def choose(logits: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal slot
        probabilities = sampling.probabilities(logits)
        tokens = draw(probabilities, uniforms[:, slot])
        slot += 1
        return tokens, probabilities

    return choose
