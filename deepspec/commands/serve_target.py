"""Serve the target's features to trainers on other machines.

They are started with features=remote features.servers=[http://host:port,...]. The variable
DEEPSPEC_TOKEN, where set, is the bearer token that both sides need.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

SETTINGS = "recipe=R and overrides of the config, such as serve.port=8300"
EXAMPLES = """\
  deepspec serve-target recipe=tiny
  DEEPSPEC_TOKEN=... deepspec serve-target recipe=qwen3 serve.host=0.0.0.0 serve.dtype=float8
"""
HAS_CONFIG = True


def run(settings: Sequence[str], options: argparse.Namespace) -> None:
    """Load the target and serve until stopped."""
    import ipaddress

    from deepspec.commands.settings import print_config, recipe_config
    from deepspec.errors import ConfigError, MissingDependencyError

    config = recipe_config(settings)
    if options.cfg:
        print_config(config)
        return
    from deepspec.features.remote import TOKEN
    from deepspec.secrets import token_of

    try:
        from deepspec.features.server import serve
    except ImportError as error:
        raise MissingDependencyError(
            f"serve-target needs {error.name}; run: pip install 'deepspec[serve]'"
        ) from error
    token = token_of(TOKEN)
    host = config.serve.host
    try:
        open_to_others = not ipaddress.ip_address(host).is_loopback
    except ValueError:
        open_to_others = host != "localhost"
    if open_to_others and token is None:
        raise ConfigError(
            f"serve.host={host} can be reached from other machines: set the variable {TOKEN} to a "
            "secret that trainers are given too, or take serve.host=127.0.0.1"
        )
    from deepspec.commands.stages import open_target

    serve(open_target(config), config.serve, token)
