"""Checkpoints: a complete state of a run in one directory, written beside and renamed, checked when read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from hsplit.config import Client
from hsplit.config.files import displayed, from_plain, read_json
from hsplit.config.section import EXACT, Whole
from hsplit.errors import InputError
from hsplit.files import directory_written_atomically, save_tensors, sha256_of
from hsplit.observe.tables import MetricsRow, PlanRow, TimingRow
from hsplit.run_directory import RunDirectory
from hsplit.scheduling.plan import Plan

MANIFEST = "manifest.json"
STATE = "state.json"


@dataclass
class Progress:
    """Where a run stands; everything here survives a resume exactly.

    Attributes:
        round: completed rounds.
        step: local steps done over the whole run; between two rounds' ends it tells how far the round is.
        tokens: supervised tokens trained on.
        client_tokens: the same by client.
        round_loss_sum, round_tokens: of the round under way: cross-entropy sum in nats, supervised tokens.
        bytes_up, bytes_down: wire bytes of the round under way, client to server and back.
        residual_cut: of the round under way: largest part of a weight's residual that its cap cut, relative norm.
        wall_time_s, virtual_time_s: since the run's start, over all its launches.
        plan: the plan in force, as JSON.
        scheduler: what decides later plans: budgets in force, importance history, as JSON.
        measured_bytes: most memory that each holder took in the last round, by name.
        metrics, plans, timing: rows of metrics.csv, plan.csv and timing.csv so far.
        failures: by client how often it failed.
        shortages: by client, or ``server``, how often it ran out of memory.
        aside: clients that take no part any more.
        joined: clients that came while the run was under way, as in a cluster file.
        left: clients that have left.
        lost: clients that were lost in the round under way and are to come back.
        model_fingerprint, data_sha256: what the run was started with.
    """

    round: Whole = 0
    step: Whole = 0
    tokens: Whole = 0
    client_tokens: dict[str, Whole] = field(default_factory=dict)
    round_loss_sum: float = 0.0
    round_tokens: Whole = 0
    bytes_up: Whole = 0
    bytes_down: Whole = 0
    residual_cut: float = 0.0
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
    __pydantic_config__ = EXACT


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
    target = folder / name
    with directory_written_atomically(target) as partial:
        (partial / STATE).write_text(json.dumps(asdict(progress)))
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


def read_checkpoint(path: Path) -> tuple[Progress, dict[str, dict[str, Tensor]]]:
    """Progress and each holder's tensors, by holder name.

    Raises:
        InputError: a file is none that :func:`save_checkpoint` writes.
    """
    return read_progress(path), {file.stem: _read_tensors(file) for file in sorted(path.glob("*.safetensors"))}


def read_progress(path: Path) -> Progress:
    """Progress alone.

    Raises:
        InputError: ``state.json`` is none that :func:`save_checkpoint` writes.
    """
    file = path / STATE
    progress = read_json(file, Progress)
    # Checksums tell damage; who wrote a checkpoint that came from elsewhere they do not tell.
    rows: dict[str, Any] = {"metrics": list[MetricsRow], "plans": list[PlanRow], "timing": list[TimingRow]}
    for key, type_ in {**rows, "joined": list[Client]}.items():
        from_plain(getattr(progress, key), type_, f"{displayed(file)}: {key}")
    if progress.plan is not None:
        try:
            Plan.from_json(progress.plan)
        except ValueError as error:
            raise InputError(f"{displayed(file)}: plan: {error}") from None
    return progress


def holder_state(path: Path, holder: str) -> dict[str, Tensor] | None:
    """One holder's tensors, or ``None`` where the checkpoint has none of it, or a damaged file."""
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
    """Whether a checkpoint was written to its end."""
    return (path / MANIFEST).is_file()


def _damage(path: Path) -> str | None:
    try:
        sums = _sums(path)
    except InputError:
        return f"{MANIFEST} is not readable"
    # What the list leaves out would be read unchecked.
    for name in sorted({STATE, *sums, *(file.name for file in path.glob("*.safetensors"))}):
        if "/" in name or not (path / name).is_file():
            return f"{name} is missing"
        if sha256_of(path / name) != sums.get(name):
            return f"{name} does not match its checksum"
    return None


def _sums(path: Path) -> dict[str, str]:
    """The checksums of a checkpoint's files, by name."""
    return read_json(path / MANIFEST, dict[str, str])
