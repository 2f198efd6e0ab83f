"""Progress of slow preparations, as stages with elapsed time on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from hsplit.waiting import Waiting

Stage = Callable[[str], AbstractContextManager[None]]


@contextmanager
def stages(progress: bool) -> Iterator[Stage]:
    """Yield ``stage``, used as ``with stage("converting"): ...``; each shows a line with its elapsed time.

    Written to stderr, because stdout belongs to what a command was asked for. When ``progress`` is False, only a
    stage that takes long is told of; where stderr is no terminal only the finished lines appear.
    """
    columns = (SpinnerColumn(finished_text="✓"), TextColumn("{task.description}"), TimeElapsedColumn())
    # Bound to today's stderr on purpose: a stage may redirect sys.stderr to hush a library without hushing
    # this.
    said = sys.stderr
    console = Console(file=said)
    with Progress(*columns, console=console, disable=not progress) as bar:

        @contextmanager
        def stage(description: str) -> Iterator[None]:
            task = bar.add_task(description, total=None)
            if progress:
                yield
            else:
                with Waiting(description, stream=said):
                    yield
            # Only a stage that ended well is ticked off; one that raised keeps its spinner's last frame.
            bar.update(task, total=1, completed=1)

        yield stage
