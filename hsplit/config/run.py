"""Resolved configuration of a run: files, overrides and draws combined."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator

from hsplit.config.cluster import CENTRAL, MAX_TAKING_PART, ClientConfig, ClientGroup, ServerConfig, unique_names
from hsplit.config.job import TORCH_OPTIMIZERS, Job, Partition
from hsplit.config.overrides import Override, Overrides, below, parse_overrides
from hsplit.config.policy import DEFAULT_POLICY, Policy
from hsplit.config.reading import displayed, find_preset, read_yaml, to_yaml
from hsplit.config.section import (
    LARGEST,
    LIST,
    NOT_EMPTY,
    Refusal,
    Section,
    input_error,
    refusals,
    refuse,
    shown,
    validation_error,
)
from hsplit.errors import InputError
from hsplit.files import write_text_atomically

STEP_KEYS = ("lr", "schedule", "warmup", "clip", "weight_decay")
"""Keys of ``job`` that decide the size of a step and nothing else: like ``faults``, they may change on a resume."""

_HEADER = "# The configuration of this run with every default, override and draw written out; made by hsplit.\n"


def _distinct(clients: tuple[ClientConfig, ...]) -> tuple[ClientConfig, ...]:
    seen: dict[str, int] = {}
    for index, client in enumerate(clients):
        name = client.name.lower()
        if name in seen:
            raise refuse(f"{shown(client.name)} is also the name of clients[{seen[name]}]", index, "name")
        seen[name] = index
    return clients


def _check_shares(job: Job, sharing: int) -> None:
    partition = job.data.partition
    if isinstance(partition, Partition) and partition.shares is not None and len(partition.shares) != sharing:
        raise refuse(
            f"must have one entry for each of the {sharing} clients without data of their own"
            f" (got {len(partition.shares)})",
            *("job", "data", "partition", "shares"),
        )


def _check_gpus(job: Job, policy: Policy, server: ServerConfig, clients: Sequence[ClientConfig | ClientGroup]) -> None:
    """Refuse GPUs that nothing would run on, and a paged optimizer without a GPU."""
    if server.num_gpus > 1 and policy.placement != "split":
        raise refuse(
            f"must be at most 1 with placement {policy.placement!r}, which leaves the server no layers to spread over"
            f" several (got {server.num_gpus:g})",
            *("server", "num_gpus"),
        )
    if not job.optimizer.startswith("paged"):
        return
    training = {client.name: client.num_gpus for client in clients} if policy.placement != "single" else {}
    if policy.placement != "full":
        training["server"] = server.num_gpus
    for name, gpus in training.items():
        if gpus == 0:
            raise refuse(
                f"{job.optimizer!r} pages moments out of a GPU, and {shown(name)} trains without one (num_gpus 0, or"
                " --cpu): give it one, or choose 'adamw' or 'adamw8bit'",
                *("job", "optimizer"),
            )


def _check_late(job: Job, clients: Sequence[ClientConfig | ClientGroup]) -> None:
    """Refuse ``late`` clients with a transport that none can join later."""
    if job.transport != "gloo":
        return
    for index, client in enumerate(clients):
        if client.late:
            raise refuse(
                f"nobody can come later with job.transport {shown(job.transport)}: leave it out, or set that to"
                " 'store'",
                *("clients", index, "late"),
            )


def _check_placement(job: Job, policy: Policy, server: ServerConfig, own_data: list[str]) -> None:
    """Refuse settings of the job that have no meaning with the policy's placement."""
    if policy.train == "weights" and (job.dropout or job.targets != "all-linear"):
        key = "dropout" if job.dropout else "targets"
        raise refuse("is of adapters, and this policy trains every weight: leave it out", "job", key)
    if policy.train == "weights" and job.optimizer not in TORCH_OPTIMIZERS:
        raise refuse(
            f"must be 'adamw' or 'sgd', since this policy trains every weight (got {shown(job.optimizer)}, which is for"
            " adapters)",
            *("job", "optimizer"),
        )
    if policy.placement == "split":
        return
    if server.replicas > 1:
        raise refuse(
            f"placement {policy.placement!r} leaves the server no layers for others to share (got {server.replicas}):"
            " set it to 1, or choose a policy that splits the model",
            *("server", "replicas"),
        )
    if policy.placement == "single" and job.clients_per_round is not None:
        raise refuse(
            "placement 'single' has one node with everybody's data, and nobody to draw: leave it out",
            *("job", "clients_per_round"),
        )
    if job.privacy.noise:
        raise refuse(
            f"placement {policy.placement!r} sends no activations that noise could hide: set it to 0, or choose a"
            " policy that splits the model",
            *("job", "privacy", "noise"),
        )
    if policy.placement == "single" and job.privacy.labels == "client":
        raise refuse(
            "placement 'single' gathers everybody's data on one node, labels included: set it to 'server'",
            *("job", "privacy", "labels"),
        )
    if policy.placement == "single" and own_data:
        raise refuse(
            f"'single' gathers everybody's data on one node, but {own_data[0]} keeps its own: leave its `data` out, or"
            " choose another policy",
            *("policy", "placement"),
        )


class RunConfig(Section):
    """Complete configuration of a run: server and clients, job and policy."""

    server: ServerConfig = Field(default=ServerConfig(), description="the server")
    clients: Annotated[tuple[ClientConfig, ...], LIST, NOT_EMPTY, AfterValidator(_distinct)] = Field(
        description="every client, with concrete budgets"
    )
    job: Job = Field(default=Job(), description="what is trained")
    policy: Policy = Field(default=Policy(), description="how it is trained")

    @model_validator(mode="after")
    def _shares_for_all(self) -> Self:
        _check_shares(self.job, sum(client.data is None for client in self.clients))
        own_data = [client.name for client in self.clients if client.data is not None]
        _check_placement(self.job, self.policy, self.server, own_data)
        _check_gpus(self.job, self.policy, self.server, self.clients)
        _check_late(self.job, self.clients)
        return self

    def declared_bytes(self) -> dict[str, int]:
        """Collect the memory that the holders on CPUs declare, by name."""
        holders = [
            *((name, self.server) for name in self.server.names),
            *((own.name, own) for own in self.participants),
        ]
        return {name: holder.memory_bytes for name, holder in holders if not holder.num_gpus}

    @property
    def participants(self) -> tuple[ClientConfig, ...]:
        """The holders that train: the clients, or with placement ``single`` the one node with the server's budget."""
        if self.policy.placement != "single":
            return self.clients
        server = self.server
        # Its name is reserved, which only construction without validation allows.
        central = ClientConfig.model_construct(
            name=CENTRAL,
            kind=CENTRAL,
            memory_gb=server.memory_gb,
            tflops=server.tflops,
            num_cpus=server.num_cpus,
            num_gpus=server.num_gpus,
            node=server.node,
            resources=server.resources,
            labels=server.labels,
            # It sends nothing: its link is no limit.
            bandwidth_mbps=float(LARGEST),
            latency_ms=0.0,
        )
        return (central,)

    @property
    def scales_lr(self) -> bool:
        """True if holders whose updates are averaged train at more than ``job.lr`` (``policy.lr_scaling``)."""
        policy = self.policy
        return policy.lr_scaling != "none" and policy.placement != "single" and self.job.optimizer != "sgd"

    def resumed_with(self, overrides: Overrides) -> tuple[Self, list[str]]:
        """The configuration of a run that has begun, with other settings of its steps and of faults.

        Args:
            overrides: as for :func:`load_run_config`, of the keys in :data:`STEP_KEYS` and ``faults`` alone:
                data, plan and state of the run already depend on all others.

        Returns:
            The configuration, and a sentence about each change: ``job.lr is now 0.001 (was 1.0)``.

        Raises:
            InputError: another key is named, or a value is out of range.
        """
        changed, changes = self, []
        for step in parse_overrides(overrides):
            document = changed.model_dump()
            path = step.path(document)
            if path[0] != "job" or not (path[1:-1] == ("faults",) or (len(path) == 2 and path[1] in STEP_KEYS)):
                keys = ", ".join(f"job.{key}" for key in (*STEP_KEYS, "faults.*"))
                raise InputError(
                    f"{step.where}: a run that has begun keeps it; {keys} can be changed. For anything else launch a"
                    " run of another name"
                )
            try:
                new = type(self).model_validate(step.applied_to(document))
            except ValidationError as error:
                found = refusals(error)
                raise input_error(step.where, below(path, found[0]), len(found) - 1) from None
            before, after = (_value(config.job, path[1:]) for config in (changed, new))
            if before != after:
                changes.append(f"{'.'.join(map(str, path))} is now {shown(after)} (was {shown(before)})")
            changed = new
        return changed, changes

    def save(self, path: str | Path) -> None:
        """Write the configuration as YAML, atomically."""
        document = self.model_dump()
        # The name first, for readers; pydantic puts inherited fields before it.
        document["clients"] = [{"name": client["name"], **client} for client in document["clients"]]
        write_text_atomically(path, _HEADER + to_yaml(document))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a configuration that :meth:`save` wrote.

        Raises:
            InputError: the file is missing or is not a resolved configuration.
        """
        document = read_yaml(path)
        try:
            return cls.model_validate(document)
        except ValidationError as error:
            raise validation_error(displayed(path), error) from None


class _Declared(Section):
    """A cluster file and a policy file before groups are expanded and budgets drawn."""

    server: ServerConfig = ServerConfig()
    clients: Annotated[tuple[ClientGroup, ...], LIST, NOT_EMPTY, AfterValidator(unique_names)]
    job: Job = Job()
    policy: Policy = Policy()

    @model_validator(mode="after")
    def _shares_for_all(self) -> Self:
        _check_shares(self.job, sum(group.count for group in self.clients if group.data is None))
        own_data = [group.name for group in self.clients if group.data is not None]
        _check_placement(self.job, self.policy, self.server, own_data)
        _check_gpus(self.job, self.policy, self.server, self.clients)
        _check_late(self.job, self.clients)
        return self

    def check_size(self, most: int, where: str) -> None:
        """Refuse more than ``most`` clients before groups are expanded."""
        if (total := sum(group.count for group in self.clients)) > most:
            raise InputError(f"{where}: clients: must be at most {most} clients in all (got {total})")

    def resolved(self, *, cpu: bool) -> RunConfig:
        clients = tuple(client for group in self.clients for client in group.expanded(self.job.seed))
        server = self.server
        if cpu:
            server = server.model_copy(update={"num_gpus": 0.0})
            clients = tuple(client.model_copy(update={"num_gpus": 0.0}) for client in clients)
        return RunConfig(server=server, clients=clients, job=self.job, policy=self.policy)


def _value(section: Any, path: Sequence[str | int]) -> Any:
    """The value at ``path`` of a section's attributes."""
    for key in path:
        section = getattr(section, str(key))
    return section


def load_run_config(
    cluster: str | Path,
    policy: str | Path | None = None,
    overrides: Overrides = (),
    cpu: bool = False,
    client_defaults: Mapping[str, Any] | None = None,
    most_clients: int = MAX_TAKING_PART,
) -> RunConfig:
    """Resolve a cluster file, a policy file and overrides.

    Args:
        cluster: a path or a preset's name.
        policy: the same for the policy; ``None``: ``hsplitlora``.
        overrides: ``key=value`` strings or a mapping of dotted keys. A key starts with ``server``,
            ``clients.GROUP``, ``job`` or ``policy``; any other is a key of ``job``. Later ones win.
        cpu: reserve no GPUs, whatever the file says.
        client_defaults: values of keys that an entry of ``clients`` may then leave out.
        most_clients: largest number of clients.

    Raises:
        InputError: anything is wrong with the files or the overrides; the text names the file or
            ``--set KEY``, the key, and what would be right.
    """
    cluster_path = find_preset("cluster", cluster)
    policy_path = find_preset("policies", DEFAULT_POLICY if policy is None else policy)
    document = read_yaml(cluster_path)
    if "policy" in document:
        where = displayed(cluster_path)
        raise InputError(f"{where}: policy: unknown key (a policy is a file of its own, given with --policy)")
    if client_defaults and isinstance(document.get("clients"), list):
        groups = [{**client_defaults, **g} if isinstance(g, Mapping) else g for g in document["clients"]]
        document = {**document, "clients": groups}
    steps = parse_overrides(overrides)
    documents = [{**document, "policy": {"name": policy_path.stem, **read_yaml(policy_path)}}]
    for step in steps:
        documents.append(step.applied_to(documents[-1]))
    try:
        declared = _Declared.model_validate(documents[-1])
        declared.check_size(most_clients, displayed(cluster_path))
        return declared.resolved(cpu=cpu)
    except ValidationError as error:
        found = refusals(error)
    refused, blamed = found[0], _blamed(found[0], documents, cpu)
    if blamed:
        raise _override_error(steps[blamed - 1], documents[blamed - 1], refused, len(found) - 1)
    in_policy = refused.at[:1] == ("policy",)
    where = displayed(policy_path if in_policy else cluster_path)
    raise input_error(where, below(("policy",), refused), len(found) - 1)


def _blamed(refused: Refusal, documents: list[dict[str, Any]], cpu: bool) -> int:
    """Index of the document that first has the error: 0 for the files, n for the nth override."""
    for index in range(len(documents) - 1, 0, -1):
        try:
            _Declared.model_validate(documents[index - 1]).resolved(cpu=cpu)
        except ValidationError as error:
            if refused in refusals(error):
                continue
        return index
    return 0


def _override_error(step: Override, before: dict[str, Any], refused: Refusal, more: int) -> InputError:
    return input_error(step.where, below(step.path(before), refused), more)
