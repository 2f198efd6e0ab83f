"""Snapshots of hub models: from the local cache without a network, or fetched."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    validate_repo_id,
)

from hsplit.errors import InputError
from hsplit.models.checkpoint_reader import has_weights, weight_files

PROBE_TIMEOUT_S = 5.0  # for a first answer of the hub; downloads have the hub's own limits

_CONFIGURATION = ["config.json"]
_WANTED = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.model", "*.txt", "*.jinja"]
# Only the top folder is the model as transformers loads it; below it are copies in other formats, gigabytes of them,
# and beside it Mistral's second copy under other names.
_UNWANTED = ["*/*", "consolidated*"]


class HubMiss(Exception):
    """A place has no usable snapshot; the text is the reason."""


def is_hub_id(model: str) -> bool:
    """True if ``model`` has the form of a hub id: ``org/name``, or a bare name such as ``gpt2``."""
    try:
        validate_repo_id(model)
    except HFValidationError:
        return False
    return True


def cached_snapshot(model: str, progress: bool = False, weights: bool = True) -> Path:
    """Find the snapshot of ``model`` in the local hub cache, without the network or any output.

    Without ``weights`` its ``config.json`` is enough.

    Raises:
        HubMiss: there is none, or it lacks files that a model needs.
    """
    del progress  # same signature as fetched_snapshot
    try:
        with _quiet(progress=False):
            found = snapshot_download(
                model, local_files_only=True, allow_patterns=_wanted(weights), ignore_patterns=_UNWANTED
            )
    except LocalEntryNotFoundError as error:
        raise HubMiss(f"not in {constants.HF_HUB_CACHE}") from error
    except Exception as error:  # an incomplete snapshot has a class of its own in some versions of the hub's library
        raise HubMiss(f"incomplete in {constants.HF_HUB_CACHE} ({_first_line(error)})") from error
    if not _is_complete(Path(found), weights):
        raise HubMiss(f"incomplete in {constants.HF_HUB_CACHE} (config.json or safetensors missing)")
    return Path(found)


def fetched_snapshot(model: str, progress: bool = False, weights: bool = True) -> Path:
    """Download what is missing of ``model`` into the hub cache, and return its snapshot directory.

    Without ``weights`` only its ``config.json`` is fetched. A first request without retries tests the connection, so
    that a machine without a network fails within :data:`PROBE_TIMEOUT_S`. ``HF_HUB_OFFLINE`` is respected.

    Raises:
        HubMiss: offline, not reachable, no such model, or the download failed.
        InputError: the model is there but gated, or has no safetensors.
    """
    if constants.HF_HUB_OFFLINE:
        raise HubMiss("not asked, because HF_HUB_OFFLINE is set")
    try:
        with _quiet(progress):
            info = HfApi().model_info(model, timeout=PROBE_TIMEOUT_S)
            names = [sibling.rfilename for sibling in info.siblings or []]
            if not _is_usable(names, weights):
                raise InputError(_unusable(model, names))
            return Path(snapshot_download(model, allow_patterns=_wanted(weights), ignore_patterns=_UNWANTED))
    except InputError:
        raise
    except GatedRepoError as error:
        raise InputError(
            f"job.model: {model} is gated: accept its licence on its hub page, then log in with "
            "`hf auth login` (or set HF_TOKEN)"
        ) from error
    except RepositoryNotFoundError as error:
        raise HubMiss("no such model, or a private one and not logged in (`hf auth login`)") from error
    except Exception as error:  # the HTTP library's errors share no base class across the hub library's versions
        raise HubMiss(f"no answer ({_first_line(error)})") from error


def _wanted(weights: bool) -> list[str]:
    return _WANTED if weights else _CONFIGURATION


def _is_usable(names: list[str], weights: bool) -> bool:
    return "config.json" in names and (not weights or has_weights(names))


def _is_complete(snapshot: Path, weights: bool) -> bool:
    """True if no file is missing: an interrupted download may have left the index without a shard."""
    names = [path.name for path in snapshot.iterdir()]
    return _is_usable(names, weights) and (not weights or all(file.is_file() for file in weight_files(snapshot)))


def _unusable(model: str, names: list[str]) -> str:
    if "config.json" not in names:
        return f"job.model: {model} on the hub has no config.json, so it is no model of transformers' form"
    return (
        f"job.model: {model} on the hub has no model.safetensors, and only safetensors are read; to convert: "
        f"AutoModelForCausalLM.from_pretrained({model!r}).save_pretrained(NEW_DIRECTORY), "
        "and the same with AutoTokenizer"
    )


def _first_line(error: Exception) -> str:
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@contextmanager
def _quiet(progress: bool) -> Iterator[None]:
    """Keep the hub library's warnings off stderr, and its bars unless ``progress``."""
    logger = logging.getLogger("huggingface_hub")
    level, bars = logger.level, not are_progress_bars_disabled()
    logger.setLevel(logging.CRITICAL)
    # With HF_HUB_DISABLE_PROGRESS_BARS set, switching them would only cause a warning.
    switch = bars and not progress and constants.HF_HUB_DISABLE_PROGRESS_BARS is None
    if switch:
        disable_progress_bars()
    try:
        yield
    finally:
        if switch:
            enable_progress_bars()
        logger.setLevel(level)
