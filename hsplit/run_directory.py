"""Files and folders of a run, its lock, and the heartbeat file of its driver, the process that runs it.

The heartbeat is a file because machines that share a run's directory may not see each other's locks.
"""

from __future__ import annotations

import glob
import json
import os
import shlex
import socket
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Self

from pydantic import TypeAdapter, ValidationError

from hsplit.config.reading import displayed, read_json
from hsplit.config.section import EXACT, Name, refusals
from hsplit.errors import InputError
from hsplit.files import write_text_atomically

_LISTING_S = 0.5
_NAME: TypeAdapter[str] = TypeAdapter(Name)


@dataclass(frozen=True)
class RunDirectory:
    """Layout of ``runs/NAME``; the files and folders need not exist yet.

    Attributes:
        path: the run's directory.
    """

    path: Path

    @property
    def name(self) -> str:
        """The run's name, which is the directory's."""
        return self.path.resolve().name

    @property
    def config(self) -> Path:
        """The resolved configuration; a directory is a run once this file is there."""
        return self.path / "config.yaml"

    @property
    def plan(self) -> Path:
        """``plan.csv``."""
        return self.path / "plan.csv"

    @property
    def metrics(self) -> Path:
        """``metrics.csv``."""
        return self.path / "metrics.csv"

    @property
    def timing(self) -> Path:
        """``timing.csv``."""
        return self.path / "timing.csv"

    @property
    def events(self) -> Path:
        """``events.jsonl``."""
        return self.path / "events.jsonl"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def has_checkpoints(self) -> bool:
        """True if there is a checkpoint, even a damaged one."""
        return any(self.checkpoints.glob("round-*"))

    @property
    def adapter(self) -> Path:
        """The folder of the trained adapter, once the run is complete."""
        return self.path / "adapter"

    @property
    def model(self) -> Path:
        """The merged model of a run that trained every weight, once it is complete."""
        return self.path / "model"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard's files, if ``job.log`` names it."""
        return self.path / "tensorboard"

    @property
    def wandb(self) -> Path:
        """Weights & Biases' files, if ``job.log`` names it."""
        return self.path / "wandb"

    @property
    def report(self) -> Path:
        """``report.html``."""
        return self.path / "report.html"

    @property
    def inbox(self) -> Path:
        """Requests of ``budget``, ``join`` and ``leave``, taken at a round's end."""
        return self.path / "inbox"

    @property
    def progress(self) -> Path:
        """The last local step of the newest driver, for ``hsplit watch``."""
        return self.path / "progress.json"

    @property
    def driver(self) -> Path:
        """The driver's heartbeat file, while there is a driver."""
        return self.path / "driver.json"

    @property
    def half_written(self) -> list[Path]:
        """Patterns of files that a killed driver may have left half-written."""
        run = type(self)(Path(glob.escape(str(self.path))))
        partial = [folder / ".partial-*" for folder in (run.checkpoints, run.adapter, run.model)]
        return [*partial, run.path / ".*.tmp", run.inbox / ".*.tmp"]

    def resume_command(self, address: str | None = None, *options: str) -> str:
        """The shell command that resumes the run.

        Args:
            address: of the run's Ray cluster; ``None``: a local one.
            options: further words of the command.
        """
        at = () if address is None else ("--address", address)
        return shlex.join(["hsplit", "resume", displayed(self.path), *at, *options])

    @contextmanager
    def driven(self) -> Iterator[None]:
        """Lock the run for this driver until the block ends.

        Raises:
            InputError: another driver has locked it.
        """
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            until = time.monotonic() + _LISTING_S
            while not (free := _lock(descriptor)) and time.monotonic() < until:
                # A listing of the runs holds the lock for a moment.
                time.sleep(0.02)
            if not free:
                raise InputError(f"{displayed(self.path)}: is running; watch it, or stop it with Ctrl-C where it runs")
            with announced(self.driver):
                yield
        finally:
            os.close(descriptor)

    @property
    def is_driven(self) -> bool:
        """True if a driver runs now, on this machine or one that shares its files."""
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            return not _lock(descriptor, shared=True) or drives_elsewhere(self.driver)
        finally:
            os.close(descriptor)

    @classmethod
    def create(cls, runs_dir: str | Path, name: str | None = None) -> Self:
        """Make the directory of a new run, with empty ``checkpoints/`` and ``inbox/``.

        Args:
            runs_dir: folder of the runs; made if it is missing.
            name: the run's name; ``None``: the local time, such as ``2026-11-22_09-54-12``.

        Raises:
            InputError: the name is not well-formed or is taken, or ``runs_dir`` cannot be written.
        """
        runs_dir = Path(runs_dir)
        try:
            runs_dir.mkdir(parents=True, exist_ok=True)
            run = cls(_new_directory(runs_dir) if name is None else _named_directory(runs_dir, name))
            run.checkpoints.mkdir()
            run.inbox.mkdir()
        except OSError as error:
            raise InputError(
                f"--runs-dir {displayed(runs_dir)}: no run can be kept there ({error.strerror}); give a"
                " directory that can be written"
            ) from None
        return run

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open the run at ``path``.

        Raises:
            InputError: there is no such directory, it is not a run, or a link in it leads out of it.
        """
        run = cls(Path(path))
        if not os.path.isdir(path):
            raise InputError(f"{displayed(path)}: there is no such directory; give a run, as runs/NAME")
        if not os.path.isfile(run.config):
            raise InputError(f"{displayed(path)}: has no config.yaml, so it is not a run; give one, as runs/NAME")
        run._refuse_links_out()
        return run

    def _refuse_links_out(self) -> None:
        """Refuse links out of the directory and files that are not plain: the run may be from another user.

        Writing into the run would follow a link to unrelated files, and reading a pipe would block.
        """
        inside = self.path.resolve()
        for folder, folders, files in os.walk(inside):
            if Path(folder).parent == inside / "wandb":
                # Weights & Biases links its logs; hsplit reads and writes nothing in there.
                folders.clear()
                continue
            for entry in (Path(folder, name) for name in (*folders, *files)):
                # Half-written files of a run under way come and go.
                with suppress(FileNotFoundError):
                    mode = entry.lstat().st_mode
                    where = f"{displayed(self.path)}: {entry.relative_to(inside)}"
                    if stat.S_ISLNK(mode) and not _target(entry).is_relative_to(inside):
                        raise InputError(
                            f"{where} is a link to {os.readlink(entry)}, outside of the run: put the file itself there,"
                            " or remove the link"
                        )
                    if not (stat.S_ISLNK(mode) or stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                        raise InputError(f"{where} is no plain file: remove it")


def _target(link: Path) -> Path:
    try:
        return link.resolve()
    except (OSError, RuntimeError):
        # A link to itself does not lead out.
        return link


def _lock(descriptor: int, shared: bool = False) -> bool:
    """Lock an open directory until ``descriptor`` is closed; false if another process holds the lock."""
    try:
        import fcntl

        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        # Without locks on this system, other drivers are not kept out.
        pass
    return True


def _named_directory(runs_dir: Path, name: str) -> Path:
    try:
        path = runs_dir / _NAME.validate_python(name, strict=True)
    except ValidationError as error:
        raise InputError(f"--name: {refusals(error)[0].reason}") from None
    try:
        path.mkdir()
    except FileExistsError:
        where = displayed(path)
        if (path / "config.yaml").is_file() and RunDirectory(path).is_driven:
            way_out = "it is running; choose another name"
        elif (path / "config.yaml").is_file():
            way_out = f"continue that run with `{RunDirectory(path).resume_command()}`, or choose another name"
        else:
            way_out = "choose another name, or remove it"
        raise InputError(f"--name {name}: {where} exists already; {way_out}") from None
    return path


def _new_directory(runs_dir: Path) -> Path:
    stem = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    number = 1
    while True:  # mkdir decides, so that runs started in the same second get different names
        path = runs_dir / (stem if number == 1 else f"{stem}-{number}")
        try:
            path.mkdir()
            return path
        except FileExistsError:
            number += 1


_TOUCH_S = 5.0
"""Seconds between two heartbeats of a driver."""
_SILENT_S = 30.0
"""Seconds without a heartbeat after which a driver has ended; much more than ``_TOUCH_S``, for clocks that differ."""


@dataclass(frozen=True)
class Driver:
    """Process that drives a run, or did.

    Attributes:
        host: the name of its machine.
        pid: its process id there.
    """

    host: str
    pid: int
    __pydantic_config__ = EXACT

    @classmethod
    def here(cls) -> Driver:
        """This process."""
        return cls(socket.gethostname(), os.getpid())


@contextmanager
def announced(path: Path) -> Iterator[None]:
    """Name this process as the driver in the file ``path`` and touch it regularly, until the end of the block."""
    ended = threading.Event()

    def touch() -> None:
        while not ended.wait(_TOUCH_S):
            with suppress(OSError):
                os.utime(path)

    # A run without it goes on: only watchers on other machines need it.
    with suppress(OSError):
        write_text_atomically(path, json.dumps(asdict(Driver.here())), durable=False)
    thread = threading.Thread(target=touch, name="announces the driver", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with suppress(OSError):
            path.unlink()


def read_driver(path: Path) -> Driver | None:
    """The last driver that announced itself in ``path`` and has not ended properly; ``None``: there is none."""
    try:
        return read_json(path, Driver)
    except InputError:
        return None


def drives_elsewhere(path: Path) -> bool:
    """True if a process of another machine keeps touching the file ``path``."""
    driver = read_driver(path)
    if driver is None or driver.host == socket.gethostname():
        return False
    with suppress(OSError):
        return time.time() - path.stat().st_mtime < _SILENT_S
    return False
