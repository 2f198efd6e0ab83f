"""How long a client may take for its part of a step before the others go on without it."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict, deque

# Medians are of the last so many times, and are trusted from so many on.
_REMEMBERED = 21
_TRUSTED = 3
# Added to every deadline: what messages and a busy machine may take beside the client's own work.
SLACK_S = 2.0


class Deadlines:
    """Measured times of each client's calls, and the deadlines that follow from them.

    Args:
        multiple: of the median (``job.faults.deadline``); ``None``: nobody has a deadline.
    """

    def __init__(self, multiple: float | None) -> None:
        self._multiple = multiple
        self._measured: dict[tuple[str, str], deque[float]] = defaultdict(lambda: deque(maxlen=_REMEMBERED))

    def took(self, client: str, method: str, seconds: float) -> None:
        """Remember that one call took ``seconds`` by the client's own clock."""
        self._measured[client, method].append(seconds)

    def until(self, client: str, method: str, calls: int) -> float | None:
        """When ``calls`` calls that are asked for now must have been answered, by ``time.monotonic``."""
        measured = self._measured[client, method]
        if self._multiple is None or len(measured) < _TRUSTED:
            return None
        return time.monotonic() + SLACK_S + self._multiple * calls * statistics.median(measured)
