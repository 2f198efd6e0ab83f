"""Requests to a run that is under way: written into its inbox, taken at a round's end, replayed when it is resumed."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from hsplit.actors.executor import SERVER
from hsplit.config import BudgetChange, RunConfig
from hsplit.config.cluster import SERVER_BUDGET_FIELDS
from hsplit.config.files import displayed
from hsplit.config.refusals import first_of, refusals
from hsplit.errors import InputError
from hsplit.run_directory import RunDirectory, write_text_atomically
from hsplit.scheduling.budgets import BudgetRequest


def post_budget(directory: RunDirectory, holder: str, values: Mapping[str, float]) -> Path:
    """Ask the run in ``directory`` to go on with a new budget of ``holder`` from the next round's end.

    Args:
        directory: the run's.
        holder: client name or ``server``.
        values: new values by field of the budget, in the units of the cluster file.

    Returns:
        The request's file.

    Raises:
        InputError: the run has no such holder, its budget no such field, or a value is out of range.
    """
    run = RunConfig.load(directory.config)
    # A single node has the server's budget; the clients only lend their data.
    known = [*(client.name for client in run.clients if run.policy.placement != "single"), SERVER]
    if holder not in known:
        raise InputError(f"{displayed(directory.path)}: has no holder {holder!r}; it has: {', '.join(known)}")
    try:
        change = BudgetChange.model_validate(dict(values)).values()
    except ValidationError as error:
        raise first_of(f"the budget of {holder}", refusals(error)) from None
    for field in change:
        if holder == SERVER and field not in SERVER_BUDGET_FIELDS:
            raise InputError(f"the budget of server: {field}: it has only {', '.join(SERVER_BUDGET_FIELDS)}")
    # Names sort by time, so that of two requests the later wins.
    path = directory.inbox / f"{time.time_ns():020d}-{os.getpid()}.json"
    write_text_atomically(path, json.dumps({"request": "budget", "holder": holder, "values": change}) + "\n")
    return path


def take_requests(inbox: Path, round_: int) -> tuple[list[BudgetRequest], list[str]]:
    """The requests for the end of round ``round_``, oldest first, and a sentence about each file that is none.

    Taken files move to ``taken/round-NNNN/``: a run that is resumed from an earlier checkpoint finds them there at
    the same round's end again.
    """
    taken = inbox / "taken" / f"round-{round_:04d}"
    new = sorted(path for path in inbox.glob("*.json") if path.is_file())
    if new:
        taken.mkdir(parents=True, exist_ok=True)
        for path in new:
            path.replace(taken / path.name)
    requests, refused = [], []
    for path in sorted(taken.glob("*.json")):
        try:
            requests.append(_read(path))
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            first = str(error).strip().splitlines()
            refused.append(f"inbox: {path.name} is no request and is left out ({first[0] if first else error!r})")
    return requests, refused


def _read(path: Path) -> BudgetRequest:
    document = json.loads(path.read_text(encoding="utf-8"))
    if document["request"] != "budget":
        raise ValueError(f"unknown request {document['request']!r}")
    return BudgetRequest(str(document["holder"]), BudgetChange.model_validate(document["values"]).values())
