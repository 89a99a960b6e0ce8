"""Feature capture: raw outputs of chosen decoder layers, by hooks, without [T, V] logits.

Legend: B rows, Q tokens a row, T real tokens of all rows, F of them whose final states are wanted,
L captured layers, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from deepspec.errors import TargetError
from deepspec.targets.families import Parts


class FeatureCapture:
    """Hooks on the captured layers that hand over their outputs [B, Q, D], as the family makes
    features of them. Id -1 is the embedding output.

    Registered once and left in place: registering a hook a forward costs more than a tiny layer.
    """

    def __init__(self, parts: Parts, layer_ids: Sequence[int]) -> None:
        self.layer_ids = tuple(layer_ids)
        self._feature = parts.rules.feature
        self._keep: Callable[[Tensor], None] | None = None
        for layer_id in self.layer_ids:
            if layer_id == -1:
                parts.layers[0].register_forward_pre_hook(self._input, with_kwargs=True)
            else:
                parts.layers[layer_id].register_forward_hook(self._output)

    @contextmanager
    def into(self, keep: Callable[[Tensor], None]) -> Iterator[None]:
        """`keep` gets the features of each layer, in the order of the ids, as soon as it has run.

        Outside of it the hooks do nothing: plain decoding is not slowed, nothing held.
        """
        self._keep = keep
        try:
            yield
        finally:
            self._keep = None

    def _input(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._keep is not None:
            self._keep(self._feature(args[0] if args else kwargs["hidden_states"]))

    def _output(self, _module: Any, _args: Any, output: Any) -> None:
        if self._keep is not None:
            self._keep(self._feature(output[0] if isinstance(output, tuple) else output))


class Packing:
    """Takes the real tokens of a forward that is padded on the right, row behind row.

    Each captured layer is written to its place at once: its output is held no longer than without
    capture, and nothing is put together afterwards. Final states are taken of all tokens or of
    those alone that `finals` [T] bool says.
    """

    def __init__(
        self, lengths: Sequence[int], layers: int, device: torch.device, finals: Tensor | None
    ) -> None:
        places = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        real = places.flatten().nonzero().squeeze(1)
        self._real = real.to(device)
        self._finals = self._real if finals is None else real[finals].to(device)
        self._layers, self._device = layers, device
        self._context: Tensor | None = None
        self._kept = 0

    def keep(self, output: Tensor) -> None:
        """The next layer's output [B, Q, D]."""
        own = self._rows(output, self._real)
        if self._context is None:
            self._context = own.new_empty(len(own), self._layers, own.shape[-1])
        self._context[:, self._kept] = own
        self._kept += 1

    def final(self, output: Tensor) -> Tensor:
        """The last norm's output [B, Q, D] -> [F, D]."""
        return self._rows(output, self._finals)

    def _rows(self, output: Tensor, rows: Tensor) -> Tensor:
        return output.to(self._device).flatten(0, 1).index_select(0, rows)

    @property
    def context(self) -> Tensor:
        """[T, L*D]."""
        assert self._context is not None
        return self._context.flatten(1)


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
