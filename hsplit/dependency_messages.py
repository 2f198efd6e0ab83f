"""What dependencies say that is not for users' eyes."""

from __future__ import annotations

import logging


def quieten_bitsandbytes() -> None:
    """Keep back what bitsandbytes says when it is imported on a CPU: of an optional kernel for inference.

    Call it before whatever imports it, as PEFT does. Errors are still said.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
