"""Make the tiny target again from nothing: text, tokenizer, prompts, training, measurements.

    python data/tiny_target/build.py --minutes 60

writes the checkpoint beside this file and the prompts into data/prompts. `--measure-only` reads
the checkpoint and prints the figures of the README.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from arithmetic import math_turns
from corpus import (
    Turn,
    chat_turns,
    code_turns,
    is_held_out,
    library_functions,
    library_prose,
)
from tokenizer import END, MASK, PAD, VOCABULARY, train_tokenizer
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

HERE = Path(__file__).resolve().parent
PROMPTS = HERE.parent / "prompts"
ROW = 320  # tokens a training row; nearly every conversation fits
PROMPT_WEIGHT = 0.2  # of a loss at tokens the assistant did not write
TRAINING_PROMPTS = 1200  # a domain
HELD_OUT_PROMPTS = 100  # a domain
# Share of training rows; math needs the most practice, raw source and prose widen the language.
MIXTURE = {"code": 0.30, "chat": 0.24, "math": 0.34, "prose": 0.12}


def model_config(tokenizer: PreTrainedTokenizerFast) -> Qwen3Config:
    """8 thin layers: drafters tap several of them."""
    return Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=448,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids(END),
        pad_token_id=tokenizer.convert_tokens_to_ids(PAD),
    )


# ------------------------------------------------------------------------------------- the text


def make_turns(seed: int, math_count: int) -> dict[str, list[Turn]]:
    """Every conversation by domain, and raw text as turns of domain "prose"."""
    rng = random.Random(seed)
    functions = list(library_functions())
    kept = [f for f in functions if not is_held_out(f"{f.module}.{f.name}")]
    return {
        "code": list(code_turns(functions, rng, copies=6)),
        "chat": list(chat_turns(functions, rng, copies=6)),
        "math": list(math_turns(rng, math_count)),
        "prose": [Turn("prose", "", "", text) for text in library_prose(kept)],
    }


def write_prompts(turns: dict[str, list[Turn]], folder: Path, seed: int) -> None:
    """Training prompts, and held-out ones a domain that no training text shares a key with."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    training, asked = [], set()
    for domain in ("code", "chat", "math"):
        by_key = {turn.key: turn for turn in turns[domain]}  # one wording a key
        held_out = [turn for key, turn in by_key.items() if is_held_out(key)]
        kept = [turn for key, turn in by_key.items() if not is_held_out(key)]
        chosen = rng.sample(held_out, HELD_OUT_PROMPTS)
        held_out_rows = _rows(domain, chosen)
        asked |= {str(row["messages"]) for row in held_out_rows}
        _write_rows(folder / f"{domain}.jsonl", held_out_rows)
        training += _rows(f"train-{domain}", rng.sample(kept, TRAINING_PROMPTS))
    rng.shuffle(training)
    # a subclass may document a method in its parent's words: other key, same question
    training = [row for row in training if str(row["messages"]) not in asked]
    _write_rows(folder / "train.jsonl", training)


def _rows(prefix: str, turns: list[Turn]) -> list[dict[str, object]]:
    return [
        {
            "id": f"{prefix}-{index:04d}",
            "domain": turn.domain,
            "messages": [{"role": "user", "content": turn.question}],
            **({"answer": turn.result} if turn.result else {}),
        }
        for index, turn in enumerate(turns)
    ]


def _write_rows(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def encode(tokenizer: PreTrainedTokenizerFast, turns: list[Turn]) -> list[tuple[Tensor, Tensor]]:
    """A turn as (token ids, loss weights); the checkpoint's own chat template renders it."""
    encoded = []
    for turn in turns:
        if turn.domain == "prose":
            ids = tokenizer(turn.answer + PAD)["input_ids"]
            encoded += [
                (torch.tensor(ids[i : i + ROW]), torch.ones(len(ids[i : i + ROW])))
                for i in range(0, len(ids), ROW)
            ]
            continue
        messages = [
            {"role": "user", "content": turn.question},
            {"role": "assistant", "content": turn.answer},
        ]
        out = tokenizer.apply_chat_template(
            messages, return_assistant_tokens_mask=True, return_dict=True
        )
        weights = torch.tensor(out["assistant_masks"], dtype=torch.float32)
        encoded.append((torch.tensor(out["input_ids"]), weights.clamp(min=PROMPT_WEIGHT)))
    return encoded


def rows(
    pools: dict[str, list[tuple[Tensor, Tensor]]], rng: random.Random
) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of `ROW` + 1 tokens, each beginning with a conversation, drawn by `MIXTURE`."""
    domains, shares = zip(*MIXTURE.items(), strict=True)
    order: dict[str, list[int]] = {domain: [] for domain in domains}
    while True:
        ids, weights, length = [], [], 0
        while length < ROW + 1:
            domain = rng.choices(domains, shares)[0]
            if not order[domain]:
                order[domain] = rng.sample(range(len(pools[domain])), len(pools[domain]))
            tokens, weight = pools[domain][order[domain].pop()]
            ids.append(tokens)
            weights.append(weight)
            length += len(tokens)
        yield torch.cat(ids)[: ROW + 1], torch.cat(weights)[: ROW + 1]


# --------------------------------------------------------------------------------- the training


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised by Newton-Schulz (Jordan et al. 2024), steps of AdamW's size.

    torch.optim.Muon does the same in bf16 and a matrix at a time: ten times slower on a CPU that
    emulates bf16. Here matrices of one shape are stacked, in fp32.
    """

    def __init__(self, matrices: list[nn.Parameter]) -> None:
        super().__init__(matrices, {"lr": 0.0, "momentum": 0.95, "weight_decay": 0.05})

    @torch.no_grad()
    def step(self) -> None:
        """One update of every matrix."""
        (group,) = self.param_groups
        by_shape: dict[torch.Size, list[nn.Parameter]] = {}
        for matrix in group["params"]:
            by_shape.setdefault(matrix.shape, []).append(matrix)
        for shape, matrices in by_shape.items():
            updates = []
            for matrix in matrices:
                velocity = self.state[matrix].setdefault("velocity", torch.zeros_like(matrix))
                velocity.lerp_(matrix.grad, 1 - group["momentum"])
                updates.append(matrix.grad.lerp(velocity, group["momentum"]))  # Nesterov
            size = 0.2 * max(shape) ** 0.5 * group["lr"]
            for matrix, update in zip(matrices, orthogonal(torch.stack(updates)), strict=True):
                matrix.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=size)


def orthogonal(matrices: Tensor) -> Tensor:
    """Nearly the nearest semi-orthogonal matrices to `matrices` [n, rows, columns]."""
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonal(matrices.mT).mT
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x


def optimizers(model: nn.Module) -> list[tuple[torch.optim.Optimizer, float]]:
    """Muon for the hidden matrices (about twice the progress a step here), AdamW for the rest."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in model.named_parameters() if p.ndim < 2 or "embed" in name]
    return [
        (Muon(matrices), 4e-3),
        (torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.01), 4e-3),
    ]


def schedule(progress: float) -> float:
    """Warm up over 1 %, hold, then fall linearly over the last half."""
    return min(1.0, progress / 0.01 + 0.02, max(0.02, 2.0 * (1.0 - progress)))


def train(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    pools: dict[str, list[tuple[Tensor, Tensor]]],
    minutes: float,
    batch: int,
    out: Path,
    seed: int,
) -> dict[str, float]:
    """Train for `minutes` of wall-clock time; a checkpoint every five minutes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device).train()
    # fp32 on a CPU without bf16 instructions: there bf16 is emulated, and slower
    fast_bf16 = device == "cuda" or torch.cpu._is_avx512_bf16_supported()
    stepping = optimizers(model)
    backbone = torch.compile(model.model)
    source = rows(pools, random.Random(seed))
    begun = saved = time.monotonic()
    step, smooth = 0, 0.0
    while (progress := (time.monotonic() - begun) / (60 * minutes)) < 1:
        drawn = [next(source) for _ in range(batch)]
        ids = torch.stack([row for row, _ in drawn]).to(device)
        weights = torch.stack([weight for _, weight in drawn])[:, 1:].to(device)
        with torch.autocast(device, torch.bfloat16, enabled=fast_bf16):
            hidden = backbone(ids[:, :-1]).last_hidden_state
            logits = F.linear(hidden, model.lm_head.weight)
        losses = F.cross_entropy(
            logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
        )
        loss = (losses * weights.flatten()).sum() / weights.sum()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, rate in stepping:
            for group in optimizer.param_groups:
                group["lr"] = rate * schedule(progress)
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        smooth = loss.item() if step == 1 else 0.95 * smooth + 0.05 * loss.item()
        if step % 20 == 0:
            rate = step * batch * ROW / (time.monotonic() - begun)
            print(f"{progress:6.1%} step {step} loss {smooth:.3f} {rate:.0f} tok/s", flush=True)
        if time.monotonic() - saved > 300:
            save(model, tokenizer, out)
            saved = time.monotonic()
    save(model, tokenizer, out)
    return {"steps": step, "tokens": step * batch * ROW, "minutes": minutes, "loss": smooth}


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """The bf16 checkpoint, written beside and moved file by file into `out`."""
    beside = out / ".partial"
    copy = Qwen3ForCausalLM(model.config).to(torch.bfloat16)
    copy.load_state_dict(model.state_dict())
    copy.generation_config.eos_token_id = model.config.eos_token_id
    copy.generation_config.pad_token_id = model.config.pad_token_id
    copy.save_pretrained(beside)
    tokenizer.save_pretrained(beside)
    for file in beside.iterdir():
        file.replace(out / file.name)
    shutil.rmtree(beside)


def main() -> None:
    """Parse arguments, then build or measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=80.0)
    parser.add_argument("--batch", type=int, default=12, help="rows a step")
    parser.add_argument("--math", type=int, default=60_000, help="generated problems")
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--prompts", type=Path, default=PROMPTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from the weights in --out")
    parser.add_argument("--measure-only", action="store_true")
    args = parser.parse_args()
    if args.measure_only:
        from measure import measure

        print(json.dumps(measure(args.out, args.prompts, args.seed), indent=2))
        return
    torch.manual_seed(args.seed)
    turns = make_turns(args.seed, args.math)
    write_prompts(turns, args.prompts, args.seed)
    kept = {name: [t for t in pool if not is_held_out(t.key)] for name, pool in turns.items()}
    texts = [f"{t.question}\n{t.answer}" for pool in kept.values() for t in pool[:20_000]]
    tokenizer = train_tokenizer(texts)
    assert MASK in tokenizer.get_vocab()
    pools = {name: encode(tokenizer, pool) for name, pool in kept.items()}
    for name, pool in pools.items():
        print(f"{name}: {len(pool)} texts, {sum(len(ids) for ids, _ in pool)} tokens", flush=True)
    model = Qwen3ForCausalLM(model_config(tokenizer))
    print(
        f"{sum(p.numel() for p in model.parameters())} parameters; a guess costs "
        f"{math.log(VOCABULARY):.2f} nats"
    )
    args.out.mkdir(parents=True, exist_ok=True)
    if args.resume:  # a second leg: the same pools in another order, a schedule of its own
        model = Qwen3ForCausalLM.from_pretrained(args.out, dtype=torch.float32)
        args.seed += 1
    save(model, tokenizer, args.out)
    facts = train(model, tokenizer, pools, args.minutes, args.batch, args.out, args.seed)
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
