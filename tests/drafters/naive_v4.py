"""The V4-native drafter by its equations (checkpoint-formats.md, "Forward" 1-8), in loops."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from deepspec.drafters.dspark_v4 import DSparkV4Drafter


class Naive:
    """One block at a time, one slot, one head, one key; `w` are the drafter's tensors by name."""

    def __init__(self, drafter: DSparkV4Drafter, embedding: Tensor) -> None:
        self.c, self.w, self.embedding = drafter.config, drafter.state_dict(), embedding

    def rms(self, x: Tensor, name: str | None = None) -> Tensor:
        normed = x / math.sqrt(float((x * x).mean()) + self.c.rms_norm_eps)
        return normed if name is None else normed * self.w[name]

    def turn(self, x: Tensor, position: int, back: bool = False) -> Tensor:
        """Pairs (2i, 2i + 1) of the last R dimensions by position * theta^(-2i/R), in fp32."""
        rope, x = self.c.qk_rope_head_dim, x.clone()
        first = len(x) - rope
        for i in range(rope // 2):
            frequency = 1.0 / self.c.rope_theta ** (torch.tensor(2.0 * i) / rope)
            angle = torch.tensor(float(position)) * frequency
            cos, sin = float(angle.cos()), float(angle.sin()) * (-1 if back else 1)
            a, b = float(x[first + 2 * i]), float(x[first + 2 * i + 1])
            x[first + 2 * i] = a * cos - b * sin
            x[first + 2 * i + 1] = a * sin + b * cos
        return x

    def mixes(self, x: Tensor, name: str) -> Tensor:
        flat = torch.cat(list(x))
        return (
            self.w[f"{name}.fn"]
            @ flat
            / math.sqrt(float((flat * flat).mean()) + self.c.rms_norm_eps)
        )

    def hyper(self, streams: list[Tensor], name: str, block: Any) -> list[Tensor]:
        """hc_pre, the block over all slots, hc_post; `streams`: [n, D] a slot."""
        n, eps = self.c.hc_mult, self.c.hc_eps
        scale, base = self.w[f"{name}.scale"], self.w[f"{name}.base"]
        entered, posts, combs = [], [], []
        for x in streams:
            m = self.mixes(x, name)
            pre = [torch.sigmoid(m[k] * scale[0] + base[k]) + eps for k in range(n)]
            posts.append([2 * torch.sigmoid(m[n + k] * scale[1] + base[n + k]) for k in range(n)])
            comb = torch.zeros(n, n, dtype=x.dtype)
            for j in range(n):
                row = slice(2 * n + j * n, 2 * n + (j + 1) * n)
                comb[j] = torch.softmax(m[row] * scale[2] + base[row], 0) + eps
            for k in range(n):
                comb[:, k] = comb[:, k] / (comb[:, k].sum() + eps)
            for _ in range(19):
                for j in range(n):
                    comb[j] = comb[j] / (comb[j].sum() + eps)
                for k in range(n):
                    comb[:, k] = comb[:, k] / (comb[:, k].sum() + eps)
            combs.append(comb)
            entered.append(sum(pre[k] * x[k] for k in range(n)))
        left = block(entered)
        return [
            torch.stack([post[k] * y + sum(comb[j, k] * x[j] for j in range(n)) for k in range(n)])
            for x, y, post, comb in zip(streams, left, posts, combs, strict=True)
        ]

    def latent(self, x: Tensor, position: int, stage: str) -> Tensor:
        kv = self.rms(self.w[f"{stage}.attn.wkv.weight"] @ x, f"{stage}.attn.kv_norm.weight")
        return self.turn(kv, position)

    def attention(self, block: list[Tensor], stage: str, past: list[Tensor], anchor: int) -> Any:
        """Every slot over `past` latents and those of the whole block, and a sink a head."""
        w, c, name = self.w, self.c, f"{stage}.attn"
        seen = past + [self.latent(x, anchor + slot, stage) for slot, x in enumerate(block)]
        outputs = []
        for slot, x in enumerate(block):
            q = w[f"{name}.wq_b.weight"] @ self.rms(
                w[f"{name}.wq_a.weight"] @ x, f"{name}.q_norm.weight"
            )
            heads = []
            for h in range(c.num_attention_heads):
                query = self.turn(self.rms(q[h * c.head_dim : (h + 1) * c.head_dim]), anchor + slot)
                scores = [float(query @ key) / math.sqrt(c.head_dim) for key in seen]
                sink = float(w[f"{name}.attn_sink"][h])
                total = sum(math.exp(score) for score in scores) + math.exp(sink)
                mixed = sum(
                    math.exp(score) / total * value
                    for score, value in zip(scores, seen, strict=True)
                )
                heads.append(self.turn(mixed, anchor + slot, back=True))
            group = torch.cat(heads).reshape(c.o_groups, -1)
            wo_a = w[f"{name}.wo_a.weight"].reshape(c.o_groups, c.o_lora_rank, -1)
            lowered = torch.cat([wo_a[g] @ group[g] for g in range(c.o_groups)])
            outputs.append(w[f"{name}.wo_b.weight"] @ lowered)
        return outputs

    def expert(self, x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
        limit = self.c.swiglu_limit
        gate, up = (w1 @ x).clamp(max=limit), (w3 @ x).clamp(-limit, limit)
        return w2 @ (gate / (1 + torch.exp(-gate)) * up)

    def experts(self, x: Tensor, stage: str) -> Tensor:
        w, name = self.w, f"{stage}.ffn"
        scores = [
            math.sqrt(math.log1p(math.exp(float(row @ x)))) for row in w[f"{name}.gate.weight"]
        ]
        biased = [s + float(b) for s, b in zip(scores, w[f"{name}.gate.bias"], strict=True)]
        chosen = sorted(range(len(scores)), key=lambda e: -biased[e])
        chosen = chosen[: self.c.num_experts_per_tok]
        total = sum(scores[e] for e in chosen)
        shared = [w[f"{name}.shared_experts.w{i}.weight"] for i in (1, 2, 3)]
        output = self.expert(x, *shared)
        for e in chosen:
            own = [w[f"{name}.experts.{e // 16}.w{i}"][e % 16] for i in (1, 2, 3)]
            weight = scores[e] / total * self.c.routed_scaling_factor
            output = output + weight * self.expert(x, *own)
        return output

    def block(self, context: Tensor, token: int, anchor: int) -> Tensor:
        """States [K, D] of the block after `token` at `anchor`; `context` [T, L*D] of its text."""
        c, w = self.c, self.w
        tokens = [token] + [c.mask_token_id] * (c.block_size - 1)
        streams = [torch.stack([self.embedding[t]] * c.hc_mult) for t in tokens]
        window = range(max(0, anchor - c.sliding_window), anchor)
        main = {t: self.rms(w["main_proj.weight"] @ context[t], "main_norm.weight") for t in window}
        for index in range(c.num_layers):
            stage = f"stages.{index}"
            past = [self.latent(x, t, stage) for t, x in main.items()]

            def attention(entered: list[Tensor], stage: str = stage, past: Any = past) -> Any:
                normed = [self.rms(x, f"{stage}.attn_norm.weight") for x in entered]
                return self.attention(normed, stage, past, anchor)

            def experts(entered: list[Tensor], stage: str = stage) -> Any:
                return [
                    self.experts(self.rms(x, f"{stage}.ffn_norm.weight"), stage) for x in entered
                ]

            streams = self.hyper(streams, f"{stage}.hc_attn", attention)
            streams = self.hyper(streams, f"{stage}.hc_ffn", experts)
        states = []
        for x in streams:
            pre = torch.sigmoid(self.mixes(x, "hc_head") * w["hc_head.scale"] + w["hc_head.base"])
            states.append(sum((pre[k] + c.hc_eps) * x[k] for k in range(c.hc_mult)))
        return torch.stack(states)
