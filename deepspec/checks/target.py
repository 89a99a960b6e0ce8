"""Whether DeepSpec is right about a target: `deepspec check target=PATH`, on the model itself.

Each check holds two ways of computing the same thing against each other, of which one is
Transformers' own. The texts are uneven and cross the model's windows and compression ratios, and
decoding takes tokens back at their borders. Legend: T tokens, S streams, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from deepspec.checks.decoding import BLOCK, DecodingCheck, check_rollback
from deepspec.checks.finding import Finding, Outcome, tried
from deepspec.config.schema import DrafterConfig, ObjectiveConfig
from deepspec.data.anchors import draw_anchors
from deepspec.data.blocks import build_blocks
from deepspec.drafters.attention import build_visibility
from deepspec.drafters.registry import drafter_kind
from deepspec.objective import slots_of
from deepspec.objective.eager import eager_loss
from deepspec.records import Sample
from deepspec.targets import Target, attention_kinds
from deepspec.targets.agreement import both_logits, gap, variation
from deepspec.targets.checkpoint import check_tokens

# relative root mean square; the same computation twice, and one that sums in another order
SAME = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}
ROUNDED = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
SHORTEST_BORDER, LONGEST_BORDER = 64, 2048
TEXT = (
    "A lighthouse stood at the end of the pier, and every evening its keeper climbed 94 steps. "
    "def mean(values):\n    total = 0.0\n    for value in values:\n        total += value\n"
    "    return total / len(values)\n\n"
    'Question: what is 17 times 23? Answer: 17 * 23 = 391. {"name": "pier", "open": true} '
    "It had rained since Tuesday; the ferry would not sail, so she wrote a long letter instead. "
)


def check_target(target: Target, new_tokens: int = 24) -> Iterator[Finding]:
    """All checks, one after the other; decoding goes on by `new_tokens`."""
    texts = check_texts(target)
    samples = [
        Sample(torch.tensor(text), torch.ones(len(text), dtype=torch.bool), str(index))
        for index, text in enumerate(texts)
    ]
    yield tried("tokens", lambda: _tokens(target))
    yield tried("captured features", lambda: _features(target, samples[0]))
    yield tried("embedding", lambda: _embedding(target, samples[3]))
    yield tried("logits", lambda: _logits(target, samples[3]))
    yield tried("uneven samples, packed", lambda: _packing(target, samples))
    yield tried("a training step", lambda: _training_step(target, samples))
    decoding = DecodingCheck(target, texts, new_tokens)
    yield from check_rollback(decoding, max(_borders(target.config)))


def check_texts(target: Target) -> list[list[int]]:
    """Four texts: one that decoding takes across the largest window, one beyond it, two short ones
    of one length, which states that take no padding run side by side."""
    tokens = list(target.tokenizer(TEXT, add_special_tokens=False)["input_ids"])
    begin = [token for token in [target.tokenizer.bos_token_id] if token is not None]
    border = min(max(*_borders(target.config), SHORTEST_BORDER), LONGEST_BORDER)
    texts = []
    for index, length in enumerate((border - 3, border + 9, 5, 5)):
        first = 11 * index % len(tokens)
        turned = tokens[first:] + tokens[:first]
        texts.append((begin + turned * (length // len(turned) + 1))[:length])
    return texts


def _borders(config: Any) -> list[int]:
    """Window and compression ratios: lengths at which the target begins to compute otherwise."""
    compressed = getattr(config, "compress_rates", None) or {}
    windowed = attention_kinds(config) != {"full_attention"}
    window = getattr(config, "sliding_window", None) if windowed else None
    return [window or 0, *compressed.values()]


def _tokens(target: Target) -> Outcome:
    """Whether the embedding has a row for every id that text can become."""
    rows = len(target.embedding)
    beyond = check_tokens(target.tokenizer, rows, target.name)
    detail = f"{len(target.tokenizer.get_vocab())} tokens for {rows} rows of the embedding"
    if beyond:
        detail += f"; {', '.join(beyond)} without one, for images or sound: not for text"
    return True, None, detail


@torch.no_grad()
def _features(target: Target, sample: Sample) -> Outcome:
    """What the hooks captured against what the layers gave."""
    states, source = _true_states(target, sample)
    expected = torch.cat([_merged(states[layer + 1]) for layer in target.layer_ids], dim=-1)
    apart = gap(target.features([sample]).context, expected)
    ids = ", ".join(map(str, target.layer_ids))
    holds = apart.relative <= SAME[target.dtype]
    return holds, apart.largest, f"outputs of layers {ids}, against {source}"


@torch.no_grad()
def _embedding(target: Target, sample: Sample) -> Outcome:
    """What drafters look up against what enters the first layer."""
    states, source = _true_states(target, sample)
    found = target.embedding[sample.input_ids.to(target.device)]
    apart = gap(found, _merged(states[0]))
    scaled = target.embedding_scale != 1
    detail = f"scaled by {target.embedding_scale:g}" if scaled else "as in the files"
    return apart.relative <= SAME[target.dtype], apart.largest, f"{detail}, against {source}"


@torch.no_grad()
def _logits(target: Target, sample: Sample) -> Outcome:
    """Head, scale and soft cap on `final` against the model's own logits."""
    found, expected = both_logits(target, sample)
    apart = gap(found, expected)
    scale, cap = target.logit_scale, target.head.soft_cap
    detail = (
        f"{f'scaled by {scale:g}' if scale != 1 else 'no scale'}, "
        f"{f'capped at {cap:g}' if cap else 'no soft cap'}, against the model's own; "
        f"{variation(found, expected):.2g} in total variation"
    )
    return apart.relative <= SAME[target.dtype], apart.largest, detail


@torch.no_grad()
def _packing(target: Target, samples: Sequence[Sample]) -> Outcome:
    """Samples of all lengths in one padded forward against one by one."""
    packed = target.features(samples)
    alone = [target.features([sample]) for sample in samples]
    context = gap(packed.context, torch.cat([features.context for features in alone]))
    final = gap(packed.final, torch.cat([features.final for features in alone]))
    relative, largest = max(context.relative, final.relative), max(context.largest, final.largest)
    lengths = ", ".join(str(len(sample)) for sample in samples)
    detail = f"{lengths} tokens, against one by one; on average {100 * relative:.2g} % off"
    return relative <= ROUNDED[target.dtype], largest, detail


def _true_states(target: Target, sample: Sample) -> tuple[list[Tensor], str]:
    """The embedding and every layer's output [T, ..], by another way than the hooks."""
    ids = sample.input_ids[None].to(target.device)
    backbone = target.backbone
    output = backbone(ids, use_cache=False, output_hidden_states=True)
    states = getattr(output, "hidden_states", None)
    # Transformers gives the last one with its norm
    raw = max(target.layer_ids) < target.num_layers - 1
    if raw and states is not None and len(states) == target.num_layers + 1:
        return [state[0].to(target.device) for state in states], "Transformers' hidden_states"
    seen: list[Tensor] = []
    layers: Any = backbone.layers
    original = [layer.forward for layer in layers]

    def spied(forward: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen[:] = seen or [args[0] if args else kwargs["hidden_states"]]
            result = forward(*args, **kwargs)
            seen.append(result[0] if isinstance(result, tuple) else result)
            return result

        return call

    try:
        for layer, forward in zip(layers, original, strict=True):
            layer.forward = spied(forward)
        backbone(ids, use_cache=False)
    finally:
        for layer, forward in zip(layers, original, strict=True):
            layer.forward = forward
    return [state[0].to(target.device) for state in seen], "the layers' own results"


def _merged(state: Tensor) -> Tensor:
    """[T, D], or streams [T, S, D], of which drafters read the mean."""
    return state.mean(dim=1) if state.dim() == 3 else state


def _training_step(target: Target, samples: Sequence[Sample]) -> Outcome:
    """One step of a small DSpark drafter lowers the loss of the same blocks."""
    kind = drafter_kind("dspark")
    config = DrafterConfig(
        num_layers=1,
        block_size=BLOCK,
        markov_rank=16,
        mask_token_id=0,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=128,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drafter = kind.build(kind.resolve(config, target)).to(target.device)
    anchors = [draw_anchors(sample, 8, seed=0, epoch=0) for sample in samples]
    batch = build_blocks(samples, anchors, BLOCK, float(BLOCK)).to(target.device)
    features, visibility = target.features(samples), build_visibility(batch, "sdpa")

    def loss() -> Tensor:
        output = drafter(features, batch, target.embedding, visibility)
        slots = slots_of(output, drafter, batch, features)
        weight = float(batch.weights.sum())
        return eager_loss(slots, target.head, target.head, ObjectiveConfig(), weight).loss

    first = loss()
    first.backward()
    torch.optim.AdamW(drafter.parameters(), lr=3e-4, weight_decay=0.0).step()
    before, after = first.item(), loss().item()
    return after < before, after - before, f"the loss goes from {before:.4f} to {after:.4f}"
