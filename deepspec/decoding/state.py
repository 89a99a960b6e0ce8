"""What the target keeps of running rows between forwards, and how it takes tokens back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, Self

from torch import Tensor

from deepspec.decoding.kv_cache import RowState
from deepspec.decoding.snapshot import SnapshotState
from deepspec.errors import TargetError
from deepspec.targets import Target, TargetEnds, TargetOutput
from deepspec.targets.families import ROWS


class TargetState(Protocol):
    """The tokens that B rows have fed to the target; two implementations, by `target.rollback`."""

    def forward(
        self,
        tokens: Tensor,
        starts: Tensor,
        end: int,
        with_context: bool,
        lengths: Sequence[int] | None = None,
    ) -> TargetOutput:
        """One target forward of `tokens` [B, Q] from positions `starts` [B].

        `end` = max(starts) + Q on the host. Row b has `lengths[b]` tokens (None: Q); behind them is
        padding, and the output there is rubbish.
        """

    def keep(self, counts: Sequence[int]) -> None:
        """Of the last forward's tokens, row b keeps the first `counts[b]`, at least one."""

    def select(self, rows: Sequence[int]) -> None:
        """Keep `rows`, in this order."""

    def join(self, other: Self) -> None:
        """Append the rows of `other`, of the same target, which is not used again."""


def open_state(target: Target, rows: int, fixed: int | None = None) -> TargetState:
    """A state of `rows` rows that have fed nothing yet; forwards of at most `fixed` tokens a row
    run compiled, None compiles nothing.

    Raises as `require_state`. A family without a proven rollback has a cache for rows in step:
    plain decoding takes nothing back.
    """
    require_state(target, compiled=fixed is not None)
    return RowState(target, fixed) if target.rollback == ROWS else SnapshotState(target, rows)


def require_state(target: TargetEnds, compiled: bool) -> None:
    """Raises TargetError where the target's attention takes no mask a row, or forwards are to be
    `compiled` and cannot be."""
    if target.rollback != ROWS:
        if compiled:
            raise TargetError(
                f"decoding.compile=true needs keys and values with a length a row, but target "
                f"family {target.family!r} decodes with target.rollback={target.rollback}; set "
                "decoding.compile=false"
            )
        return
    implementation = target.config._attn_implementation
    if implementation not in ("sdpa", "eager"):
        raise TargetError(
            f"target.attention={implementation} takes no mask with a length a row, which decoding "
            "needs; set target.attention=sdpa, or eager"
        )


def require_rollback(target: TargetEnds) -> None:
    """Raises TargetError where no way of taking tokens back is proven for the family."""
    if target.rollback is None:
        raise TargetError(
            f"target family {target.family!r} keeps a recurrent or compressed state, and no way to "
            "roll it back is proven: deepspec check target=PATH target.rollback=snapshot says "
            "whether that one holds; set it then. Training a drafter works without: set "
            "evaluation.enabled=false"
        )
