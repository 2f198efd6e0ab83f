"""Export of a run's result: a PEFT adapter or one merged model, with a model card."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from hsplit.actors.executor import one_line
from hsplit.config import RunConfig
from hsplit.config.reading import displayed
from hsplit.errors import InputError
from hsplit.exporting.adapter_files import export_peft
from hsplit.exporting.merge import export_merged, truncated
from hsplit.exporting.model_card import model_card
from hsplit.lora.learned import learned, trained_weights
from hsplit.models.dtype import DTYPES
from hsplit.models.factors import LowRank
from hsplit.models.hub import is_hub_id
from hsplit.models.lookup import ModelSource, find_model
from hsplit.run.checkpoint import latest_checkpoint, read_checkpoint
from hsplit.run.state import RunState
from hsplit.run_directory import RunDirectory
from hsplit.streams import is_terminal

PEFT, MERGED = "peft", "merged"
RUN, ORIGINAL = "run", "original"
FILE_DTYPES = ("fp32", "bf16")
# Files that mark a directory's format, which must not be mixed with the other one.
_MARKS = {PEFT: "adapter_config.json", MERGED: "config.json"}


@dataclass(frozen=True)
class Export:
    """Result of an export.

    Attributes:
        path: the directory.
        format: ``peft`` or ``merged``.
        lines: remarks for the user: errors of truncation, base and rounding, in words.
    """

    path: Path
    format: str
    lines: tuple[str, ...]


@dataclass(frozen=True)
class ExportOptions:
    """Options of an export.

    Attributes:
        format: ``peft``, ``merged``, or ``None``: an adapter, or a merged model if every weight was trained.
        rank: cut every weight's update to its leading directions; ``None``: do not cut. Adapters only.
        base: weights that a merged model is formed on: ``run`` or ``original``.
        dtype: of a merged model's files, ``fp32`` or ``bf16``.

    Raises:
        InputError: a value is unknown, or contradicts another.
    """

    format: str | None = None
    rank: int | None = None
    base: str = RUN
    dtype: str = "fp32"

    def __post_init__(self) -> None:
        for name, value, known in (
            ("format", self.format, (None, PEFT, MERGED)),
            ("base", self.base, (RUN, ORIGINAL)),
            ("dtype", self.dtype, FILE_DTYPES),
        ):
            if value not in known:
                raise InputError(f"--{name}: {value!r} is unknown; give {' or '.join(filter(None, known))}")
        if self.rank is not None and self.rank < 1:
            raise InputError(f"--rank: {self.rank} is too small; must be at least 1")
        if self.rank is not None and self.format == MERGED:
            raise InputError("--rank: cuts an adapter; a merged model has no rank, so leave it out")
        if self.format != MERGED and (self.base, self.dtype) != (RUN, "fp32"):
            raise InputError("--base and --dtype: belong to --format merged; an adapter leaves its base as it is")


def export(path: str | Path, to: str | Path | None = None, **options: object) -> Path:
    """Export what a run had learned at its last aggregation.

    Args:
        path: the run's directory.
        to: directory to write; by default ``adapter/`` or, for a merged model, ``model/`` in the run's directory.
        options: those of :class:`ExportOptions`.

    Returns:
        The directory, for ``PeftModel.from_pretrained`` or ``AutoModelForCausalLM.from_pretrained``.

    Raises:
        InputError: ``path`` is not a run, it has no complete checkpoint, or an option does not fit it.
    """
    return export_run(path, to, ExportOptions(**options)).path  # type: ignore[arg-type]  # checked there


def export_run(path: str | Path, to: str | Path | None, options: ExportOptions) -> Export:
    """Do :func:`export`, and return remarks for the user too."""
    directory = RunDirectory.open(Path(path))
    run = RunConfig.load(directory.config)
    checkpoint, passed_over = latest_checkpoint(directory.checkpoints)
    state, tensors = read_checkpoint(checkpoint)
    trained = trained_weights(tensors)
    format_ = options.format or (MERGED if trained and options.rank is None else PEFT)
    if trained and format_ == PEFT:
        raise InputError(
            f"{directory.path}: every weight was trained, so there is no adapter to write; give --format merged"
        )
    if trained and options.base == ORIGINAL:
        raise InputError(f"{directory.path}: --base original: every weight was trained, so there is no other base")
    source = find_model(run.job.model, is_terminal(sys.stderr), accepted=run.job.accept_licence)
    default = directory.adapter if format_ == PEFT else directory.path / "model"
    target = default if to is None else Path(to)
    try:
        terms = learned({key: tensor for own in tensors.values() for key, tensor in own.items()})
    except (LookupError, ValueError, RuntimeError) as error:
        raise InputError(f"{displayed(checkpoint)}: holds no adapters that go together: {one_line(error)}") from error
    with _written_beside(target, format_) as partial:
        if format_ == PEFT:
            lines = _write_adapter(run, source, terms, options, partial)
        else:
            lines = _write_merged(run, source, terms, trained, options, partial)
        lines = [*passed_over, *_unfinished(state, run), *lines]
        card = model_card(directory, run, source, state, format_, options.dtype, lines)
        (partial / "README.md").write_text(card, encoding="utf-8")
    return Export(target, format_, tuple(lines))


def _unfinished(state: RunState, run: RunConfig) -> list[str]:
    if state.round >= run.job.rounds:
        return []
    return [f"the run has done {state.round} of {run.job.rounds} rounds; this is what it had learned by then"]


def _write_adapter(
    run: RunConfig, source: ModelSource, terms: dict[str, LowRank], options: ExportOptions, to: Path
) -> list[str]:
    model = source.spec
    lines = []
    if options.rank is not None:
        terms, error = truncated(terms, options.rank)
        lines.append(f"cut to rank {options.rank}: relative Frobenius error of the update {error or 'none'}")
    growth = export_peft(
        terms,
        model.targeted(run.job.targets),
        base=base_name(run, source),
        fan_in_fan_out=model.family.transposed,
        to=to,
    )
    if growth is not None:
        lines.append(
            f"modules have ranks of their own, since one rank for all would make the adapter {growth:.3g} times as "
            "large: what reads rank_pattern and alpha_pattern, as PEFT does, scales every module rightly; for tools "
            "that know only r and lora_alpha, export with a smaller --rank or with --format merged"
        )
    return lines


def base_name(run: RunConfig, source: ModelSource) -> str:
    """The base that an adapter names: the hub id if the weights are the hub's, else the directory.

    A packaged twin has other values than the hub's model, so its directory is named.
    """
    from_hub = is_hub_id(run.job.model) and f" {run.job.model} in {source.directory}" in source.origin
    return run.job.model if from_hub else str(source.directory)


def _write_merged(
    run: RunConfig,
    source: ModelSource,
    terms: dict[str, LowRank],
    trained: dict[str, Tensor],
    options: ExportOptions,
    to: Path,
) -> list[str]:
    original = options.base == ORIGINAL
    errors = export_merged(
        source.spec,
        run.job.base,
        terms,
        to,
        trained=trained,
        original=original,
        dtype=DTYPES[options.dtype],
    )
    lines = []
    if original:
        difference = errors.base or "none"
        lines.append(
            f"merged onto the original weights, not onto the {run.job.base} base that was trained on; "
            f"relative Frobenius difference of the two bases: {difference}"
        )
    if errors.rounding is not None:
        lines.append(f"written as {options.dtype}: relative Frobenius error of the learned update {errors.rounding}")
    return lines


@contextmanager
def _written_beside(target: Path, format_: str) -> Iterator[Path]:
    """Yield a folder whose files are moved to ``target`` at the end; other files in ``target`` stay.

    Raises:
        InputError: ``target`` holds an export of the other format, or cannot be written.
    """
    other = MERGED if format_ == PEFT else PEFT
    if (target / _MARKS[other]).exists():
        raise InputError(f"--to {target}: holds a {other} export already; give another directory")
    partial = target / f".partial-{os.getpid()}"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"--to {target}: cannot be written ({error.strerror})") from None
    try:
        yield partial
        written = {file.name for file in partial.iterdir()}
        # Shards of an earlier export, of other sizes, would be loaded together with the new ones.
        for old in (*target.glob("model*.safetensors"), target / "model.safetensors.index.json"):
            if old.name not in written and format_ == MERGED:
                old.unlink(missing_ok=True)
        # The marking file comes last, so that a directory with it is complete.
        for file in sorted(partial.iterdir(), key=lambda file: file.name == _MARKS[format_]):
            os.replace(file, target / file.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
