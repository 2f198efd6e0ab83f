"""Where Prometheus finds the runs that go on: a file for each, in its file-based service discovery's form."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

from hsplit.files import write_text_atomically
from hsplit.models.packaged import cache_root


def discovery_directory() -> Path:
    """The folder of these files, in the user's cache directory."""
    return cache_root() / "prometheus"


def discovery_file(name: str) -> Path:
    """The file of a run that calls itself ``name``, which no other does at the same time."""
    return discovery_directory() / f"{name}.json"


def announce(name: str, address: str) -> None:
    """Have Prometheus find a run's metrics at ``address`` (``HOST:PORT``) from now on.

    Where the file cannot be written they have to be looked for there; a run goes on without being watched.
    """
    with suppress(OSError):
        discovery_directory().mkdir(parents=True, exist_ok=True)
        # The label is Ray's own, so that whoever is found in Ray's file as well is one target.
        write_text_atomically(discovery_file(name), json.dumps([{"targets": [address], "labels": {"job": "ray"}}]))
