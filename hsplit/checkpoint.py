"""Checkpoints: a complete state of a run in one directory, written beside and renamed, checked when read."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from hsplit.errors import InputError

MANIFEST = "manifest.json"
_PARTIAL = ".partial-"


@dataclass
class Progress:
    """Where a run stands; everything here survives a resume exactly.

    Attributes:
        round: completed rounds.
        step: local steps done over the whole run; between two rounds' ends it tells how far the round is.
        tokens: supervised tokens trained on.
        round_loss_sum, round_tokens: of the round under way: cross-entropy sum in nats, supervised tokens.
        bytes_up, bytes_down: wire bytes of the round under way, client to server and back.
        wall_time_s, virtual_time_s: since the run's start, over all its launches.
        plan: the plan in force, as JSON.
        scheduler: what decides later plans: budgets in force, importance history, as JSON.
        measured_bytes: most memory that each holder took in the last round, by name.
        metrics, plans, timing: rows of metrics.csv, plan.csv and timing.csv so far.
        failures: by client how often it failed.
        shortages: by client how often it ran out of memory.
        aside: clients that take no part any more.
        joined: clients that came while the run was under way, as in a cluster file.
        left: clients that have left.
        lost: clients that were lost in the round under way and are to come back.
        model_fingerprint, data_sha256: what the run was started with.
    """

    round: int = 0
    step: int = 0
    tokens: int = 0
    round_loss_sum: float = 0.0
    round_tokens: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    wall_time_s: float = 0.0
    virtual_time_s: float = 0.0
    plan: dict[str, Any] | None = None
    scheduler: dict[str, Any] | None = None
    measured_bytes: dict[str, int] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    plans: list[dict[str, Any]] = field(default_factory=list)
    timing: list[dict[str, Any]] = field(default_factory=list)
    failures: dict[str, int] = field(default_factory=dict)
    shortages: dict[str, int] = field(default_factory=dict)
    aside: list[str] = field(default_factory=list)
    joined: list[dict[str, Any]] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    model_fingerprint: str = ""
    data_sha256: str = ""


def checkpoint_name(progress: Progress, local_steps: int) -> str:
    """``round-0003`` at a round's end, ``round-0003-step-0035`` inside the round that follows."""
    name = f"round-{progress.round:04d}"
    inside = progress.step - progress.round * local_steps
    return f"{name}-step-{progress.step:04d}" if inside else name


def save_checkpoint(
    folder: Path, name: str, progress: Progress, tensors: Mapping[str, Mapping[str, Tensor]], keep: int
) -> Path:
    """Write ``folder/name`` with ``state.json``, one safetensors file a holder, and a checksum of each.

    The directory appears whole or not at all; afterwards only the newest ``keep`` checkpoints stay.

    Raises:
        OSError: it cannot be written; the checkpoints that were there are as they were.
    """
    target, partial = folder / name, folder / f"{_PARTIAL}{name}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        (partial / "state.json").write_text(json.dumps(asdict(progress)))
        for holder, named in tensors.items():
            _write_tensors(partial / f"{holder}.safetensors", named)
        sums = {file.name: _sha256(file) for file in sorted(partial.iterdir())}
        (partial / MANIFEST).write_text(json.dumps(sums, indent=1))
        for file in partial.iterdir():
            _sync(file)
        if target.exists():
            shutil.rmtree(target)
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    _sync(folder)
    for old in _checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def _write_tensors(file: Path, named: Mapping[str, Tensor]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({key: tensor.contiguous() for key, tensor in named.items()}, file)
    except SafetensorError as error:
        # What the system says is in its text alone.
        raise OSError(f"{error}: {file}") from error


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
    why = f" ({'; '.join(passed)})" if passed else ""
    raise InputError(f"{folder}: holds no complete checkpoint to resume from{why}")


def read_checkpoint(path: Path) -> tuple[Progress, dict[str, dict[str, Tensor]]]:
    """Progress and each holder's tensors, by holder name."""
    from safetensors.torch import load_file

    return read_progress(path), {file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))}


def read_progress(path: Path) -> Progress:
    """Progress alone."""
    return Progress(**json.loads((path / "state.json").read_text()))


def holder_state(path: Path, holder: str) -> dict[str, Tensor] | None:
    """One holder's tensors, or ``None`` where the checkpoint has none of it, or a damaged file."""
    from safetensors.torch import load_file

    file = path / f"{holder}.safetensors"
    if not file.is_file() or json.loads((path / MANIFEST).read_text()).get(file.name) != _sha256(file):
        return None
    return load_file(file)


def _checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoint directories, oldest first."""
    return sorted(p for p in folder.glob("round-*") if (p / MANIFEST).exists())


def _damage(path: Path) -> str | None:
    try:
        sums: dict[str, str] = json.loads((path / MANIFEST).read_text())
    except ValueError:
        return f"{MANIFEST} is not readable"
    for name, expected in sums.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if _sha256(path / name) != expected:
            return f"{name} does not match its checksum"
    return None


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
