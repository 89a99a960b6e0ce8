"""What a published file may say of a path."""

from __future__ import annotations

import re
from pathlib import Path

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def public_name(path: str) -> str:
    """A hub name as it is; of a local path only its last part, because exports are published."""
    local = path.startswith((".", "/", "~")) or Path(path).exists()
    if HUB_NAME.fullmatch(path) and not local:
        return path
    return Path(path).name
