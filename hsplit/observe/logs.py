"""Logs of a run in TensorBoard and Weights & Biases: figures by name, over local steps.

Both libraries are optional, and imported only if ``job.log`` names them.
"""

from __future__ import annotations

import importlib.util
import os
import secrets
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from hsplit.config import RunConfig
from hsplit.errors import InputError
from hsplit.files import write_text_atomically
from hsplit.observe.observer import Observer
from hsplit.observe.plan_text import holder_line, plan_lines
from hsplit.observe.tables import MetricsRow, PlanRow, TimingRow
from hsplit.planning.plan import Plan
from hsplit.run_directory import RunDirectory

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

MOST_HOLDERS = 100
"""Largest number of holders with figures of their own; with more, only the run's figures are logged."""


class RunLog(Observer, ABC):
    """Observer that writes a run's figures to a logging library.

    Steps are local steps over the whole run. A repeated round logs its steps a second time.

    Args:
        step: the last local step done so far; 0 before any.
    """

    def __init__(self, step: int) -> None:
        self._step = step
        self._opened = False

    @abstractmethod
    def _open(self, run_name: str) -> None:
        """Open the log, or continue the run's existing one."""

    @abstractmethod
    def _log_text(self, name: str, lines: Sequence[str]) -> None:
        """Log a text."""

    @abstractmethod
    def _log(self, figures: Mapping[str, float]) -> None:
        """Log figures at step ``self._step``."""

    @abstractmethod
    def _close(self, failed: bool) -> None:
        """Flush and close."""

    @abstractmethod
    def _rewind(self) -> None:
        """Prepare to log step ``self._step`` and later ones again."""

    def started(self, run_name: str, lines: Sequence[str]) -> None:
        self._open(run_name)
        self._opened = True
        self._log_text("run", [run_name, *lines])

    def plan(self, plan: Plan) -> None:
        holders = [*plan.clients[:MOST_HOLDERS], plan.server]
        self._log_text("plan", [*(holder_line(holder, plan.layers) for holder in holders), *plan_lines(plan)])

    def step(
        self, round: int, rounds: int, step: int, steps: int, losses: Mapping[str, float], states: Mapping[str, str]
    ) -> None:
        back, self._step = step <= self._step, step
        if back:
            self._rewind()
        if len(losses) <= MOST_HOLDERS:
            self._log({f"loss/{name}": loss for name, loss in losses.items()})

    def round_done(self, row: MetricsRow, holders: Sequence[PlanRow], timing: Sequence[TimingRow]) -> None:
        back, self._step = row.step < self._step, row.step
        if back:
            self._rewind()
        self._log(round_figures(row, holders))

    def note(self, text: str, event: str = "", /, **fields: Any) -> None:
        self._log_text("notes", [text])

    def finished(self, lines: Sequence[str]) -> None:
        self._log_text("run", lines)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._opened:
            self._close(error is not None)


def round_figures(row: MetricsRow, holders: Sequence[PlanRow]) -> dict[str, float]:
    """Return the figures of a round by the names that they are logged under."""
    figures: dict[str, float] = {
        "progress/round": row.round,
        "progress/tokens": row.tokens,
        "progress/wall_time_s": row.wall_time_s,
        "progress/virtual_time_s": row.virtual_time_s,
        "bytes/up": row.bytes_up,
        "bytes/down": row.bytes_down,
        "plan/captured_importance": row.captured_importance,
        "plan/available_clients": row.available_clients,
    }
    optional = {
        "train/loss": row.train_loss,
        "validation/loss": row.val_loss,
        "validation/perplexity": row.val_ppl,
        "validation/worst_client_perplexity": row.worst_ppl,
        "progress/train_wall_time_s": row.train_wall_time_s,
        "progress/train_virtual_time_s": row.train_virtual_time_s,
    }
    figures |= {name: value for name, value in optional.items() if value is not None}
    if len(holders) > MOST_HOLDERS:
        return figures
    for holder in holders:
        own = {
            "split": holder.split,
            "rows": holder.rows,
            "validation_perplexity": holder.val_ppl,
            "rank_total": holder.rank_total,
            "memory_predicted_bytes": holder.predicted_bytes,
            "memory_measured_bytes": holder.measured_bytes,
            "step_time_predicted_s": holder.predicted_time_s,
            "step_time_measured_s": holder.measured_time_s,
        }
        figures |= {f"{name}/{holder.name}": value for name, value in own.items() if value is not None}
    return figures


class TensorBoardLog(RunLog):
    """Writes ``runs/NAME/tensorboard/``, for ``tensorboard --logdir runs``.

    Steps that are repeated, in a repeated round or after a resume, replace those logged before.

    Args:
        directory: the run's directory.
        step: the last local step done so far; 0 before any.
    """

    def __init__(self, directory: RunDirectory, step: int) -> None:
        super().__init__(step)
        self._folder = str(directory.tensorboard)

    def round_done(self, row: MetricsRow, holders: Sequence[PlanRow], timing: Sequence[TimingRow]) -> None:
        super().round_done(row, holders, timing)
        # A checkpoint follows: the figures before it must not be lost with the driver.
        self._writer.flush()

    def _open(self, run_name: str) -> None:
        # A killed run may have logged steps after its last checkpoint.
        self._writer = self._writer_from(self._step + 1)

    def _log_text(self, name: str, lines: Sequence[str]) -> None:
        # TensorBoard reads Markdown, in which two spaces end a line.
        self._writer.add_text(name, "  \n".join(lines), self._step)

    def _log(self, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, self._step)

    def _rewind(self) -> None:
        self._writer.close()
        self._writer = self._writer_from(self._step)

    def _close(self, failed: bool) -> None:
        self._writer.close()

    def _writer_from(self, first: int) -> SummaryWriter:
        """Return a writer whose steps from ``first`` on replace those on disk."""
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(self._folder, purge_step=first)


class WandbLog(RunLog):
    """Log in Weights & Biases.

    Its own environment variables (``WANDB_MODE``, ``WANDB_PROJECT``, ``WANDB_DIR`` …) override the defaults here: the
    project ``hsplit``, the run's name, its files in ``runs/NAME/wandb``, nothing printed. A resumed run
    continues the same W&B run.

    Args:
        run: the configuration, shown beside the figures.
        directory: the run's directory.
        step: the last local step done so far; 0 before any.
    """

    def __init__(self, run: RunConfig, directory: RunDirectory, step: int) -> None:
        super().__init__(step)
        self._config = run.model_dump(mode="json")
        self._directory = directory

    def _open(self, run_name: str) -> None:
        import wandb

        own: dict[str, tuple[str, Any]] = {
            "WANDB_PROJECT": ("project", "hsplit"),
            "WANDB_NAME": ("run_name", run_name),
            "WANDB_RUN_ID": ("run_id", self._id()),
            "WANDB_RESUME": ("resume", "allow"),
            "WANDB_DIR": ("root_dir", str(self._directory.path)),
            # Its output would break the live table.
            "WANDB_SILENT": ("silent", True),
            "WANDB_CONSOLE": ("console", "off"),
        }
        settings = dict(setting for variable, setting in own.items() if variable not in os.environ)
        self._run = wandb.init(config=self._config, settings=wandb.Settings(**settings))
        # W&B's own steps can only grow, and a repeated round repeats its steps.
        self._run.define_metric("*", step_metric="step")

    def _id(self) -> str:
        """The W&B id of this run, the same after a resume."""
        path = self._directory.wandb / "id"
        if not path.is_file():
            path.parent.mkdir(exist_ok=True)
            write_text_atomically(path, secrets.token_hex(4))
        return path.read_text(encoding="utf-8")

    def _log_text(self, name: str, lines: Sequence[str]) -> None:
        self._run.log({"step": self._step, name: "\n".join(lines)})

    def _log(self, figures: Mapping[str, float]) -> None:
        self._run.log({"step": self._step, **figures})

    def _rewind(self) -> None:
        """Do nothing: logged steps cannot be removed, and both are shown."""

    def _close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def logs_of(run: RunConfig, directory: RunDirectory, step: int) -> list[Observer]:
    """Return the logs that ``job.log`` names, of a run that has done ``step`` local steps."""
    logs: list[Observer] = []
    if "tensorboard" in run.job.log:
        logs.append(TensorBoardLog(directory, step))
    if "wandb" in run.job.log:
        logs.append(WandbLog(run, directory, step))
    return logs


def check_logs(run: RunConfig) -> None:
    """Check that the libraries of ``job.log`` are installed and have the account key that they may need.

    Raises:
        InputError: one is missing.
    """
    for name in run.job.log:
        found = importlib.util.find_spec(name)
        # A folder of that name without a file, such as W&B leaves in a working directory, is no module.
        if found is None or found.origin is None:
            raise InputError(f"job.log: {name} is not installed; run: pip install 'hsplit[{name}]', or leave it out")
    if "wandb" not in run.job.log:
        return
    import wandb

    if wandb.setup().settings.mode in ("offline", "dryrun", "disabled"):
        return
    try:
        signed_in = wandb.login(verify=False, prompt=sys.stdin.isatty())
    except (wandb.errors.UsageError, wandb.errors.AuthenticationError):
        signed_in = False
    if not signed_in:
        raise InputError("job.log: wandb has no API key; run `wandb login`, or set WANDB_MODE=offline")
