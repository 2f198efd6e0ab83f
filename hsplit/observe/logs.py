"""The logs of a run that ``job.log`` names, found when they are asked for: their libraries are optional."""

from __future__ import annotations

import importlib.util

from hsplit.config import RunConfig
from hsplit.errors import InputError
from hsplit.observe.terminal import Display
from hsplit.run_directory import RunDirectory


def check_logs(run: RunConfig) -> None:
    """Refuse a library of ``job.log`` that is not installed, or that nobody is signed in to."""
    for name in run.job.log:
        found = importlib.util.find_spec(name)
        # A mere folder of that name, such as W&B leaves in a working directory, has no file.
        if found is None or found.origin is None:
            raise InputError(f"job.log: {name} is not installed; run: pip install 'hsplit[{name}]', or leave it out")
    if "wandb" in run.job.log:
        from hsplit.observe.wandb_log import check_signed_in

        check_signed_in()


def logs_of(run: RunConfig, directory: RunDirectory, step: int) -> list[Display]:
    """The logs that ``job.log`` names, of a run that has done ``step`` local steps."""
    made: list[Display] = []
    if "tensorboard" in run.job.log:
        from hsplit.observe.tensorboard_log import TensorBoardLog

        made.append(TensorBoardLog(directory, step))
    if "wandb" in run.job.log:
        from hsplit.observe.wandb_log import WandbLog

        made.append(WandbLog(run, directory, step))
    return made
