"""A home directory for users without a writable one, such as a container's user without a name.

Ray's token, the hub's cache, matplotlib and hsplit's own caches are all below the home directory. If there is none,
another one replaces it; if it cannot be written, each of these is redirected, except for caches that can be read there.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from hsplit.errors import os_reason

_NAMES = ("LOGNAME", "USER", "LNAME", "USERNAME")
"""Variables that ``getpass.getuser`` reads before it asks the system for the user's name."""
_PREFIX = "hsplit-home-"


def cache_root() -> Path:
    """Directory of hsplit's caches: ``$HSPLIT_CACHE``, else ``$XDG_CACHE_HOME/hsplit``, else ``~/.cache/hsplit``."""
    if own := os.environ.get("HSPLIT_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "hsplit"


def make_home_usable(environ: MutableMapping[str, str] = os.environ) -> None:
    """Set variables in ``environ`` so that programs need not write below an unusable home directory.

    Variables that are set already stay as they are. Nothing is raised: if no directory can be made, the program that
    needs one fails.
    """
    if os.name != "posix":
        return
    if not any(environ.get(name) for name in _NAMES) and not _has_name():
        environ["LOGNAME"] = str(os.getuid())
    # Without HOME and a user's name this stays "~", which is not absolute.
    home = Path(environ.get("HOME") or os.path.expanduser("~"))
    there = home.is_absolute() and home.is_dir()
    if there and _writable(home):
        return
    try:
        instead = _directory_instead()
    except OSError:
        return
    if not there:
        environ["HOME"] = str(instead)
        return
    cache = home / ".cache"
    if not _writable(cache):
        # Existing caches are still read.
        for variable, folder in (("HF_HOME", cache / "huggingface"), ("HSPLIT_CACHE", cache / "hsplit")):
            if folder.is_dir() and "XDG_CACHE_HOME" not in environ:
                environ.setdefault(variable, str(folder))
        environ.setdefault("XDG_CACHE_HOME", str(instead / ".cache"))
    environ.setdefault("MPLCONFIGDIR", str(instead / "matplotlib"))
    environ.setdefault("TRITON_HOME", str(instead))


def keep_ray_token(environ: MutableMapping[str, str] = os.environ) -> None:
    """Set the path of Ray's token to a file of this user if Ray cannot write one below the home directory.

    Call this before Ray is imported.

    Raises:
        OSError: no such file can be written.
    """
    if os.name != "posix" or environ.get("RAY_AUTH_TOKEN") or environ.get("RAY_AUTH_TOKEN_PATH"):
        return
    home = Path(environ.get("HOME") or os.path.expanduser("~"))
    rays = home / ".ray"
    # In a home made above, `ray get-auth-token` would not find it.
    if not home.name.startswith(_PREFIX) and (_writable(rays) or os.access(rays / "auth_token", os.R_OK)):
        return
    path = _directory_instead() / "ray_auth_token"
    if not path.exists():
        import secrets

        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32))
    environ["RAY_AUTH_TOKEN_PATH"] = str(path)


def ray_token_file(environ: Mapping[str, str] = os.environ) -> Path:
    """Path of Ray's token, whether it is there or not."""
    return Path(environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")


def no_ray_token(error: OSError) -> str:
    """Describe in one line why :func:`keep_ray_token` failed."""
    return (
        f"HOME: Ray's token cannot be written there nor elsewhere ({os_reason(error)}); set HOME or TMPDIR to a"
        " directory that can be written"
    )


def _has_name() -> bool:
    import pwd

    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        return False
    return True


def _writable(directory: Path) -> bool:
    """True if ``directory`` can be written or made."""
    while not os.path.lexists(directory) and directory != directory.parent:
        directory = directory.parent
    return directory.is_dir() and os.access(directory, os.W_OK | os.X_OK)


def _directory_instead() -> Path:
    """A directory of this user alone below the temporary one, the same for every command."""
    import tempfile

    path = Path(tempfile.gettempdir()) / f"{_PREFIX}{os.getuid()}"
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        found = path.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
            # Another user could write there.
            return Path(tempfile.mkdtemp(prefix=_PREFIX))
    return path
