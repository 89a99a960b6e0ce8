"""The `deepspec` command: `deepspec COMMAND key=value ... [--cfg]`.

Command modules import what they need when they run, so that --help answers at once.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import sys
from collections.abc import Sequence
from types import ModuleType

from deepspec import __version__
from deepspec.errors import DeepSpecError, Interrupted
from deepspec.processes import end_with_launchers, rank
from deepspec.secrets import mask_streams
from deepspec.streams import drop_unread, escape_unknown_signs, tell

COMMANDS = (
    "plan",
    "train",
    "regenerate",
    "extract",
    "verify-store",
    "serve-target",
    "evaluate",
    "calibrate",
    "profile",
    "load",
    "simulate",
    "export",
    "check",
    "reproduce",
    "recipes",
    "doctor",
)
RESUMED = ("train", "regenerate", "extract", "reproduce")  # stopped, they go on
LISTINGS = ("plan", "recipes")  # all that they make is what they print
UNREAD = 128 + 13  # SIGPIPE
FULL = {  # what helps
    errno.ENOSPC: "free disk space",
    errno.EDQUOT: "free some of your quota of disk space",
    errno.EFBIG: "raise the limit of the size of files (ulimit -f)",
}
NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command. Exit codes: 0; 1 where a check does not hold; 2 for a mistake of the user's;
    128 + n after signal n, and as after SIGPIPE where nobody read the results to their end."""
    if arguments is None:  # a program of its own
        end_with_launchers()
    parser, commands = _parser()
    # argparse takes key=value words before the first flag only; those behind it come as a rest
    options, rest = parser.parse_known_args(arguments)
    if flags := [word for word in rest if word.startswith("-")]:
        bare = flags[0].lstrip("-")
        hint = f"did you mean {bare}?" if "=" in bare else "flags stand behind the command"
        parser.error(f"unknown flag {flags[0]}; {hint}")
    if options.command is None:
        parser.print_help()
        return
    escape_unknown_signs()
    mask_streams()
    listing = options.command in LISTINGS or getattr(options, "cfg", False)
    try:
        commands[options.command].run(options.settings + rest, options)
        sys.stdout.flush()
    except Interrupted as stop:
        if rank() == 0:
            tell(f"stopped; {stop.saved} is saved and the same command goes on")
        sys.exit(stop.exit_code)
    except KeyboardInterrupt:
        how = "goes on where it stopped" if options.command in RESUMED else "begins anew"
        tell(f"interrupted; the same command {how}")
        sys.exit(130)
    except SystemExit as end:
        # rich's answer to a reader that left, which would read as a check that does not hold
        if isinstance(end.__context__, BrokenPipeError):
            sys.exit(0 if listing else UNREAD)
        raise
    except (DeepSpecError, OSError) as error:  # OSError: a full disk, a place without permission
        if isinstance(error, BrokenPipeError) and drop_unread():  # `deepspec recipes | head`
            sys.exit(0 if listing else UNREAD)
        if options.traceback:
            raise
        tell(f"error: {in_words(error)}")
        sys.exit(2)


def in_words(error: Exception) -> str:
    """One line; of a file that cannot be written or read, its name, the reason and a way out."""
    if not isinstance(error, OSError) or error.filename is None:
        return str(error)
    way_out = ""
    if error.errno in FULL:
        helps = FULL[error.errno]
        way_out = f"; {helps}, or choose another place (out=), and start the command again"
    elif error.errno in NOT_ALLOWED:
        way_out = "; change its permissions, or choose another place (out=)"
    return f"{error.filename}: {error.strerror}{way_out}"


def _parser() -> tuple[argparse.ArgumentParser, dict[str, ModuleType]]:
    parser = argparse.ArgumentParser(
        prog="deepspec",
        description="Distil a speculative-decoding drafter from your own frozen target model.",
        epilog="Begin with: deepspec train recipe=tiny",
    )
    parser.add_argument("--version", action="version", version=f"deepspec {__version__}")
    # the deepspeed launcher says it twice; LOCAL_RANK is what counts
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands = {}
    for name in COMMANDS:
        command = commands[name] = importlib.import_module(
            f"deepspec.commands.{name.replace('-', '_')}"
        )
        summary = (command.__doc__ or "").splitlines()[0]
        sub = subparsers.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=f"examples:\n{command.EXAMPLES.rstrip()}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.add_argument("settings", nargs="*", metavar="key=value", help=command.SETTINGS)
        sub.add_argument("--traceback", action="store_true", help="show where an error came from")
        if command.HAS_CONFIG:
            sub.add_argument(
                "--cfg", action="store_true", help="print the resolved config and do nothing else"
            )
    return parser, commands
