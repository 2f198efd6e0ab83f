"""The point that a run can go back to: its last checkpoint, or its start while there is none."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from hsplit.actors.executor import SERVER, ActorFailure
from hsplit.actors.holder_actor import HolderActor
from hsplit.actors.messages import not_finite
from hsplit.actors.scheduler import Scheduler
from hsplit.actors.server import Server
from hsplit.checkpoint import (
    Progress,
    checkpoint_name,
    holder_state,
    latest_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from hsplit.config.files import displayed
from hsplit.errors import NO_NUMBERS, InputError
from hsplit.records import Records
from hsplit.scheduling.plan import Plan
from hsplit.standing import Standing


class SavePoint:
    """Makes checkpoints, and brings everybody back to where the last one was made.

    Args:
        standing: where the run stands.
        records: its tables, which go back too.

    Attributes:
        path: the last checkpoint; ``None``: there is none yet.
    """

    def __init__(self, standing: Standing, records: Records) -> None:
        self._standing, self._records = standing, records
        self.path: Path | None = None
        self._plan: Plan | None = None
        # Who has no place to be begun, or to be begun anew when a round is repeated.
        self._away = standing.executor.away()
        # Who has no data yet, when a round is repeated; None: this process has just begun.
        self._fresh: set[str] | None = None

    @property
    def name(self) -> str:
        """What a round is repeated from, in words."""
        return "from the start" if self.path is None else f"from checkpoint {self.path.name}"

    # -- making one -------------------------------------------------------------------------------------------------

    def states(self) -> dict[str, dict[str, Any]]:
        """Tensors of everybody, as a checkpoint keeps them; of those who are lost, as it kept them last.

        Raises:
            ActorFailure: somebody failed.
        """
        standing = self._standing
        executor = standing.executor
        calls = {name: executor.call(name, HolderActor.state) for name in [*standing.clients, *standing.servers]}
        until = time.monotonic() + standing.job.faults.patience_s
        values = executor.get(list(calls.values()), until)
        states: dict[str, dict[str, Any]] = dict(zip(calls, values, strict=True))
        if self.path is not None:
            for name in standing.roster.lost:
                kept = self.kept(name)
                states |= {} if kept is None else {name: kept}
        return states

    def make(self, states: Mapping[str, Mapping[str, Any]]) -> None:
        """Write a checkpoint of where the run stands.

        Args:
            states: what :meth:`states` returned.

        Raises:
            ActorFailure: the scheduler failed, or a tensor has entries that are no numbers, which no checkpoint may
                have.
            OSError: it cannot be written; the last checkpoint is complete.
        """
        standing, progress, roster = self._standing, self._standing.progress, self._standing.roster
        for holder, tensors in states.items():
            for key, tensor in tensors.items():
                if tensor.is_floating_point() and not_finite(tensor):
                    reason = f"{key} of {holder} has entries {NO_NUMBERS}"
                    raise ActorFailure(holder, "a checkpoint", reason, "diverged")
        progress.failures, progress.aside = dict(roster.failures), list(roster.aside)
        progress.lost, progress.shortages = roster.lost, dict(roster.shortages)
        progress.joined, progress.left = [client.model_dump() for client in standing.joined], list(roster.left)
        progress.scheduler = standing.ask(Scheduler.state)
        progress.wall_time_s = self._records.wall_time_s
        name = checkpoint_name(progress, standing.job.local_steps)
        folder, keep = standing.directory.checkpoints, standing.job.keep_checkpoints
        self.path = save_checkpoint(folder, name, progress, states, keep)
        self._fresh, self._plan = set(), standing.plan
        for gone in roster.left:
            # No round can be repeated any more that it had a part in.
            standing.executor.end(gone)
        standing.events.write("checkpoint", f"checkpoint {name} written")

    def kept(self, client: str) -> dict[str, Any] | None:
        """A client's tensors by the last checkpoint, where they are of the part that it has now."""
        saved, now = self._plan, self._standing.plan.client(client)
        then = [] if saved is None else [(c.split, c.ranks) for c in saved.clients if c.name == client]
        same = then == [(now.split, now.ranks)]
        return holder_state(self.path, client) if same and self.path is not None else None

    # -- going back to it -------------------------------------------------------------------------------------------

    def go_back(self) -> None:
        """Bring everybody to where the last checkpoint was made.

        Raises:
            InputError: it is none of this run, its model or its data.
            ActorFailure: somebody failed.
        """
        if self._fresh is None:
            self._resume()
        else:
            self._repeat(self._fresh)

    def go_back_to_the_start(self) -> None:
        """Nothing is done: no plan, no layers, no data."""
        self._go_back_to(self._standing.nothing_done())
        # After failures so early this is not the first try.
        self._standing.roster.recall({}, (), (), away=self._away)

    def knows_nothing(self, client: str) -> None:
        """Take note that a client was begun anew, for the next time that a round is repeated."""
        if self._fresh is not None:
            self._fresh.add(client)

    def have_no_place(self, clients: list[str]) -> None:
        """Take note of all the clients that could not be begun anew, for the same."""
        self._away = clients

    def _resume(self) -> None:
        """From a checkpoint, with actors that know nothing."""
        assert self.path is not None
        standing = self._standing
        progress, tensors = read_checkpoint(self.path)
        if progress.plan is None or progress.scheduler is None:
            raise self._incomplete("no plan")
        for what, source, then, now in (
            ("model", standing.job.model, progress.model_fingerprint, standing.inputs.model_fingerprint),
            ("data.source", standing.job.data.source, progress.data_sha256, standing.inputs.data_sha256),
        ):
            if then != now:
                raise InputError(
                    f"{displayed(standing.directory.path)}: job.{what} {source} is not what it was when this run was"
                    " started: put that back, or launch a run of another name"
                )
        self._records.count_wall_time_from(progress.wall_time_s)
        self._restore(progress, tensors, None)
        standing.note("resumed", f"resumed from {self.path.name}")

    def _incomplete(self, lacks: str) -> InputError:
        """Make the refusal of the last checkpoint, which has ``lacks``."""
        where = displayed(str(self.path))
        return InputError(f"{where}: has {lacks} to resume with; remove it, and the one before is resumed from")

    def _repeat(self, fresh: Collection[str]) -> None:
        """With the actors that are there; those in ``fresh`` know nothing."""
        self.path, passed_over = latest_checkpoint(self._standing.directory.checkpoints)
        self.tell_damage(passed_over)
        self._restore(*read_checkpoint(self.path), fresh)

    def tell_damage(self, passed_over: Collection[str]) -> None:
        """Say which checkpoints are newer than the one that is gone back to, and why they are not.

        Args:
            passed_over: a sentence about each.
        """
        for text in passed_over:
            self._standing.note("damaged", text)

    def _restore(
        self, progress: Progress, tensors: Mapping[str, dict[str, Any]], fresh: Collection[str] | None
    ) -> None:
        """Put everybody where ``progress`` and ``tensors`` are; ``fresh`` have no data yet (``None``: nobody has)."""
        standing, executor, roster = self._standing, self._standing.executor, self._standing.roster
        self._go_back_to(progress)
        assert progress.plan is not None and progress.scheduler is not None
        standing.ask(Scheduler.load_state, progress.scheduler)
        if fresh is None:
            self._begin_as_in(progress)
        roster.recall(progress.failures, progress.aside, progress.lost, progress.shortages, progress.left, self._away)
        standing.adopt(Plan.from_json(progress.plan))
        named = [client.name for client in standing.plan.clients if client.name not in roster.aside]
        reading = [name for name in named if name not in roster.lost and (fresh is None or name in fresh)]
        standing.data.finish(standing.data.begin(standing.named(reading)), standing.unavailable)
        standing.configure()
        holders = [*standing.clients, *standing.servers[1:]]
        for name in (SERVER, *holders):
            if name not in tensors:
                raise self._incomplete(f"nothing of {name}")
        _, updates = executor.call_each(SERVER, Server.load_state, tensors[SERVER], holders)
        following = zip(holders, updates, strict=True)
        executor.get([executor.call(name, HolderActor.take_up, tensors[name], update) for name, update in following])
        self._fresh, self._away, self._plan = set(), [], standing.plan

    def _begin_as_in(self, progress: Progress) -> None:
        """Begin the clients that had joined by then beside those of the cluster file, and end those that had left."""
        executor = self._standing.executor
        # First, so that there is room for those who came.
        for name in progress.left:
            executor.end(name)
        for client in self._standing.joined:
            executor.add(client)
            if client.name in [*progress.left, *progress.aside]:
                continue
            if not executor.restart(client.name):
                self._away.append(client.name)

    def _go_back_to(self, progress: Progress) -> None:
        self._standing.go_back_to(progress)
        self._records.restore(progress)
