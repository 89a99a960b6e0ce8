"""The figures of the README: what the tiny target can do on text that it was not trained on."""

from __future__ import annotations

import ast
import json
import math
import random
import re
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from arithmetic import last_number
from build import encode, make_turns
from corpus import is_held_out

from deepspec.config.schema import TargetConfig
from deepspec.decoding import Sampling, plain_decode
from deepspec.targets import Target, load_target

CONVERSATIONS = 200  # held-out ones a domain, for the perplexity
ANSWER_TOKENS = 160
DOMAINS = ("code", "chat", "math")


def measure(checkpoint: Path, prompts: Path, seed: int) -> dict[str, dict[str, float]]:
    """Perplexity and entropy of held-out answers; share of right sums and of code that parses."""
    target = load_target(TargetConfig(path=str(checkpoint), dtype="float32"), "cpu")
    turns = make_turns(seed, 6000)
    rng = random.Random(seed)
    figures = {}
    for domain in DOMAINS:
        held_out = [turn for turn in turns[domain] if is_held_out(turn.key)]
        encoded = encode(target.tokenizer, rng.sample(held_out, CONVERSATIONS))
        loss, entropy = _loss_and_entropy(target, encoded)
        figures[domain] = {"perplexity": math.exp(loss), "entropy_nats": entropy}
        for temperature in (0.0, 1.0):
            answers = _answers(target, prompts / f"{domain}.jsonl", temperature)
            figures[domain] |= _quality(domain, answers, temperature)
    return figures


@torch.inference_mode()
def _loss_and_entropy(
    target: Target, encoded: list[tuple[torch.Tensor, torch.Tensor]]
) -> tuple[float, float]:
    """Nats a token that the assistant wrote: of the text, and of the target's own uncertainty."""
    loss = entropy = count = 0.0
    for ids, weights in encoded:
        logits = target.model(ids[None, :-1]).logits[0]
        written = weights[1:] == 1
        log_p = logits[written].log_softmax(-1)
        loss += float(F.nll_loss(log_p, ids[1:][written], reduction="sum"))
        entropy -= float((log_p.exp() * log_p).sum())
        count += float(written.sum())
    return loss / count, entropy / count


def _answers(target: Target, path: Path, temperature: float) -> list[tuple[dict[str, str], str]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    prompts = [
        target.tokenizer.apply_chat_template(
            row["messages"], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        for row in rows
    ]
    result = plain_decode(target, prompts, Sampling(temperature), ANSWER_TOKENS, batch_size=50)
    texts = [target.tokenizer.decode(c.tokens) for c in result.completions]
    return list(zip(rows, texts, strict=True))


def _quality(
    domain: str, answers: list[tuple[dict[str, str], str]], temperature: float
) -> dict[str, float]:
    """Share of finished answers, and of right or parsing ones, at this temperature."""
    shares = {"finished": sum("<|im_end|>" in text for _, text in answers) / len(answers)}
    plain = [(row, text.replace("<|im_end|>", "")) for row, text in answers]
    if domain == "math":
        right = sum(last_number(text) == row["answer"] for row, text in plain)
        shares["right"] = right / len(plain)
    if domain == "code":
        shares["parses"] = sum(_parses(text) for _, text in plain) / len(plain)
    return {f"{name}_at_temperature_{temperature:g}": share for name, share in shares.items()}


def _parses(text: str) -> bool:
    block = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    try:
        return block is not None and bool(ast.parse(block[1]).body)
    except (SyntaxError, ValueError):
        return False


if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else here
    print(json.dumps(measure(folder, here.parent / "prompts", 0), indent=2))
