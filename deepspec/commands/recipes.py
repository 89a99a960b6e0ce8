"""List the shipped recipes.

A recipe is one YAML of choices; copy one, change it, and give its path as recipe=.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from deepspec.streams import show

SETTINGS = "none"
EXAMPLES = """\
  deepspec recipes
"""
HAS_CONFIG = False


def run(settings: Sequence[str], options: argparse.Namespace) -> None:
    """Print name and description of each."""
    from deepspec.config.loading import list_recipes
    from deepspec.config.resources import resource
    from deepspec.errors import ConfigError

    if settings:
        raise ConfigError(f"deepspec recipes takes no settings; found {' '.join(settings)}")
    recipes = list_recipes()
    width = max(len(name) for name, _ in recipes)
    for name, description in recipes:
        show(f"{name:{width}}  {description}")
    show()
    show(f"files: {resource('recipes')}")
