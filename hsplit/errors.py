"""The two kinds of errors of hsplit, with their exit codes."""

from __future__ import annotations

NO_NUMBERS = "that are no numbers"
"""Part of every error text about NaN or infinite entries of a tensor, by which such texts are recognised."""

MAX_TEXT = 4000
"""Most characters of an error's text; a longer one quotes a file."""


class HsplitError(Exception):
    """Base of all errors that hsplit raises on purpose; the text is one line for the user.

    Characters that would break the line or control a terminal are replaced, also in quoted files.
    """

    exit_code = 1

    def __str__(self) -> str:
        text = "".join(c if c.isprintable() else " " for c in super().__str__())
        return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 3] + "..."


class InputError(HsplitError):
    """Wrong input of the user: ``where: what is wrong and what would be right``.

    Raised before anything starts; the command line prints it without a traceback and exits with 2.

    Args:
        text: the line.
        discreet: the line without data, where ``text`` quotes some: for readers that may not see them.
    """

    exit_code = 2

    def __init__(self, text: str = "", discreet: str | None = None) -> None:
        super().__init__(text)
        self.discreet = text if discreet is None else discreet


class RunError(HsplitError):
    """Failure of a run under way; the text names the actor and the round."""

    exit_code = 1


def os_reason(error: OSError) -> str:
    """The system's reason, with the file if it is known: ``No space left on device: runs/x/metrics.csv``."""
    return f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")


def error_text(error: BaseException) -> str:
    """An error's text on one line; its class where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
