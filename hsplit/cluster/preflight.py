"""What must be the same or there on every node before a run starts: versions, the base model, the clients' files.

The questions and the judgement are plain functions; only :func:`preflight` asks them on a cluster.
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

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from hsplit import __version__
from hsplit.cluster.placement import Node, Placement, requests_of
from hsplit.cluster.ray_failures import RAY_ERRORS, failure_from
from hsplit.config import ClientConfig, RunConfig
from hsplit.errors import InputError
from hsplit.models.checkpoint_reader import model_fingerprint
from hsplit.models.source import ModelReference

# Of a function that a node could not load, Ray gives the whole traceback as text.
_MISSING = re.compile(r"ModuleNotFoundError: (.*)")
PACKAGES = ("ray", "torch", "transformers", "bitsandbytes")


@dataclass(frozen=True)
class NodeRequirements:
    """What is asked of a node, by those who run there.

    Attributes:
        bases: by holder where it will look for the base model.
        data: by client its own file.
    """

    bases: Mapping[str, ModelReference]
    data: Mapping[str, str]


@dataclass(frozen=True)
class NodeReport:
    """What a node says of itself.

    Attributes:
        versions: of Python, hsplit and :data:`PACKAGES`, without local parts such as ``+cpu``; ``None``: not there.
        unreadable: by client why its file cannot be read.
        free_bytes: memory that is available now.
    """

    versions: Mapping[str, str | None]
    unreadable: Mapping[str, str]
    free_bytes: int


@dataclass(frozen=True)
class FoundBase:
    """The base model as a holder finds it on its node.

    Attributes:
        directory: where.
        fingerprint: sha256 over its configuration and weights.
    """

    directory: Path
    fingerprint: str


def versions() -> dict[str, str | None]:
    """The versions in this process's environment, by what must be the same on every node."""
    python = ".".join(platform.python_version_tuple()[:2])
    return {"python": python, "hsplit": __version__} | {package: _public_version(package) for package in PACKAGES}


def _public_version(package: str) -> str | None:
    try:
        # What follows a plus says for which device it was built, in which nodes may well differ.
        return version(package).partition("+")[0]
    except PackageNotFoundError:
        return None


def inspect_node(hosted: NodeRequirements) -> NodeReport:
    """What this node has."""
    unreadable = {client: why for client, path in hosted.data.items() if (why := _unreadable(path))}
    return NodeReport(versions(), unreadable, psutil.virtual_memory().available)


def _unreadable(path: str) -> str:
    """Why there is nothing to read at ``path``; empty if there is."""
    file = os.path.expanduser(path)
    if os.path.isfile(file):
        return "" if os.access(file, os.R_OK) else f"{file} may not be read"
    return f"{file} is a directory, no file" if os.path.isdir(file) else f"there is no file {file}"


def find_bases(hosted: NodeRequirements) -> dict[str, FoundBase | str]:
    """By holder the base model that it finds on this node, or why it finds none; what is missing is downloaded."""
    found: dict[ModelReference, FoundBase | str] = {}
    for reference in set(hosted.bases.values()):
        try:
            directory = reference.locate()
            found[reference] = FoundBase(directory, model_fingerprint(directory))
        except (InputError, OSError) as error:
            found[reference] = str(error).removeprefix("job.model: ")
    return {holder: found[reference] for holder, reference in hosted.bases.items()}


def check_node(node: str, there: NodeReport, here: Mapping[str, str | None]) -> None:
    """Refuse a node with other versions than the driver's, or without a client's file.

    Args:
        node: in words.
        there, here: what the node says, and the driver's versions.

    Raises:
        InputError: names the node, what differs and what would be right.
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
    """Refuse a node where a holder would find no base model, or another one than the run's.

    Args:
        node: in words.
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


def memory_note(node: str, declared_bytes: Mapping[str, int], free_bytes: int) -> str:
    """A sentence about a node with less free memory than those who compute on its CPUs declare; else empty.

    Args:
        node: in words.
        declared_bytes: by holder.
        free_bytes: what the node has.
    """
    declared = sum(declared_bytes.values())
    if declared <= free_bytes:
        return ""
    names = ", ".join(declared_bytes)
    free, wanted = free_bytes / 1e9, declared / 1e9
    return f"node {node} has {free:.1f} GB of memory free, and {wanted:.1f} GB are declared for {names}"


# -- on a cluster -------------------------------------------------------------------------------------------------


def preflight(run: RunConfig, placement: Placement, directory: Path, fingerprint: str) -> list[str]:
    """Look at every node that will host somebody, each by a task on it.

    Where that is the driver's own node alone, nothing is asked of Ray: what the driver has is there.

    Args:
        run: resolved configuration.
        placement: who runs where.
        directory: where the driver found the base model.
        fingerprint: the base model's there.

    Returns:
        Sentences about what is no obstacle yet.

    Raises:
        InputError: a node has other versions, another base model, or lacks a file; one line about the first of these.
        ActorFailure: a node could not be looked at.
    """
    here = ray.get_runtime_context().get_node_id()
    nodes = list({node.id: node for node in placement.nodes.values()}.values())
    questions = [_requirements(run, placement, node, directory, node.id == here) for node in nodes]
    if [node.id for node in nodes] == [here]:
        check_node(str(nodes[0]), inspect_node(questions[0]), versions())
        check_bases(str(nodes[0]), find_bases(questions[0]), fingerprint)
        return []
    answers: list[NodeReport] = _ask(nodes, inspect_node, questions)
    for node, answer in zip(nodes, answers, strict=True):
        check_node(str(node), answer, versions())
    # Last, since it may take minutes where a large base is read, or downloaded.
    for node, found in zip(nodes, _ask(nodes, find_bases, questions), strict=True):
        check_bases(str(node), found, fingerprint)
    notes = []
    for node, answer in zip(nodes, answers, strict=True):
        declared = {
            name: holder.memory_bytes
            for name, holder in requests_of(run)
            if name in placement.nodes and placement.nodes[name].id == node.id and not holder.num_gpus
        }
        notes.append(memory_note(str(node), declared, answer.free_bytes))
    return [note for note in notes if note]


def _requirements(run: RunConfig, placement: Placement, node: Node, directory: Path, here: bool) -> NodeRequirements:
    """What to ask ``node``; the driver has read the base on its own node already."""
    references: dict[str, ModelReference] = {}
    data: dict[str, str] = {}
    for name, holder in requests_of(run):
        if name not in placement.nodes or placement.nodes[name].id != node.id:
            continue
        if isinstance(holder, ClientConfig) and holder.model is not None:
            references[name] = ModelReference(holder.model, None)
        elif not here:
            references[name] = ModelReference(run.job.model, directory)
        if isinstance(holder, ClientConfig) and holder.data is not None:
            data[name] = holder.data
    return NodeRequirements(references, data)


def _ask(
    nodes: Sequence[Node], question: Callable[[NodeRequirements], Any], arguments: Sequence[NodeRequirements]
) -> list[Any]:
    """Call ``question`` on every node, each with its own of ``arguments``."""
    refs = []
    for node, hosted in zip(nodes, arguments, strict=True):
        there = NodeAffinitySchedulingStrategy(node.id, soft=False)
        task = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=there)(question)
        refs.append(task.remote(hosted))
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
