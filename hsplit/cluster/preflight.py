"""Checks of every node before a run starts: versions, the base model, the clients' files.

Inspections and checks are plain functions; only :func:`preflight` runs them on a cluster.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from hsplit import __version__
from hsplit.cluster.placement import Node, Placement, requests_of
from hsplit.cluster.ray_failures import RAY_ERRORS, failure_from
from hsplit.config import ClientConfig, RunConfig
from hsplit.errors import InputError
from hsplit.machine import Level, Machine
from hsplit.models.checkpoint_reader import model_fingerprint
from hsplit.models.lookup import ModelReference

# Where a node cannot load a function, Ray gives the whole traceback as text.
_MISSING = re.compile(r"ModuleNotFoundError: (.*)")
PACKAGES = ("ray", "torch", "transformers", "bitsandbytes")


@dataclass(frozen=True)
class NodeRequirements:
    """Files that the holders on a node need there.

    Attributes:
        bases: reference of the base model by holder.
        data: path of a client's own file, by client.
    """

    bases: Mapping[str, ModelReference]
    data: Mapping[str, str]


@dataclass(frozen=True)
class NodeReport:
    """Versions, files and memory of a node.

    Attributes:
        versions: of Python, hsplit and :data:`PACKAGES`, without local parts such as ``+cpu``; ``None``: not there.
        unreadable: the reason why a client's file cannot be read, by client.
        machine: what it has left.
    """

    versions: Mapping[str, str | None]
    unreadable: Mapping[str, str]
    machine: Machine


@dataclass(frozen=True)
class FoundBase:
    """The base model as a holder finds it on its node.

    Attributes:
        directory: of the model.
        fingerprint: sha256 over its configuration and weights.
    """

    directory: Path
    fingerprint: str


def versions() -> dict[str, str | None]:
    """Return the versions in this process's environment that must be the same on every node."""
    python = ".".join(platform.python_version_tuple()[:2])
    return {"python": python, "hsplit": __version__} | {package: _public_version(package) for package in PACKAGES}


def _public_version(package: str) -> str | None:
    try:
        # The part after a plus names the device of the build, in which nodes may differ.
        return version(package).partition("+")[0]
    except PackageNotFoundError:
        return None


def inspect_node(required: NodeRequirements) -> NodeReport:
    """Inspect the node of this process."""
    unreadable = {client: why for client, path in required.data.items() if (why := _unreadable(path))}
    return NodeReport(versions(), unreadable, Machine.here())


def _unreadable(path: str) -> str:
    """Describe why the file at ``path`` cannot be read; empty if it can."""
    file = os.path.expanduser(path)
    if os.path.isfile(file):
        return "" if os.access(file, os.R_OK) else f"{file} may not be read"
    return f"{file} is a directory, no file" if os.path.isdir(file) else f"there is no file {file}"


def find_bases(required: NodeRequirements) -> dict[str, FoundBase | str]:
    """Find each holder's base model on this node, downloading it if needed; a string says why there is none."""
    found: dict[ModelReference, FoundBase | str] = {}
    for reference in set(required.bases.values()):
        try:
            directory = reference.locate()
            found[reference] = FoundBase(directory, model_fingerprint(directory))
        except (InputError, OSError) as error:
            found[reference] = str(error).removeprefix("job.model: ")
    return {holder: found[reference] for holder, reference in required.bases.items()}


def check_node(node: str, there: NodeReport, here: Mapping[str, str | None]) -> None:
    """Refuse a node with other versions than the driver's, or without a client's file.

    Args:
        node: its description.
        there, here: the node's report, and the driver's versions.

    Raises:
        InputError: names the node, the difference and the remedy.
    """
    for what, wanted in here.items():
        found = there.versions.get(what)
        if found != wanted:
            has = f"has {what} {found}" if found else f"has no {what}"
            needs = f"install {what} {wanted}" if wanted else f"uninstall {what}"
            raise InputError(f"node {node}: {has}, the driver {wanted or 'none'}: {needs} there")
    for client, why in there.unreadable.items():
        raise InputError(f"{client}: data: {why} on its node {node}")


def check_bases(node: str, found: Mapping[str, FoundBase | str], fingerprint: str) -> None:
    """Refuse a node where a holder would find no base model, or not the run's.

    Args:
        node: its description.
        found: by holder, see :func:`find_bases`.
        fingerprint: the run's.

    Raises:
        InputError: names the holder, the node and the directory.
    """
    for holder, base in found.items():
        if isinstance(base, str):
            raise InputError(f"{holder}: model: {base} (on its node {node})")
        if base.fingerprint != fingerprint:
            raise InputError(
                f"{holder}: model: {base.directory} on its node {node} is not the run's base model: sha256"
                f" {base.fingerprint[:12]}, the driver's is {fingerprint[:12]}; everybody needs the same files"
            )


def shortages(declared_bytes: Mapping[str, int], machine: Machine, where: str) -> list[str]:
    """Describe what holders would lack on a machine, a line each.

    Args:
        declared_bytes: memory of the holders on its CPUs, by name.
        machine: the machine.
        where: its description, such as ``node lab (10.0.0.3)``.
    """
    found = machine.findings(declared_bytes)
    return [f"{where}: {finding}" for finding in found if finding.level is not Level.OK]


# -- on a cluster -------------------------------------------------------------------------------------------------


def preflight(run: RunConfig, placement: Placement, directory: Path, fingerprint: str) -> list[str]:
    """Check every node that will host a holder, by a task on it.

    If only the driver's own node will, it is checked in this process.

    Args:
        run: resolved configuration.
        placement: the holders' nodes.
        directory: of the driver's base model.
        fingerprint: of that base model.

    Returns:
        Warnings.

    Raises:
        InputError: a node has other versions, another base model, or lacks a file; one line about the first of these.
        ActorFailure: a node could not be inspected.
    """
    here = ray.get_runtime_context().get_node_id()
    nodes = list({node.id: node for node in placement.nodes.values()}.values())
    requirements = [_requirements(run, placement, node, directory, node.id == here) for node in nodes]
    if [node.id for node in nodes] == [here]:
        check_node(str(nodes[0]), inspect_node(requirements[0]), versions())
        check_bases(str(nodes[0]), find_bases(requirements[0]), fingerprint)
        return []
    answers: list[NodeReport] = _ask(nodes, inspect_node, requirements)
    for node, answer in zip(nodes, answers, strict=True):
        check_node(str(node), answer, versions())
    # Last, since reading or downloading a large base may take minutes.
    for node, found in zip(nodes, _ask(nodes, find_bases, requirements), strict=True):
        check_bases(str(node), found, fingerprint)
    notes: list[str] = []
    for node, answer in zip(nodes, answers, strict=True):
        on_node = {name for name, its in placement.nodes.items() if its.id == node.id}
        declared = {name: own for name, own in run.declared_bytes().items() if name in on_node}
        notes += shortages(declared, answer.machine, f"node {node}")
    return notes


def _requirements(run: RunConfig, placement: Placement, node: Node, directory: Path, here: bool) -> NodeRequirements:
    """Collect the requirements of ``node``; the driver has read the base on its own node already."""
    references: dict[str, ModelReference] = {}
    data: dict[str, str] = {}
    for name, holder in requests_of(run):
        if name not in placement.nodes or placement.nodes[name].id != node.id:
            continue
        if isinstance(holder, ClientConfig) and holder.model is not None:
            references[name] = ModelReference(holder.model, None, accepted=run.job.accept_licence)
        elif not here:
            references[name] = ModelReference(run.job.model, directory, accepted=run.job.accept_licence)
        if isinstance(holder, ClientConfig) and holder.data is not None:
            data[name] = holder.data
    return NodeRequirements(references, data)


def _ask(
    nodes: Sequence[Node], inspection: Callable[[NodeRequirements], Any], arguments: Sequence[NodeRequirements]
) -> list[Any]:
    """Call ``inspection`` on every node, with the node's own requirements."""
    refs = []
    for node, required in zip(nodes, arguments, strict=True):
        there = NodeAffinitySchedulingStrategy(node.id, soft=False)
        task = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=there)(inspection)
        refs.append(task.remote(required))
    answers = []
    for node, ref in zip(nodes, refs, strict=True):
        try:
            answers.append(ray.get(ref))
        except RAY_ERRORS as error:
            missing = _MISSING.search(str(error))
            if missing is None:
                raise failure_from(error, f"node {node}", "being looked at") from error
            raise InputError(
                f"node {node}: hsplit cannot be imported there ({missing[1]}): install hsplit {__version__} there, for"
                " the Python that runs Ray"
            ) from error
    return answers
