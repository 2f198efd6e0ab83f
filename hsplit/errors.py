"""The two ways in which hsplit fails, and the exit code of each."""

from __future__ import annotations

NO_NUMBERS = "that are no numbers"
"""In every text about a tensor with entries that are NaN or infinite, by which such texts are told from others."""

MAX_TEXT = 4000
"""Characters of an error's text; what is longer quotes a file that nobody wants to read in a terminal."""


class HsplitError(Exception):
    """Base of every error that hsplit raises on purpose; its text is one line, made for the user.

    Whatever it quotes of a file, no character of it breaks the line or steers a terminal.
    """

    exit_code = 1

    def __str__(self) -> str:
        text = "".join(c if c.isprintable() else " " for c in super().__str__())
        return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 3] + "..."


class InputError(HsplitError):
    """Something that the user gave is wrong: ``where: what is wrong and what would be right``.

    Raised before anything starts; the command line prints it without a traceback and exits with 2.

    Args:
        text: the line.
        discreet: the same without a word of the data, where ``text`` quotes them: for those who may not see them.
    """

    exit_code = 2

    def __init__(self, text: str = "", discreet: str | None = None) -> None:
        super().__init__(text)
        self.discreet = text if discreet is None else discreet


class RunError(HsplitError):
    """A run failed while it was going on; the text names the actor and the round."""

    exit_code = 1


def os_reason(error: OSError) -> str:
    """Why the system refused, with the file where it is known: ``No space left on device: runs/x/metrics.csv``."""
    return f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")
