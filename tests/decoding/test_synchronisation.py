"""A round waits for its device once: for the answer that `download` fetches.

Counted on a CPU: operators whose result the host must see (PyTorch tags them; indices that are
masks are among them), and calls that would copy from a device.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from deepspec.decoding import Decoder, Sampling
from deepspec.decoding import decoder as module
from deepspec.drafters.dspark import DSparkProposer
from deepspec.targets import Target
from tests.decoding.test_lossless import prompts_of
from tests.export.conftest import make_drafter

COPIES = ("tolist", "cpu", "numpy")
SEEN_BY_HOST = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
SOMETIMES = ("aten::index", "aten::index_put", "aten::index_put_")  # where the index is a mask


class Waits(TorchDispatchMode):
    """The names of what would wait, while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        name = function.name().split(".")[0]
        if name in SOMETIMES:
            masks = [i for i in args[1] if i is not None and i.dtype == torch.bool]
            waits = bool(masks)
        else:
            waits = bool(SEEN_BY_HOST & set(function.tags))
        if waits:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def test_what_waits_is_seen() -> None:
    values = torch.arange(4)
    with Waits() as waits:
        values[values > 1]
        values.nonzero()
        values[1].item()
        values[torch.tensor([1, 2])]
    assert waits.names == ["aten::index", "aten::nonzero", "aten::_local_scalar_dense"]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, top_p=0.9)], ids=["t0", "t1"])
@pytest.mark.parametrize("batch", [1, 4])
def test_a_round_waits_once(
    target: Target, monkeypatch: pytest.MonkeyPatch, batch: int, sampling: Sampling
) -> None:
    drafter = make_drafter(target, "vanilla")
    proposer = DSparkProposer(drafter, target.embedding, target.head)
    decoder = Decoder(target, proposer, batch, [])
    rounds: list[list[str]] = []
    copies: list[str] = []
    round_, download = decoder._round, module.download

    def counted(name: str) -> Any:
        original = getattr(torch.Tensor, name)

        def copy(tensor: torch.Tensor, *args: Any) -> Any:
            copies.append(name)
            return original(tensor, *args)

        return copy

    def fetched(*parts: torch.Tensor) -> Any:
        before = list(copies)
        answer = download(*parts)
        copies[:] = [*before, "download"]
        return answer

    def watched(*args: Any) -> Any:
        copies.clear()
        with Waits() as waits:
            traces = round_(*args)
        rounds.append(copies + waits.names)
        return traces

    monkeypatch.setattr(module, "download", fetched)
    monkeypatch.setattr(decoder, "_round", watched)
    for name in COPIES:
        monkeypatch.setattr(torch.Tensor, name, counted(name))
    decoder.generate(prompts_of(batch), sampling, 12)
    assert len(rounds) > 2
    assert all(waits == ["download"] for waits in rounds), rounds
