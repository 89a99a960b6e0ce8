"""Reading a target's config, whose layers may differ."""

from __future__ import annotations

from typing import Any


def common(text: Any, name: str) -> Any:
    """`text.name`, or None where there is none for all layers: some targets (Gemma 4) give layers
    head dimensions of their own, and Transformers then refuses to name one."""
    try:
        return getattr(text, name, None)
    except RuntimeError:
        return None
