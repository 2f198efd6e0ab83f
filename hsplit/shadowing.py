"""Files that would be imported instead of Python's own modules, such as a ``random.py`` in PYTHONPATH."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.machinery import EXTENSION_SUFFIXES, BuiltinImporter, FrozenImporter

# Modules of Python that neither hsplit, its libraries nor Ray's processes import.
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
    """The first file or folder in ``path`` that shadows one of Python's own modules.

    Args:
        path: as ``sys.path``, which is the default.
    """
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


def refusal_text(file: str) -> str:
    """Error line for ``file`` of :func:`shadowing_file`: what is wrong, and what would be right."""
    return (
        f"PYTHONPATH: {file} would be imported instead of Python's own module {_module_of(file)}, which hsplit and Ray"
        " need: rename it, or leave its directory out of PYTHONPATH"
    )


def refuse_shadowed_modules() -> None:
    """Exit with one line and code 2 if a file shadows one of Python's own modules."""
    if (file := shadowing_file()) is not None:
        try:
            os.write(2, f"error: {refusal_text(file)}\n".encode(errors="backslashreplace"))
        finally:
            sys.exit(2)


def _module_of(path: str) -> str:
    """Module name of the file or folder ``path``; empty if it is no module."""
    name = os.path.basename(path)
    for suffix in (".py", *EXTENSION_SUFFIXES):
        if name.endswith(suffix):
            return name.removesuffix(suffix)
    return name if os.path.isfile(os.path.join(path, "__init__.py")) else ""


def _shadows(name: str) -> bool:
    if name not in sys.stdlib_module_names or name in UNUSED:
        return False
    # Built-in and frozen modules are found before any file.
    return BuiltinImporter.find_spec(name) is None and FrozenImporter.find_spec(name) is None
