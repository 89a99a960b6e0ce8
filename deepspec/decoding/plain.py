"""Plain cached decoding, one token a step: the baseline, on the same cache and sampling."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from deepspec.decoding.results import Completion, DecodeResult
from deepspec.decoding.rows import Rows
from deepspec.decoding.sampling import RandomRows, Sampling, draw
from deepspec.decoding.transfers import upload
from deepspec.targets import Target


@torch.inference_mode()
def plain_decode(
    target: Target,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    max_new_tokens: int,
    seed: int = 0,
    requests: Sequence[str] | None = None,
    batch_size: int = 1,
    stop_token_ids: Sequence[int] | None = None,
    compiled: bool = False,
) -> DecodeResult:
    """Continue each prompt without a drafter; arguments as `Decoder.generate`. No traces."""
    names = list(requests) if requests is not None else [str(i) for i in range(len(prompts))]
    assert len(set(names)) == len(names), "two requests of one name would share an output"
    stop = target.stop_token_ids if stop_token_ids is None else stop_token_ids
    begun = time.perf_counter()
    completions: dict[str, Completion] = {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for first in range(0, len(order), batch_size):
        group = order[first : first + batch_size]
        rows = Rows(
            target,
            [names[i] for i in group],
            [prompts[i] for i in group],
            max_new_tokens,
            stop,
            fixed=1 if compiled else None,
        )
        random = RandomRows(seed, rows.requests, target.device)
        _, output = rows.prefill(with_context=False)
        logits = rows.last_logits(output)
        while True:
            if sampling.greedy:
                tokens = logits.argmax(-1)
            else:
                tokens = draw(sampling.probabilities(logits), random.uniforms(1)[:, 0])
            for row, token in enumerate(tokens.tolist()):
                rows.emit(row, [token])
            stay = rows.leave()
            if not len(rows):
                break
            if stay is not None:
                tokens = tokens[stay]
                random.select(stay)
            starts = rows.positions()
            output = rows.forward(
                tokens[:, None],
                upload(starts, target.device),
                max(starts) + 1,
                with_context=False,
            )
            logits = target.head(output.final[:, 0])
        completions.update((completion.request, completion) for completion in rows.finished)
    seconds = time.perf_counter() - begun
    return DecodeResult([completions[name] for name in names], [], seconds)
