"""Progress of slow preparations, as stages with elapsed time on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

Stage = Callable[[str], AbstractContextManager[None]]


@contextmanager
def stages(progress: bool) -> Iterator[Stage]:
    """Yield ``stage``, used as ``with stage("converting"): ...``; each shows a line with its elapsed time.

    Written to stderr, because stdout belongs to what a command was asked for. Nothing is written when
    ``progress`` is False, and where stderr is no terminal only the finished lines appear.
    """
    columns = (SpinnerColumn(finished_text="✓"), TextColumn("{task.description}"), TimeElapsedColumn())
    # Bound to today's stderr on purpose: a stage may redirect sys.stderr to hush a library without hushing
    # this.
    console = Console(file=sys.stderr)
    with Progress(*columns, console=console, disable=not progress) as bar:

        @contextmanager
        def stage(description: str) -> Iterator[None]:
            task = bar.add_task(description, total=None)
            yield
            # Only a stage that ended well is ticked off; one that raised keeps its spinner's last frame.
            bar.update(task, total=1, completed=1)

        yield stage
