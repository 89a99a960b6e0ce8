"""One file a subcommand, thin: read the settings, call a room, print.

A command module has a docstring (its first line is the summary), `SETTINGS` and `EXAMPLES` for
--help, `HAS_CONFIG`, and `run(settings, options)`.
"""
