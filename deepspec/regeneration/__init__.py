"""Answers by the target, in process or through an OpenAI-compatible server."""

from deepspec.regeneration.answers import (
    Answerer,
    RegenerationCounts,
    load_answers,
    regenerate,
)
from deepspec.regeneration.in_process import TargetAnswerer
from deepspec.regeneration.server import ServerAnswerer
from deepspec.regeneration.together import regenerate_together

__all__ = [
    "Answerer",
    "RegenerationCounts",
    "ServerAnswerer",
    "TargetAnswerer",
    "load_answers",
    "regenerate",
    "regenerate_together",
]
