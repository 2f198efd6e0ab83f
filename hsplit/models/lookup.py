"""Finding the model that ``job.model`` names: a directory, or a hub model with its packaged twin."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from hsplit.errors import InputError
from hsplit.models.checkpoint_reader import has_weights, model_fingerprint, weight_files
from hsplit.models.hub import HubMiss, cached_snapshot, fetched_snapshot, is_hub_id
from hsplit.models.packaged import PACKAGED_TWINS, packaged_model
from hsplit.models.spec import ModelSpec
from hsplit.waiting import Waiting


@dataclass(frozen=True)
class ModelSource:
    """A model that was found.

    Attributes:
        directory: holds ``config.json`` and, unless it was found for planning alone, the tokenizer's files and weights.
        origin: description for the log: the source that was used, with version and checksum where there is one.
    """

    directory: Path
    origin: str

    @cached_property
    def spec(self) -> ModelSpec:
        """The model's configuration, read at first use; errors as :meth:`ModelSpec.read`."""
        return ModelSpec.read(self.directory)


@dataclass(frozen=True)
class ModelReference:
    """The base model as it is sent to an actor, which finds it on its own node.

    Attributes:
        model: ``job.model`` or the client's own.
        directory: place where the driver found ``job.model``; tried first, since nodes often share paths.
        fingerprint: required :func:`hsplit.models.checkpoint_reader.model_fingerprint` of the files there; ``None``
            where that has been checked already.
        accepted: ``job.accept_licence``.
    """

    model: str
    directory: Path | None
    fingerprint: str | None = None
    accepted: str | None = None

    def locate(self) -> Path:
        """Return the model's directory on this node, and download what is missing.

        Raises:
            InputError: it is not there, or another model than the run's.
        """
        directory = self.directory
        if directory is None or not _is_whole(directory):
            directory = find_model(self.model, accepted=self.accepted).directory
        if self.fingerprint is not None and model_fingerprint(directory) != self.fingerprint:
            raise InputError(f"job.model: {directory} is not the run's base model: other weights or configuration")
        return directory

    def read(self) -> ModelSpec:
        """Find the model on this node and read its configuration; errors as :meth:`locate`."""
        return ModelSpec.read(self.locate())


def _is_whole(directory: Path) -> bool:
    """True if a model can be read from ``directory``: for planning a node may have fetched the configuration alone."""
    return (directory / "config.json").is_file() and has_weights([file.name for file in directory.iterdir()])


def find_model(model: str, progress: bool = False, *, weights: bool = True, accepted: str | None = None) -> ModelSource:
    """Find ``model`` and download it if necessary.

    Tried in this order: a local directory; for a hub id the local hub cache, the hub, and the packaged twin of that
    model (:data:`hsplit.models.packaged.PACKAGED_TWINS`).

    Args:
        model: the value of ``job.model``.
        progress: show downloads and conversion on stderr; otherwise nothing is written.
        weights: false for planning: ``config.json`` is enough, and is all that is fetched of a hub model.
        accepted: ``job.accept_licence``, for a packaged twin with terms of use.

    Raises:
        InputError: not found (naming every place tried, and why it had nothing), gated, not in safetensors format, or
            damaged. One line, beginning with ``job.model``.
    """
    path = Path(os.path.expanduser(model))
    if os.path.isdir(path) or model.startswith((".", "/", "~")):
        if not os.path.isdir(path):
            raise InputError(f"job.model: there is no directory {path}")
        check_directory(path, weights=weights)
        return ModelSource(path.resolve(), f"the local directory {path.resolve()}")
    if not is_hub_id(model):
        raise InputError(
            f"job.model: {model!r} is neither an existing directory, nor a hub id such as "
            "HuggingFaceTB/SmolLM2-135M-Instruct"
        )
    return _find_on_hub(model, progress, weights, accepted)


def check_directory(directory: Path, *, weights: bool = True) -> None:
    """Refuse a directory from which no model can be read.

    Raises:
        InputError: without ``config.json``, or, where ``weights`` are required, without any as safetensors.
    """
    if not (directory / "config.json").is_file():
        raise InputError(f"job.model: the directory {directory} has no config.json, so it is no model")
    if not weights:
        return
    names = [file.name for file in directory.iterdir()]
    if not has_weights(names) and any(name.endswith(".bin") for name in names):
        raise InputError(
            f"job.model: {directory} holds only pickled weights (*.bin), and only safetensors are read; "
            f"to convert: AutoModelForCausalLM.from_pretrained({str(directory)!r})"
            ".save_pretrained(NEW_DIRECTORY), and the same with AutoTokenizer"
        )
    weight_files(directory)


def _find_on_hub(model: str, progress: bool, weights: bool, accepted: str | None) -> ModelSource:
    tried: list[str] = []
    for place, snapshot in (("local hub cache", cached_snapshot), ("hub", fetched_snapshot)):
        try:
            with Waiting(f"{model}: the {place}"):
                directory = snapshot(model, progress, weights)
        except HubMiss as miss:
            tried.append(f"{place}: {miss}")
            continue
        return ModelSource(directory, f"the {place}: {model} in {directory}")
    twin = PACKAGED_TWINS.get(model)
    cause: InputError | None = None
    if twin is None:
        tried.append(f"packaged twins: none of this model (there are those of {', '.join(PACKAGED_TWINS)})")
    else:
        try:
            directory = packaged_model(twin, progress, accepted=accepted)
        except InputError as error:
            cause = error
            tried.append(f"packaged twin: {str(error).removeprefix('job.model: ')}")
        else:
            terms = f" ({twin.terms})" if twin.terms is not None else ""
            return ModelSource(
                directory,
                f"the package {twin.package}=={twin.version}, file {twin.file}, licence {twin.licence}{terms} "
                f"(sha256 {twin.sha256} checked), converted to {directory}",
            )
    raise InputError(f"job.model: {model} was not found. Tried: {'; '.join(tried)}") from cause
