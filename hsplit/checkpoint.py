"""Checkpoints: a complete state of a run in one directory, written beside and renamed, checked when read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from hsplit.config.files import displayed, read_bytes, read_json
from hsplit.errors import InputError
from hsplit.files import directory_written_atomically, save_tensors, sha256_of
from hsplit.run_directory import RunDirectory
from hsplit.run_state import RunState

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
    """Write ``folder/name`` with ``state.json``, one safetensors file a holder, and a checksum of each.

    The directory appears whole or not at all; afterwards only the newest ``keep`` checkpoints stay.

    Raises:
        OSError: it cannot be written; the checkpoints that were there are as they were.
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
        InputError: a file is none that :func:`save_checkpoint` writes.
    """
    return read_state(path), {file.stem: _read_tensors(file) for file in sorted(path.glob("*.safetensors"))}


def read_state(path: Path) -> RunState:
    """The run's state alone.

    Raises:
        InputError: ``state.json`` is none that :func:`save_checkpoint` writes, or of another version.
    """
    file = path / STATE
    # Checksums tell damage; who wrote a checkpoint that came from elsewhere they do not tell.
    return RunState.from_json(read_bytes(file), displayed(file))


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
