"""A home directory for those who have none that can be written, such as a container's user that is only a number.

Ray's token, the hub's cache, matplotlib and hsplit's own caches all write below the home directory. Where that is not
there, another one takes its place; where it is there and cannot be written, each of them is given another place, but
for what can be read there.
"""

from __future__ import annotations

import os
import stat
from collections.abc import MutableMapping
from pathlib import Path

_NAMES = ("LOGNAME", "USER", "LNAME", "USERNAME")
"""What ``getpass.getuser`` looks at before it asks the system for a user's name."""
_PREFIX = "hsplit-home-"


def make_home_usable(environ: MutableMapping[str, str] = os.environ) -> None:
    """Set what is needed in ``environ`` for programs that write below the home directory; nothing where they can.

    Variables that are set already stay as they are. Nothing is raised: where no directory can be made, whoever needs
    one says so.
    """
    if os.name != "posix":
        return
    if not any(environ.get(name) for name in _NAMES) and not _has_name():
        environ["LOGNAME"] = str(os.getuid())
    # Without HOME and without a name it stays as it is.
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
        # What was put there for this user is read there.
        for variable, folder in (("HF_HOME", cache / "huggingface"), ("HSPLIT_CACHE", cache / "hsplit")):
            if folder.is_dir() and "XDG_CACHE_HOME" not in environ:
                environ.setdefault(variable, str(folder))
        environ.setdefault("XDG_CACHE_HOME", str(instead / ".cache"))
    environ.setdefault("MPLCONFIGDIR", str(instead / "matplotlib"))
    environ.setdefault("TRITON_HOME", str(instead))


def keep_ray_token(environ: MutableMapping[str, str] = os.environ) -> None:
    """Have Ray find its token in a file of this user's own where it cannot write one below the home directory.

    Call it before Ray is imported.

    Raises:
        OSError: no such file can be written.
    """
    if os.name != "posix" or environ.get("RAY_AUTH_TOKEN") or environ.get("RAY_AUTH_TOKEN_PATH"):
        return
    home = Path(environ.get("HOME") or os.path.expanduser("~"))
    rays = home / ".ray"
    # In a home of this process's own making `ray get-auth-token` would not look for it.
    if not home.name.startswith(_PREFIX) and (_writable(rays) or os.access(rays / "auth_token", os.R_OK)):
        return
    path = _directory_instead() / "ray_auth_token"
    if not path.exists():
        import secrets

        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32))
    environ["RAY_AUTH_TOKEN_PATH"] = str(path)


def _has_name() -> bool:
    import pwd

    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        return False
    return True


def _writable(directory: Path) -> bool:
    """Whether files can be put into ``directory``, or it can be made."""
    while not os.path.lexists(directory) and directory != directory.parent:
        directory = directory.parent
    return directory.is_dir() and os.access(directory, os.W_OK | os.X_OK)


def _directory_instead() -> Path:
    """A directory of this user's alone below the temporary one, the same for every command."""
    import tempfile

    path = Path(tempfile.gettempdir()) / f"{_PREFIX}{os.getuid()}"
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        found = path.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
            # Somebody else's, who could put something there.
            return Path(tempfile.mkdtemp(prefix=_PREFIX))
    return path
