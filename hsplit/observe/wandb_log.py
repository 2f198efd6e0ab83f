"""A run in Weights & Biases."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import wandb

from hsplit.config import RunConfig
from hsplit.errors import InputError
from hsplit.files import write_text_atomically
from hsplit.observe.run_log import RunLog
from hsplit.run_directory import RunDirectory


def check_signed_in() -> None:
    """Refuse to begin where a key is needed that is not there; in a terminal it is asked for.

    Raises:
        InputError: there is none.
    """
    if wandb.setup().settings.mode in ("offline", "dryrun", "disabled"):
        return
    try:
        signed_in = wandb.login(verify=False, prompt=sys.stdin.isatty())
    except (wandb.errors.UsageError, wandb.errors.AuthenticationError):
        signed_in = False
    if not signed_in:
        raise InputError("job.log: wandb has no API key; run `wandb login`, or set WANDB_MODE=offline")


class WandbLog(RunLog):
    """Tells Weights & Biases of a run.

    Its own environment variables (``WANDB_MODE``, ``WANDB_PROJECT``, ``WANDB_DIR`` …) come before what is set here: the
    project ``hsplit``, the run's name, its files in ``runs/NAME/wandb``, nothing printed. A run that is resumed goes on
    as the same run of theirs.

    Args:
        run: its configuration, which is shown beside the figures.
        directory: the run's directory.
        step: the last step that the run has done so far; 0 before any.
    """

    def __init__(self, run: RunConfig, directory: RunDirectory, step: int) -> None:
        super().__init__(step)
        self._config = run.model_dump(mode="json")
        self._directory = directory

    def _open(self, run_name: str) -> None:
        own: dict[str, tuple[str, Any]] = {
            "WANDB_PROJECT": ("project", "hsplit"),
            "WANDB_NAME": ("run_name", run_name),
            "WANDB_RUN_ID": ("run_id", self._id()),
            "WANDB_RESUME": ("resume", "allow"),
            "WANDB_DIR": ("root_dir", str(self._directory.path)),
            # Its lines would go through the live table.
            "WANDB_SILENT": ("silent", True),
            "WANDB_CONSOLE": ("console", "off"),
        }
        settings = dict(setting for variable, setting in own.items() if variable not in os.environ)
        self._run = wandb.init(config=self._config, settings=wandb.Settings(**settings))
        # Its own steps only grow; a round that is repeated has steps again.
        self._run.define_metric("*", step_metric="step")

    def _id(self) -> str:
        """Their id of this run, the same after a resume."""
        path = self._directory.wandb / "id"
        if not path.is_file():
            path.parent.mkdir(exist_ok=True)
            write_text_atomically(path, secrets.token_hex(4))
        return path.read_text(encoding="utf-8")

    def _say(self, what: str, lines: Sequence[str]) -> None:
        self._run.log({"step": self._step, what: "\n".join(lines)})

    def _log(self, figures: Mapping[str, float]) -> None:
        self._run.log({"step": self._step, **figures})

    def _go_back(self) -> None:
        """Both are shown: what was logged cannot be taken back."""

    def _close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))
