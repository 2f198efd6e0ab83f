"""Requests to a run under way: written into its inbox, taken at a round's end, replayed when the run is resumed."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, RootModel, ValidationError

from hsplit.config import SERVER, BudgetChange, RunConfig
from hsplit.config.cluster import SERVER_BUDGET_FIELDS, ClientConfig, ClientGroup
from hsplit.config.reading import displayed, read_json
from hsplit.config.section import STRICT, validation_error
from hsplit.errors import InputError
from hsplit.files import write_text_atomically
from hsplit.planning.budgets import BudgetRequest
from hsplit.run_directory import RunDirectory


@dataclass(frozen=True)
class _Budget:
    request: Literal["budget"]
    holder: str
    values: BudgetChange
    __pydantic_config__ = STRICT


@dataclass(frozen=True)
class _Join:
    request: Literal["join"]
    client: ClientConfig
    __pydantic_config__ = STRICT


@dataclass(frozen=True)
class _Leave:
    request: Literal["leave"]
    client: str
    __pydantic_config__ = STRICT


class _Document(RootModel[Annotated[_Budget | _Join | _Leave, Field(discriminator="request")]]):
    """The content of a request's file."""


@dataclass(frozen=True)
class JoinRequest:
    """Request that a client join.

    Attributes:
        client: with concrete budgets; one that has left or was set aside has those that it had.
        file: name of the request's file.
    """

    client: ClientConfig
    file: str = ""


@dataclass(frozen=True)
class LeaveRequest:
    """Request that a client leave.

    Attributes:
        client: its name.
        file: name of the request's file.
    """

    client: str
    file: str = ""


Request = BudgetRequest | JoinRequest | LeaveRequest


def post_budget(directory: RunDirectory, holder: str, values: Mapping[str, float]) -> Path:
    """Request a new budget of ``holder`` from the next round's end on.

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
    # A single node has the server's budget; the clients only bring their data.
    clients = () if run.policy.placement == "single" else _clients(run, directory)
    known = [*clients, SERVER]
    if holder not in known:
        raise InputError(f"{displayed(directory.path)}: has no holder {holder!r}; it has: {', '.join(known)}")
    try:
        change = BudgetChange.model_validate(dict(values)).values()
    except ValidationError as error:
        raise validation_error(f"the budget of {holder}", error) from None
    for field in change:
        if holder == SERVER and field not in SERVER_BUDGET_FIELDS:
            raise InputError(f"the budget of server: {field}: it has only {', '.join(SERVER_BUDGET_FIELDS)}")
    return _post(directory, {"request": "budget", "holder": holder, "values": change})


def post_join(directory: RunDirectory, client: str | Mapping[str, Any]) -> tuple[str, ...]:
    """Request that clients join the run in ``directory`` at the next round's end.

    Args:
        directory: the run's.
        client: an entry of a cluster file, a client or a group of them, with data of its own; or the name of a client
            that has left or was set aside.

    Returns:
        The names of the clients that are to join.

    Raises:
        InputError: the run takes no clients, the entry is no client, its name is taken, or it has no data.
    """
    run = RunConfig.load(directory.config)
    _refuse_fixed(run, directory)
    known, where = _clients(run, directory), "--client"
    if isinstance(client, str):
        if client not in known:
            raise InputError(f"{where}: the run has no client {client!r} to come back; it has: {', '.join(known)}")
        _post(directory, {"request": "join", "client": known[client].model_dump()})
        return (client,)
    try:
        group = ClientGroup.model_validate(dict(client))
    except ValidationError as error:
        raise validation_error(where, error) from None
    if group.data is None:
        raise InputError(f"{where}: data: must be a file on its node: the shared data is dealt out already")
    joining = group.expanded(run.job.seed)
    for one in joining:
        if one.name in known:
            raise InputError(f"{where}: name: {one.name} is a client of the run already; join it by its name alone")
    try:
        # The run's rules for its clients hold for these too.
        RunConfig.model_validate({**run.model_dump(), "clients": [c.model_dump() for c in (*run.clients, *joining)]})
    except ValidationError as error:
        raise validation_error(where, error) from None
    for one in joining:
        _post(directory, {"request": "join", "client": one.model_dump()})
    return tuple(one.name for one in joining)


def post_leave(directory: RunDirectory, client: str) -> None:
    """Request that ``client`` leave the run in ``directory`` at the next round's end.

    Raises:
        InputError: the run has no such client, or its group is fixed.
    """
    run = RunConfig.load(directory.config)
    _refuse_fixed(run, directory)
    known = _clients(run, directory)
    if client not in known:
        raise InputError(f"{displayed(directory.path)}: has no client {client!r}; it has: {', '.join(known)}")
    _post(directory, {"request": "leave", "client": client})


def _refuse_fixed(run: RunConfig, directory: RunDirectory) -> None:
    where = displayed(directory.path)
    if run.policy.placement == "single":
        raise InputError(f"{where}: its policy trains on one node with everybody's data: nobody joins or leaves")
    transport = run.job.transport
    if transport == "gloo":
        raise InputError(f"{where}: with job.transport {transport!r} the group is fixed: nobody joins or leaves")


def _clients(run: RunConfig, directory: RunDirectory) -> dict[str, ClientConfig]:
    """All clients that the run has had, or will have by the requests in its inbox, by name."""
    clients = {client.name: client for client in run.clients}
    for path in sorted([*directory.inbox.glob("taken/*/*.json"), *directory.inbox.glob("*.json")]):
        try:
            request = _read(path)
        except InputError:
            continue
        if isinstance(request, JoinRequest):
            clients.setdefault(request.client.name, request.client)
    return clients


def _post(directory: RunDirectory, request: Mapping[str, Any]) -> Path:
    # Names sort by time, so that of two requests the later wins.
    path = directory.inbox / f"{time.time_ns():020d}-{os.getpid()}.json"
    write_text_atomically(path, json.dumps(request) + "\n")
    return path


def take_requests(inbox: Path, round_: int) -> tuple[list[Request], list[str]]:
    """The requests for the end of round ``round_``, oldest first, and a sentence about each file that is no request.

    Files move to ``taken/round-NNNN/``: a run that is resumed from an earlier checkpoint finds them there at the same
    round's end again.
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
        except InputError as error:
            refused.append(f"inbox: {path.name} is no request and is left out ({error})")
    return requests, refused


def refuse_request(inbox: Path, file: str) -> None:
    """Move a request that cannot be met to ``refused/``: it is not replayed, and its client's name is free again."""
    refused = inbox / "refused"
    refused.mkdir(exist_ok=True)
    for path in inbox.glob("taken/*/*.json"):
        if path.name == file:
            path.replace(refused / path.name)


def _read(path: Path) -> Request:
    if not path.is_file():
        raise InputError(f"{displayed(path)}: is no plain file")
    document = read_json(path, _Document).root
    if isinstance(document, _Budget):
        return BudgetRequest(document.holder, document.values.values())
    if isinstance(document, _Join):
        return JoinRequest(document.client, path.name)
    return LeaveRequest(document.client, path.name)
