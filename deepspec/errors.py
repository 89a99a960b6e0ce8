"""Every error a user can cause.

Each message says what was found, what was expected, and which key or file to change. The command
line prints the message alone and exits with code 2; library callers catch `DeepSpecError`.
"""


class DeepSpecError(Exception):
    """Base of all errors a user can mend. Printed without a traceback, exit code 2."""


class ConfigError(DeepSpecError):
    """A key is unknown, of the wrong type, out of range, or in conflict with another key."""


class DataError(DeepSpecError):
    """Prompts or conversations are missing, malformed, or none of them is usable."""


class TemplateError(DeepSpecError):
    """The tokenizer's chat template is missing or gives no usable loss mask."""


class TemplateRefusal(TemplateError):
    """One answer or conversation cannot be brought to what the target emits.

    `reason`: a few words to count it by.
    """

    def __init__(self, message: str, reason: str = "refused by the chat template") -> None:
        super().__init__(message)
        self.reason = reason


class TargetError(DeepSpecError):
    """The target is missing, of an unsupported kind, or cannot give what was asked of it."""


class CheckpointError(DeepSpecError):
    """A checkpoint or export is missing, corrupt, or made for another target."""


class ServerError(DeepSpecError):
    """A generation server is unreachable or answers with something unusable."""


class TrainingError(DeepSpecError):
    """Training cannot go on: NaN loss, or no usable samples."""


class InUseError(DeepSpecError):
    """Another process is writing the file or folder that this one was to write."""


class LostContactError(DeepSpecError):
    """Another process of the job does not answer: its machine, the network or itself failed."""


class MissingDependencyError(DeepSpecError):
    """An optional package is needed for what was asked; the message says how to install it."""


def first_line(error: object) -> str:
    """The first line of what a library's error says; the others seldom help who reads them."""
    return next(iter(str(error).strip().splitlines()), "")


class Interrupted(BaseException):
    """SIGTERM or Ctrl-C, once the checkpoint was saved. Exit code 128 + signal number."""

    def __init__(self, number: int, saved: str) -> None:
        super().__init__(number)
        self.exit_code = 128 + number
        self.saved = saved
