"""How far a run is, and how long the rest will take."""

from __future__ import annotations

import time
from collections.abc import Callable

from hsplit.observe.wording import duration_text


class Pace:
    """Local steps done out of all, with the time per step measured over all that this process did.

    The mean since the start, unlike that of the last seconds, has aggregation and validation in it.

    Args:
        clock: seconds, increasing.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._first: int | None = None
        self.done = 0
        self.total = 0
        self.begin()

    def begin(self) -> None:
        """Count from now on."""
        self._begun = self._first_time = self._last_time = self._clock()

    def step(self, step: int, steps: int) -> None:
        """Step ``step`` of ``steps`` is done, counted from 1 over the whole run."""
        self.done, self.total = step, steps
        self._last_time = self._clock()
        if self._first is None:
            # the first has warm-up in it, and what a resumed run did earlier took none of this time
            self._first, self._first_time = step, self._last_time

    @property
    def share(self) -> float:
        """Of all steps, from 0 to 1."""
        return self.done / self.total if self.total else 0.0

    @property
    def elapsed_s(self) -> float:
        """Since this process began."""
        return self._clock() - self._begun

    @property
    def left_s(self) -> float | None:
        """Predicted time left; None until two steps are done."""
        if self._first is None or self.done <= self._first:
            return None
        per_step = (self._last_time - self._first_time) / (self.done - self._first)
        # What ends a round may take longer than a step; the steps that come after it are still to be done.
        since_last = min(self._clock() - self._last_time, per_step)
        return max(0.0, (self.total - self.done) * per_step - since_last)

    def __str__(self) -> str:
        left = self.left_s
        rest = "" if not left else f", about {duration_text(left)} left"
        return f"{self.share:.0%}, {duration_text(round(self.elapsed_s))} elapsed{rest}"
