"""Tables and colours on a terminal that texts of others can neither colour nor steer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from deepspec.streams import visible


class Terminal(Console):
    """A console without markup; `[red]` in a name is text, and so are control characters.

    Lines are kept: what has to stay on one line, such as a name, is passed through `visible`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """See `Console.render`."""
        for segment in super().render(renderable, options):
            text, style, control = segment
            yield segment if control else Segment(visible(text, lines=True), style)
