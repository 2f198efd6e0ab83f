"""The one class that Ray makes actors of: a plain object in a process whose threads are settled first."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from hsplit.dependency_messages import quieten_bitsandbytes


def settle_process(threads: int | None, sharing: int = 1) -> None:
    """Fix the number of threads, and keep libraries' chatter off the user's terminal.

    Processes with idle thread pools fight over cores. A client therefore runs as many threads as it reserved CPUs,
    one by default, which needs no pool; the server computes while the clients wait and uses every core of its node,
    of which several servers there have equal parts.
    """
    import torch
    import transformers

    torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) // sharing))
    transformers.logging.set_verbosity_error()
    quieten_bitsandbytes()


class ActorShell:
    """Holds an actor's plain object and calls its methods.

    Args:
        name: the actor's in the run.
        make: makes the object, in the actor's process.
        threads: that it computes with; ``None``: every core of its node, shared by ``sharing`` servers.
        sharing: how many servers the node has.
    """

    def __init__(self, name: str, make: Callable[[], Any], threads: int | None, sharing: int = 1) -> None:
        # First: Ray asks for the representation of an actor whose making has failed, too.
        self._name = name
        self.actor: Any = None
        settle_process(threads, sharing)
        self.actor = make()
        self._returned: dict[tuple[int, int], Any] = {}

    def __repr__(self) -> str:
        # Shown by Ray's dashboard, and before each line that the process writes.
        return f"{type(self.actor).__name__}({self._name})"

    def call(self, method: str, *arguments: Any) -> Any:
        """Return what ``method`` of the object returns."""
        return getattr(self.actor, method)(*arguments)

    # -- Ray Direct Transport, which moves one value a call ---------------------------------------------------------

    def begin(self, ticket: int, method: str, *arguments: Any) -> Any:
        """Call ``method`` and return the first of its values; :meth:`rest` has the others.

        Their tensors stay on their device until the receiver takes them, or for good where that is the same device.
        """
        report, *rest = self.call(method, *arguments)
        self._returned |= {(ticket, index): value for index, value in enumerate(rest)}
        return report

    def rest(self, ticket: int, index: int) -> Any:
        """Return value ``index`` of those that :meth:`begin` has kept for ``ticket``, and forget it."""
        return self._returned.pop((ticket, index))
