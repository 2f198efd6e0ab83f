"""Files that would be imported instead of Python's own modules, such as a ``random.py`` in PYTHONPATH."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.machinery import EXTENSION_SUFFIXES, BuiltinImporter, FrozenImporter

# Modules of Python that neither hsplit nor a library of its own imports, nor any process of Ray.
UNUSED = frozenset(
    # ruff: noqa: SIM905 - a list of so many words fills the screen
    "aifc antigravity asynchat asyncore audioop cgi cgitb chunk compileall crypt curses dbm distutils doctest ensurepip"
    " fileinput ftplib getopt graphlib idlelib imaplib imghdr imp lib2to3 mailbox mailcap modulefinder msilib msvcrt"
    " nis nntplib nt nturl2path optparse ossaudiodev pipes poplib pty py_compile pyclbr pydoc pydoc_data readline"
    " rlcompleter sched shelve smtpd smtplib sndhdr spwd sqlite3 sre_compile sre_constants sre_parse sunau symtable"
    " syslog tabnanny telnetlib this tkinter tomllib trace turtle turtledemo uu venv wave webbrowser winreg winsound"
    " xdrlib xmlrpc zipapp".split()
)


def shadowing_file(path: Sequence[str] | None = None) -> str | None:
    """The first file or folder that stands before one of Python's own modules in ``path``, ``sys.path`` by default."""
    own = os.path.dirname(os.path.realpath(os.__file__))
    for directory in sys.path if path is None else path:
        if os.path.realpath(directory or os.curdir) == own:
            return None
        try:
            entries = sorted(os.listdir(directory or os.curdir))
        except OSError:
            continue
        for entry in entries:
            found = os.path.join(directory or os.curdir, entry)
            if _shadows(_module_of(found)):
                return found
    return None


def why_refused(file: str) -> str:
    """The line that says what ``file`` of :func:`shadowing_file` does, and what would be right."""
    return (
        f"PYTHONPATH: {file} would be imported instead of Python's own module {_module_of(file)}, which hsplit and Ray"
        " need: rename it, or leave its directory out of PYTHONPATH"
    )


def refuse_shadowed_modules() -> None:
    """End the command line with one line and exit code 2 before anything is imported from the wrong place."""
    if (file := shadowing_file()) is not None:
        try:
            os.write(2, f"error: {why_refused(file)}\n".encode(errors="backslashreplace"))
        finally:
            sys.exit(2)


def _module_of(path: str) -> str:
    """The name of the module that the file or folder ``path`` is, empty if it is none."""
    name = os.path.basename(path)
    for suffix in (".py", *EXTENSION_SUFFIXES):
        if name.endswith(suffix):
            return name.removesuffix(suffix)
    return name if os.path.isfile(os.path.join(path, "__init__.py")) else ""


def _shadows(name: str) -> bool:
    if name not in sys.stdlib_module_names or name in UNUSED:
        return False
    # Those are part of Python's program, and are looked for there first.
    return BuiltinImporter.find_spec(name) is None and FrozenImporter.find_spec(name) is None
