"""DeepSpec in one file: distil a drafter from a frozen target, then let it speed the target up.

    python examples/simple_loop.py                       # three minutes on a laptop CPU
    python examples/simple_loop.py --steps 1000 --answers answers.jsonl

The answers may come from `deepspec regenerate recipe=tiny out=answers.jsonl`; without them the
target answers a few prompts first. This is `deepspec train` without engine, checkpoints and config
files, on one CPU in fp32: same parts, same order, same losses (tests/test_examples.py). Read on.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from itertools import islice

import torch

from deepspec.config.resources import resource
from deepspec.config.schema import DataConfig, DrafterConfig, ObjectiveConfig, TargetConfig
from deepspec.data.anchors import draw_anchors
from deepspec.data.batching import epoch_batches
from deepspec.data.blocks import build_blocks
from deepspec.data.chat_template import ChatEncoder, encode_all
from deepspec.data.conversations import Conversation, SkipCounts, load_conversations
from deepspec.decoding import Decoder, Sampling, plain_decode
from deepspec.drafters.base import Drafter
from deepspec.drafters.registry import drafter_kind
from deepspec.objective import slots_of
from deepspec.objective.eager import eager_loss
from deepspec.records import Sample
from deepspec.targets import Target, load_target

SEED = 0
BATCH_SIZE = 4  # conversations an optimizer step
ANCHORS = 32  # blocks a conversation: one forward of the target pays for all of them
LEARNING_RATE = 1e-2  # high, for a drafter of this size; 6e-4 is usual for real ones
WARMUP_RATIO = 0.04
BETAS = (0.9, 0.95)
MAX_LENGTH, MAX_NEW_TOKENS = 512, 160
DRAFTER = DrafterConfig(num_layers=2, block_size=7, markov_rank=64)
OBJECTIVE = ObjectiveConfig(ce_weight=0.1, l1_weight=0.9, confidence_weight=1.0)


def main(arguments: Sequence[str] | None = None) -> None:
    """Answers, training, a few verified decodes."""
    parser = argparse.ArgumentParser(description="DeepSpec in one file")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps")
    parser.add_argument("--answers", help="JSONL of conversations that the target has answered")
    parser.add_argument("--target", default=str(resource("data/tiny_target")), help="its folder")
    parser.add_argument("--prompts", type=int, default=384, help="to answer without --answers")
    options = parser.parse_args(arguments)

    target = load_target(TargetConfig(options.target, dtype="float32", num_layer_ids=3), "cpu")
    encoder = ChatEncoder(target.tokenizer, MAX_LENGTH)
    skips = SkipCounts()
    if options.answers:
        conversations = load_conversations(DataConfig([options.answers]), skips)
    else:
        conversations = iter(answer(target, encoder, read_prompts("train", options.prompts)))
    samples = encode_all(conversations, encoder, skips)
    if not samples:
        raise SystemExit(f"no conversation is usable: {dict(skips)}")
    print(f"{len(samples)} conversations, {sum(map(len, samples))} tokens")

    drafter = build(target)
    for step, loss in enumerate(train(target, drafter, samples, options.steps), start=1):
        if step % 10 == 0 or step == options.steps:
            print(f"step {step}/{options.steps}  loss {loss:.3f}", flush=True)
    for domain in ("math", "code", "chat"):
        show(target, drafter, encoder, read_prompts(domain, 5)[-1])


def read_prompts(name: str, count: int) -> list[Conversation]:
    """The first prompts of a file in data/prompts; those of the three domains are held out."""
    config = DataConfig([str(resource(f"data/prompts/{name}.jsonl"))], limit=count)
    return list(load_conversations(config, SkipCounts()))


def answer(
    target: Target, encoder: ChatEncoder, prompts: Sequence[Conversation]
) -> list[Conversation]:
    """The target's own answers: a drafter has to foresee this target, not the best answer.

    Sampled at temperature 1, so that training text is distributed as what will be drafted.
    """
    print(f"the target answers {len(prompts)} prompts ...", flush=True)
    tokens = [encoder.prompt(prompt.messages) for prompt in prompts]
    result = plain_decode(target, tokens, Sampling(1.0), MAX_NEW_TOKENS, SEED, batch_size=64)
    answered = []
    for prompt, completion in zip(prompts, result.completions, strict=True):
        truncated = completion.finish_reason == "length"
        written = completion.tokens if truncated else completion.tokens[:-1]
        reply = {"role": "assistant", "content": target.tokenizer.decode(written)}
        answered.append(Conversation(prompt.id, (*prompt.messages, reply), truncated=truncated))
    return answered


def build(target: Target) -> Drafter:
    """An untrained drafter, shaped to fit `target`, whose embedding and LM head it will share."""
    kind = drafter_kind(DRAFTER.kind)
    torch.manual_seed(SEED)
    return kind.build(kind.resolve(DRAFTER, target))


def train(
    target: Target, drafter: Drafter, samples: Sequence[Sample], steps: int
) -> Iterator[float]:
    """Train `drafter` in place; yields the loss of each step before its update."""
    shape = drafter.config
    optimizer = torch.optim.AdamW(drafter.parameters(), betas=BETAS, weight_decay=0.0)
    steps_an_epoch = math.ceil(len(samples) / BATCH_SIZE)
    for step in range(steps):
        epoch, index = divmod(step, steps_an_epoch)
        chosen = epoch_batches(len(samples), BATCH_SIZE, SEED, epoch)[index]
        batch = [samples[i] for i in chosen]

        # An anchor is a token of the answer behind which the drafter is made to guess a block.
        # Many blocks of one conversation are trained at once: each sees the text before its own
        # anchor, itself, and no other block. New anchors are drawn every epoch.
        anchors = [draw_anchors(sample, ANCHORS, SEED, epoch) for sample in batch]
        # The input is [anchor, mask, mask, ...]; labels are the tokens that really follow; weights
        # fall by exp(-j / decay), for a late draft only counts when all earlier ones are right.
        blocks = build_blocks(batch, anchors, shape.block_size, decay=shape.block_size)

        # One forward of the frozen target gives everything that is learnt from: outputs of a few
        # of its layers (the drafter's context) and its last hidden states (the teacher).
        features = target.features(batch)
        output = drafter(features, blocks, target.embedding)

        # Drafts are accepted with probability 1 - L1/2 between the two distributions, so L1 is
        # what is minimised; a little cross-entropy helps where they hardly overlap, and the
        # confidence head learns the acceptance itself. A mean, weighted by slot.
        loss = eager_loss(
            slots_of(output, drafter, blocks, features),
            draft_head=target.head,
            target_head=target.head,
            config=OBJECTIVE,
            denominator=float(blocks.weights.sum()),
        ).loss

        loss.backward()
        torch.nn.utils.clip_grad_norm_(drafter.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to zero at the end."""
    warmup = max(1, round(WARMUP_RATIO * steps))
    if step < warmup:
        return LEARNING_RATE * (step + 1) / warmup
    return LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def show(target: Target, drafter: Drafter, encoder: ChatEncoder, prompt: Conversation) -> None:
    """Decode one prompt greedily and mark the rounds: | ends what one target forward gave.

    The target checks every draft, so the text is what it would have written alone.
    """
    proposer = drafter_kind(DRAFTER.kind).proposer(drafter.eval(), target)
    tokens = [encoder.prompt(prompt.messages)]
    result = Decoder(target, proposer).generate(tokens, Sampling(0.0), MAX_NEW_TOKENS)
    plain = plain_decode(target, tokens, Sampling(0.0), MAX_NEW_TOKENS)

    left = iter(result.completions[0].tokens)
    rounds = [1, *(trace.emitted for trace in result.traces)]  # the prefill gives the first token
    text = "|".join(target.tokenizer.decode(list(islice(left, count))) for count in rounds)
    length = sum(trace.accepted + 1 for trace in result.traces) / max(1, len(result.traces))
    same = result.completions[0].tokens == plain.completions[0].tokens
    print(f"\n{prompt.messages[-1]['content']}\n{text}")
    print(f"accepted length {length:.2f}; same tokens as plain decoding: {'yes' if same else 'NO'}")


if __name__ == "__main__":
    main()
