"""Feature capture: raw outputs of chosen decoder layers, by hooks, without [T, V] logits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from deepspec.errors import TargetError
from deepspec.targets.families import Parts


class FeatureCapture:
    """Hooks on the captured layers that keep their last outputs, as the family makes features of
    them. Id -1 is the embedding output.

    Registered once and left in place: registering a hook a forward costs more than a tiny layer.
    """

    def __init__(self, parts: Parts, layer_ids: Sequence[int]) -> None:
        self.layer_ids = tuple(layer_ids)
        self._feature = parts.rules.feature
        self._outputs: dict[int, Tensor] = {}
        self._wanted = False
        for layer_id in self.layer_ids:
            if layer_id == -1:
                parts.layers[0].register_forward_pre_hook(self._keep_input, with_kwargs=True)
            else:
                parts.layers[layer_id].register_forward_hook(self._keep_output(layer_id))

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Outside of it the hooks keep nothing: plain decoding is not slowed, nothing held."""
        self._wanted = True
        try:
            yield
        finally:
            self._wanted = False

    def take(self) -> Tensor:
        """[B, T, L*D] of the forward just run, where its first layer is; forgets it."""
        outputs = [self._outputs[layer_id] for layer_id in self.layer_ids]
        self._outputs.clear()
        return torch.cat([output.to(outputs[0].device) for output in outputs], dim=-1)

    def _keep_input(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._wanted:
            self._outputs[-1] = self._feature(args[0] if args else kwargs["hidden_states"])

    def _keep_output(self, layer_id: int) -> Any:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            if self._wanted:
                states = output[0] if isinstance(output, tuple) else output
                self._outputs[layer_id] = self._feature(states)

        return hook


def default_layer_ids(num_layers: int, count: int) -> list[int]:
    """`count` ids evenly spaced from 1 to num_layers - 3.

    Gives the released choice: 36 layers, 5 ids -> [1, 9, 17, 25, 33].
    """
    last = num_layers - 3
    if count < 1 or last - 1 < count - 1:
        raise TargetError(
            f"target.num_layer_ids={count} does not fit a target of {num_layers} layers; "
            f"choose 1 to {max(last, 1)}, or give target.layer_ids"
        )
    if count == 1:
        return [last]
    return [round(1 + i * (last - 1) / (count - 1)) for i in range(count)]


def check_layer_ids(
    layer_ids: Sequence[int], num_layers: int, last_layer: bool = False
) -> list[int]:
    """Raises TargetError unless ids ascend strictly within [-1, num_layers - 2].

    The last layer is excluded, but for families with `last_layer`: its output is what `final` is
    made of.
    """
    ids, highest = list(layer_ids), num_layers - 1 if last_layer else num_layers - 2
    if not ids or ids != sorted(set(ids)):
        raise TargetError(f"target.layer_ids={ids} must be distinct and ascending, at least one")
    if ids[0] < -1 or ids[-1] > highest:
        why = " (the last layer is never captured)" if ids[-1] == num_layers - 1 else ""
        raise TargetError(
            f"target.layer_ids={ids} must lie between -1 (the embedding) and {highest} for "
            f"a target of {num_layers} layers{why}"
        )
    return ids
