"""A mixture of experts and one that everything goes through.

Experts lie in groups, whose weights are one tensor each, [X, ..]; the layout has them one by one. A
group is what ZeRO-3 gathers, and lets go, at a time. Legend: S slots, X experts of a group, k of
all experts a slot, M times that a slot goes to an expert of the group, D hidden size, I width of an
expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepspec.drafters.dspark_v4.config import DSparkV4Config

GROUP = 16


class Router(nn.Module):
    """Which experts a slot goes to, and how much each counts: score sqrt(softplus(W x)).

    The bias has a say in which, not in how much, so no gradient reaches it. It stays as it was
    loaded, zero in a new drafter. V4's own training moves it by the experts' loads to balance them;
    here that would take the loads of a whole step, of all its micro-batches and processes.
    """

    bias: Tensor

    def __init__(self, config: DSparkV4Config) -> None:
        super().__init__()
        self.chosen = config.num_experts_per_tok
        self.scaling = config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.register_buffer("bias", torch.zeros(config.n_routed_experts))

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """[S, D] -> experts [S, k] int64 and their weights [S, k]; at least fp32."""
        with torch.autocast(states.device.type, enabled=False):
            states = states.to(torch.promote_types(states.dtype, torch.float32))
            logits = F.linear(states, self.weight.to(states.dtype))
            with torch.no_grad():
                experts = (_score(logits) + self.bias).topk(self.chosen, dim=-1).indices
            # scored again: the root of an expert far from being chosen has no finite slope
            weights = _score(logits.gather(-1, experts))
            return experts, weights / weights.sum(-1, keepdim=True) * self.scaling


def _score(logits: Tensor) -> Tensor:
    return F.softplus(logits).sqrt()


class ExpertGroup(nn.Module):
    """Experts side by side, w2 (silu(w1 x) * w3 x) each."""

    def __init__(self, config: DSparkV4Config, count: int) -> None:
        super().__init__()
        hidden, width = config.hidden_size, config.moe_intermediate_size
        self.limit = config.swiglu_limit
        self.w1 = nn.Parameter(torch.empty(count, width, hidden))
        self.w2 = nn.Parameter(torch.empty(count, hidden, width))
        self.w3 = nn.Parameter(torch.empty(count, width, hidden))

    def forward(self, states: Tensor, weights: Tensor, rows: Tensor, loads: list[int]) -> Tensor:
        """What the group adds to each slot: `states` [S, D] -> [S, D] in the weights' dtype.

        To its experts go the slots `rows` [M], those of one after those of another, `loads` [X]
        each; their outputs count `weights` [M].
        """
        kind = states.device.type
        work = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype
        routed: Tensor = Routed.apply(
            states, weights, self.w1, self.w2, self.w3, rows, loads, self.limit, work
        )
        return routed


class Routed(torch.autograd.Function):
    """Slots through a group's experts, and the gradients, one expert at a time.

    By hand for the memory: autograd would keep a cast of every expert's weights, and make each
    stacked gradient twice, out of one for each expert. Kept here are gate and up. With a the
    product of silu and up, y = a w2^T, and G the gradient of a slot's output:

        d weight = <G, y> = <G w2, a>        d a = weight G w2
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weights: Tensor,
        w1: Tensor,
        w2: Tensor,
        w3: Tensor,
        rows: Tensor,
        loads: list[int],
        limit: float,
        work: torch.dtype,
    ) -> Tensor:
        ctx.loads, ctx.limit, ctx.work = loads, limit, work
        own, share = states.to(work), weights[:, None]
        gate, up = own.new_empty(2, len(rows), w1.shape[1]).unbind()
        output = weights.new_zeros(states.shape)
        with torch.autocast(states.device.type, enabled=False):
            for expert, part in _parts(loads):
                entered = own[rows[part]]
                gate[part] = entered @ w1[expert].to(work).T
                up[part] = entered @ w3[expert].to(work).T
                left = swiglu(gate[part], up[part], limit) @ w2[expert].to(work).T
                output.index_add_(0, rows[part], left * share[part])
        ctx.save_for_backward(states, weights, w1, w2, w3, rows, gate, up)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        states, weights, w1, w2, w3, rows, gate, up = ctx.saved_tensors
        work, share = ctx.work, weights[:, None]
        own, grad = states.to(work), gradients[0].to(work)
        to_states, to_weights = torch.zeros_like(gradients[0]), torch.empty_like(weights)
        to_w1, to_w2, to_w3 = torch.zeros_like(w1), torch.zeros_like(w2), torch.zeros_like(w3)
        for expert, part in _parts(ctx.loads):
            with torch.enable_grad():
                pair = [tensor[part].detach().requires_grad_() for tensor in (gate, up)]
                inner = swiglu(pair[0], pair[1], ctx.limit)
            entered, behind = own[rows[part]], grad[rows[part]]
            back = behind @ w2[expert].to(work)
            to_weights[part] = (back * inner.detach()).sum(-1).to(weights.dtype)
            to_gate, to_up = torch.autograd.grad(inner, pair, (back * share[part]).to(work))
            to_w1[expert], to_w3[expert] = to_gate.T @ entered, to_up.T @ entered
            to_w2[expert] = (behind * share[part]).to(work).T @ inner.detach()
            entering = to_gate @ w1[expert].to(work) + to_up @ w3[expert].to(work)
            to_states.index_add_(0, rows[part], entering.to(to_states.dtype))
        found = (to_states.to(states.dtype), to_weights, to_w1, to_w2, to_w3)
        return (*found, None, None, None, None)


def _parts(loads: list[int]) -> Iterator[tuple[int, slice]]:
    """The experts that have slots, each with the place of its slots in their order."""
    end = 0
    for expert, load in enumerate(loads):
        end += load
        if load:
            yield expert, slice(end - load, end)


class SharedExpert(nn.Module):
    """The expert of every slot."""

    def __init__(self, config: DSparkV4Config) -> None:
        super().__init__()
        hidden, width = config.hidden_size, config.moe_intermediate_size
        self.limit = config.swiglu_limit
        self.w1 = nn.Linear(hidden, width, bias=False)
        self.w2 = nn.Linear(width, hidden, bias=False)
        self.w3 = nn.Linear(hidden, width, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        """[.., D] -> [.., D]."""
        return self.w2(swiglu(self.w1(states), self.w3(states), self.limit))


class MixtureOfExperts(nn.Module):
    """The sum of both."""

    def __init__(self, config: DSparkV4Config) -> None:
        super().__init__()
        count = config.n_routed_experts
        self.gate = Router(config)
        self.experts = nn.ModuleList(
            ExpertGroup(config, min(GROUP, count - first)) for first in range(0, count, GROUP)
        )
        self.shared_experts = SharedExpert(config)

    def forward(self, states: Tensor) -> Tensor:
        """[.., D] -> [.., D]."""
        slots = states.flatten(0, -2)
        chosen, weights = self.gate(slots)
        order = chosen.flatten().argsort(stable=True)  # what goes to one expert, side by side
        counts = torch.bincount(chosen.flatten(), minlength=len(self.gate.bias))
        loads = [part.tolist() for part in counts.cpu().split(GROUP)]
        sizes = [sum(own) for own in loads]
        rows = (order // chosen.shape[1]).split(sizes)
        shares = weights.flatten()[order].split(sizes)
        output = self.shared_experts(slots)
        # groups without a slot too: all processes gather the same under ZeRO-3
        for group, share, own, load in zip(self.experts, shares, rows, loads, strict=True):
            output = output + group(slots, share, own, load)
        return output.view(states.shape)


def swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """silu(gate) * up, the gate clamped from above and `up` from both sides."""
    return F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)
