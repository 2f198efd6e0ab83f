"""A run in TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch.utils.tensorboard import SummaryWriter

from hsplit.observe.metrics import MetricsRow, PlanRow
from hsplit.observe.run_log import RunLog
from hsplit.observe.timing import TimingRow
from hsplit.run_directory import RunDirectory


class TensorBoardLog(RunLog):
    """Writes ``runs/NAME/tensorboard/``, for ``tensorboard --logdir runs``.

    Steps that come again, in a round that is repeated or after a resume, take the place of those logged before.

    Args:
        directory: the run's directory.
        step: the last step that the run has done so far; 0 before any.
    """

    def __init__(self, directory: RunDirectory, step: int) -> None:
        super().__init__(step)
        self._folder = str(directory.tensorboard)

    def round_done(self, row: MetricsRow, holders: Sequence[PlanRow], timing: Sequence[TimingRow]) -> None:
        super().round_done(row, holders, timing)
        # What a checkpoint follows on must not be lost with the driver.
        self._writer.flush()

    def _open(self, run_name: str) -> None:
        # Of a run that was killed, there may be steps after its last checkpoint.
        self._writer = self._writer_from(self._step + 1)

    def _say(self, what: str, lines: Sequence[str]) -> None:
        # TensorBoard reads Markdown, in which two spaces end a line.
        self._writer.add_text(what, "  \n".join(lines), self._step)

    def _log(self, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, self._step)

    def _go_back(self) -> None:
        self._writer.close()
        self._writer = self._writer_from(self._step)

    def _close(self, failed: bool) -> None:
        self._writer.close()

    def _writer_from(self, first: int) -> SummaryWriter:
        """A writer whose steps, from ``first`` on, take the place of those that are there."""
        return SummaryWriter(self._folder, purge_step=first)
