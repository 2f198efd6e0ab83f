"""Checkpoints: a complete state of a run in one directory, and going back to the last one.

A checkpoint is written under another name, renamed, and checked when it is read. While there is none, going back leads
to the run's start.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Collection, Mapping
from pathlib import Path

from torch import Tensor

from hsplit.actors.executor import ActorFailure
from hsplit.actors.holder_actor import HolderActor
from hsplit.actors.messages import not_finite
from hsplit.actors.server import Server
from hsplit.config import SERVER
from hsplit.config.reading import displayed, read_bytes, read_json
from hsplit.errors import NO_NUMBERS, InputError
from hsplit.files import directory_written_atomically, save_tensors, sha256_of
from hsplit.planning.plan import Plan
from hsplit.run.context import RunContext
from hsplit.run.membership import Membership
from hsplit.run.records import Records
from hsplit.run.state import RunState, Status
from hsplit.run_directory import RunDirectory

MANIFEST = "manifest.json"
STATE = "state.json"


def checkpoint_name(state: RunState, local_steps: int) -> str:
    """``round-0003`` at a round's end, ``round-0003-step-0035`` inside the round that follows."""
    name = f"round-{state.round:04d}"
    inside = state.step - state.round * local_steps
    return f"{name}-step-{state.step:04d}" if inside else name


def save_checkpoint(
    folder: Path, name: str, state: RunState, tensors: Mapping[str, Mapping[str, Tensor]], keep: int
) -> Path:
    """Write ``folder/name`` with ``state.json``, one safetensors file per holder, and a checksum of each file.

    The directory appears whole or not at all; afterwards only the newest ``keep`` checkpoints stay.

    Raises:
        OSError: it cannot be written; earlier checkpoints are unchanged.
    """
    target = folder / name
    with directory_written_atomically(target) as partial:
        (partial / STATE).write_text(json.dumps(state.to_json()))
        for holder, named in tensors.items():
            save_tensors(named, partial / f"{holder}.safetensors")
        sums = {file.name: sha256_of(file) for file in sorted(partial.iterdir())}
        (partial / MANIFEST).write_text(json.dumps(sums, indent=1))
    for old in _checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def latest_checkpoint(folder: Path) -> tuple[Path, list[str]]:
    """The newest checkpoint whose checksums hold, and a sentence about each newer one that was passed over.

    Raises:
        InputError: there is none.
    """
    passed: list[str] = []
    for path in reversed(_checkpoints(folder)):
        damage = _damage(path)
        if damage is None:
            return path, passed
        passed.append(f"checkpoint {path.name} is damaged ({damage}) and is passed over")
    passed += [f"checkpoint {path.name} has no {MANIFEST}" for path in folder.glob("round-*") if not _is_whole(path)]
    begin = f"the run begins from round 0 with: {RunDirectory(folder.parent).resume_command()}"
    if passed:
        begin = f"({'; '.join(passed)}); put a copy of one back, or remove what is there, and {begin}"
    else:
        begin = f"yet; {begin}"
    raise InputError(f"{displayed(folder)}: holds no complete checkpoint {begin}")


def read_checkpoint(path: Path) -> tuple[RunState, dict[str, dict[str, Tensor]]]:
    """The run's state and each holder's tensors, by holder name.

    Raises:
        InputError: a file is not one that :func:`save_checkpoint` writes.
    """
    return read_state(path), {file.stem: _read_tensors(file) for file in sorted(path.glob("*.safetensors"))}


def read_state(path: Path) -> RunState:
    """The run's state alone.

    Raises:
        InputError: ``state.json`` is not one that :func:`save_checkpoint` writes, or of another version.
    """
    file = path / STATE
    # Checksums show damage, but not that the checkpoint was written by this program.
    return RunState.from_json(read_bytes(file), displayed(file))


def holder_state(path: Path, holder: str) -> dict[str, Tensor] | None:
    """One holder's tensors; ``None`` if the checkpoint has none of it, or a damaged file."""
    file = path / f"{holder}.safetensors"
    if not file.is_file() or _sums(path).get(file.name) != sha256_of(file):
        return None
    return _read_tensors(file)


def _read_tensors(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
        raise InputError(f"{displayed(file)}: is no safetensors file: {error}") from None


def _checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoint directories, oldest first."""
    return sorted(filter(_is_whole, folder.glob("round-*")))


def _is_whole(path: Path) -> bool:
    """True if a checkpoint was written to its end."""
    return (path / MANIFEST).is_file()


def _damage(path: Path) -> str | None:
    try:
        sums = _sums(path)
    except InputError:
        return f"{MANIFEST} is not readable"
    # A file that the manifest omits would be read unchecked.
    for name in sorted({STATE, *sums, *(file.name for file in path.glob("*.safetensors"))}):
        if "/" in name or not (path / name).is_file():
            return f"{name} is missing"
        if sha256_of(path / name) != sums.get(name):
            return f"{name} does not match its checksum"
    return None


def _sums(path: Path) -> dict[str, str]:
    """The checksums of a checkpoint's files, by name."""
    return read_json(path / MANIFEST, dict[str, str])


class SavePoint:
    """Makes checkpoints, and brings all actors back to the last one.

    Args:
        context: of the run.
        records: its tables, which go back too.

    Attributes:
        path: the last checkpoint; ``None``: there is none yet.
        membership: of the run.
    """

    def __init__(self, context: RunContext, records: Records) -> None:
        self._context, self._records = context, records
        self.membership = Membership(context, self.kept)
        self.path: Path | None = None
        self._plan: Plan | None = None
        # Clients restarted since the last checkpoint, without data yet; None: this process has just begun.
        self._fresh: set[str] | None = None

    @property
    def name(self) -> str:
        """The state that a round is repeated from, in words."""
        return "from the start" if self.path is None else f"from checkpoint {self.path.name}"

    # -- making one -------------------------------------------------------------------------------------------------

    def states(self) -> dict[str, dict[str, Tensor]]:
        """Tensors of all holders for a checkpoint; for clients that are lost or away, those of the last checkpoint.

        Raises:
            ActorFailure: an actor failed.
        """
        context, executor = self._context, self._context.executor
        calls = {name: executor.call(name, HolderActor.state) for name in [*context.clients, *context.servers]}
        until = time.monotonic() + context.job.faults.patience_s
        states = dict(zip(calls, executor.get(list(calls.values()), until), strict=True))
        if self.path is not None:
            planned = {part.name for part in context.plan.clients}
            for name in context.state.to_return:
                kept = self.kept(name) if name in planned else None
                states |= {} if kept is None else {name: kept}
        return states

    def make(self, states: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Write a checkpoint of the run's present state.

        Args:
            states: what :meth:`states` returned.

        Raises:
            ActorFailure: a tensor has entries that are NaN or infinite, which no checkpoint may have.
            OSError: it cannot be written; the last checkpoint is complete.
        """
        context, state = self._context, self._context.state
        for holder, tensors in states.items():
            for key, tensor in tensors.items():
                if tensor.is_floating_point() and not_finite(tensor):
                    reason = f"{key} of {holder} has entries {NO_NUMBERS}"
                    raise ActorFailure(holder, "a checkpoint", reason, "diverged")
        state.wall_time_s = self._records.wall_time_s
        name = checkpoint_name(state, context.job.local_steps)
        folder, keep = context.directory.checkpoints, context.job.keep_checkpoints
        self.path = save_checkpoint(folder, name, state, states, keep)
        self._fresh, self._plan = set(), context.plan
        for client in state.with_status(Status.LEFT):
            # No round that it took part in can be repeated any more.
            context.executor.end(client)
        context.events.write("checkpoint", f"checkpoint {name} written")

    def kept(self, client: str) -> dict[str, Tensor] | None:
        """A client's tensors in the last checkpoint; ``None`` if they are not of the part that it has now."""
        saved, now = self._plan, self._context.plan.client(client)
        then = [] if saved is None else [(c.split, c.ranks) for c in saved.clients if c.name == client]
        same = then == [(now.split, now.ranks)]
        return holder_state(self.path, client) if same and self.path is not None else None

    # -- going back to it -------------------------------------------------------------------------------------------

    def go_back(self) -> None:
        """Bring all actors back to the last checkpoint.

        Raises:
            InputError: it is not of this run, its model or its data.
            ActorFailure: an actor failed.
        """
        if self._fresh is None:
            self._resume()
            return
        self.path, passed_over = latest_checkpoint(self._context.directory.checkpoints)
        self.report_damage(passed_over)
        self._restore(*read_checkpoint(self.path), self._fresh)

    def go_back_to_the_start(self) -> None:
        """Bring the run back to its start: no plan, no layers, no data."""
        self._context.go_back_to(self._context.new_state())
        self._records.clear()
        self._mark_away()

    def mark_fresh(self, client: str) -> None:
        """Record that a client was restarted, so that it reads its data when the round is repeated."""
        if self._fresh is not None:
            self._fresh.add(client)

    def _mark_away(self) -> None:
        """Set the active clients without a node to ``AWAY``; lost ones may have a node when they return."""
        for name in self._context.executor.away():
            if self._context.state.status(name) is Status.ACTIVE:
                self.membership.mark_away(name)

    def _resume(self) -> None:
        """Go back to a checkpoint of an earlier process, with fresh actors."""
        assert self.path is not None
        context = self._context
        state, tensors = read_checkpoint(self.path)
        if state.plan is None:
            raise self._incomplete("no plan")
        for what, then, now in (
            (f"model {context.job.model}", state.model_fingerprint, context.inputs.model_fingerprint),
            (f"data.{context.job.data.origin}", state.data_sha256, context.inputs.data_sha256),
        ):
            if then != now:
                raise InputError(
                    f"{displayed(context.directory.path)}: job.{what} is not what it was when this run was"
                    " started: put that back, or launch a run of another name"
                )
        for name in state.with_status(Status.AWAY):
            # A node may have room by now.
            state.member(name).status = Status.LOST
        self._records.count_wall_time_from(state.wall_time_s)
        self._restore(state, tensors, None)
        context.note("resumed", f"resumed from {self.path.name}")

    def _incomplete(self, lacks: str) -> InputError:
        """Refusal of the last checkpoint, which has ``lacks``."""
        where = displayed(str(self.path))
        return InputError(f"{where}: has {lacks} to resume with; remove it, and the one before is resumed from")

    def report_damage(self, passed_over: Collection[str]) -> None:
        """Report the newer checkpoints that were passed over.

        Args:
            passed_over: a sentence about each.
        """
        for text in passed_over:
            self._context.note("damaged", text)

    def _restore(
        self, state: RunState, tensors: Mapping[str, dict[str, Tensor]], fresh: Collection[str] | None
    ) -> None:
        """Bring all actors to ``state`` and ``tensors``; clients in ``fresh`` have no data yet (``None``: all)."""
        context, executor = self._context, self._context.executor
        context.go_back_to(state)
        self._records.restore()
        if fresh is None:
            self._apply_joins_and_leaves(state)
        self._mark_away()
        context.adopt(context.plan)
        active = [part.name for part in context.plan.clients if state.status(part.name) is Status.ACTIVE]
        reading = [name for name in active if fresh is None or name in fresh]
        unreadable, _ = context.data.receive(context.data.begin(context.named(reading)))
        context.data.check(reading, unreadable, context.unavailable)
        context.configure()
        holders = [*context.clients, *context.servers[1:]]
        for name in (SERVER, *holders):
            if name not in tensors:
                raise self._incomplete(f"nothing of {name}")
        _, updates = executor.call_each(SERVER, Server.load_state, tensors[SERVER], holders)
        executor.get(
            [
                executor.call(name, HolderActor.resume_state, tensors[name], update)
                for name, update in zip(holders, updates, strict=True)
            ]
        )
        self._fresh, self._plan = set(), context.plan

    def _apply_joins_and_leaves(self, state: RunState) -> None:
        """Start the clients that had joined by ``state``, and end those that had left."""
        executor = self._context.executor
        # Ended first, so that there is room for the others.
        for name in state.with_status(Status.LEFT):
            executor.end(name)
        for client in state.joined:
            executor.add(client)
            if state.status(client.name) not in (Status.LEFT, Status.ASIDE):
                executor.restart(client.name)
