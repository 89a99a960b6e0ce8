"""The verifying decoder on a target, against plain decoding, against Transformers' `generate`.

Drafts of known quality make it reject in every round, in the middle of blocks, or never.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch

from deepspec.checks.finding import Finding, Outcome, tried
from deepspec.checks.proposers import Rehearsed
from deepspec.decoding import Decoder, DecodeResult, Sampling, plain_decode
from deepspec.decoding.exactness import first_difference
from deepspec.targets import Target
from deepspec.targets.families import FAMILIES, ROWS, SNAPSHOT

GREEDY, BLOCK = Sampling(), 4
QUALITIES = {"wrong": 0, "half right": BLOCK // 2, "right": BLOCK}  # slots that are right


def check_rollback(check: DecodingCheck, border: int) -> list[Finding]:
    """`check` with its target's rollback; where the family is not listed, with each that may be
    right, and which one to set.

    `border`: the largest window or compression ratio of the target.
    """
    target, configured = check.target, check.target.rollback
    ways = [configured or SNAPSHOT]
    if configured == ROWS and target.family not in FAMILIES:
        ways.append(SNAPSHOT)
    results: dict[str, list[Finding]] = {}
    try:
        for way in ways:
            target.rollback = way
            results[way] = list(check.findings())
            if held := all(finding.holds for finding in results[way]):
                break
    finally:
        target.rollback = configured
    if not held:
        way = ways[0]
        detail = f"none that holds; what follows is with {way}"
    elif way != configured:
        detail = f"set target.rollback={way}; what follows is with it"
    else:
        crossed = max(map(len, check.texts)) > border
        detail = way if crossed else f"{way}; no text reaches the window of {border}"
    return [Finding("rollback", held and way == configured, None, detail), *results[way]]


class DecodingCheck:
    """Greedy continuations of `texts` by `new_tokens` each, in every way there is."""

    def __init__(self, target: Target, texts: Sequence[Sequence[int]], new_tokens: int) -> None:
        self.target, self.texts, self.new_tokens = target, texts, new_tokens

    def findings(self) -> Iterator[Finding]:
        """Plain decoding first: what the verifying decoder is held against."""
        self._expected: list[Sequence[int]] = []
        yield tried("plain decoding is Transformers' generate", self.plain)
        if not self._expected:  # it raised
            return
        yield tried("plain decoding, batch 4", lambda: self._compared(self._decode_plainly(4)))
        for what, good in QUALITIES.items():
            for size in (1, 4):
                verified = partial(self.verified, good, size)
                yield tried(f"verifying decoder, drafts {what}, batch {size}", verified)

    def plain(self) -> Outcome:
        """Plain decoding against Transformers' `generate`."""
        plain = self._decode_plainly(1)
        self._expected = [completion.tokens for completion in plain.completions]
        return self._compared(plain, [self._generate(text) for text in self.texts])

    def _decode_plainly(self, size: int) -> DecodeResult:
        return plain_decode(
            self.target, self.texts, GREEDY, self.new_tokens, batch_size=size, stop_token_ids=[]
        )

    def verified(self, good: int, size: int) -> Outcome:
        """The verifying decoder against plain decoding (`plain` comes first): `good` drafts of a
        block are right, `size` rows share a batch."""
        continuations = zip(self.texts, self._expected, strict=True)
        known = {tuple(text): more for text, more in continuations}
        proposer = Rehearsed(known, self.target.vocab_size, BLOCK, good)
        decoder = Decoder(self.target, proposer, size, stop_token_ids=[])
        result = decoder.generate(self.texts, GREEDY, self.new_tokens)
        holds, difference, detail = self._compared(result)
        accepted = sum(trace.accepted for trace in result.traces)
        scheduled = sum(trace.scheduled for trace in result.traces)
        return holds, difference, f"{detail}; {accepted} of {scheduled} drafts accepted"

    def _generate(self, text: Sequence[int]) -> list[int]:
        """Transformers' greedy continuation, whatever the generation config asks for."""
        ids = torch.tensor([list(text)], device=self.target.device)
        out = self.target.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=self.new_tokens,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            suppress_tokens=None,
            eos_token_id=None,
            pad_token_id=0,
        )
        return list(out[0, len(text) :].tolist())

    def _compared(
        self, found: DecodeResult, expected: Sequence[Sequence[int]] | None = None
    ) -> Outcome:
        """Token by token; in low precision a near tie may go either way (`decoding.exactness`)."""
        outputs = zip(self.texts, expected or self._expected, found.completions, strict=True)
        differences = [
            difference
            for text, wanted, completion in outputs
            if (
                difference := first_difference(
                    self.target, completion.request, text, wanted, completion.tokens
                )
            )
        ]
        same = f"{len(self.texts) - len(differences)} of {len(self.texts)} texts the same"
        if not differences:
            return True, 0.0, same
        errors = [difference for difference in differences if not difference.explained]
        worst = max(errors or differences, key=lambda difference: difference.gap)
        if not errors:
            return True, worst.gap, f"{same}, the others part at near ties"
        why = (
            f"text {worst.request} parts at token {worst.index}, where the two logits are "
            f"{worst.gap:.2g} apart and rounding makes {worst.noise:.2g}"
        )
        return False, worst.gap, f"{same}; {why}"
