"""Configuration, checks and data of a run before it starts: in the driver, without Ray."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hsplit.config import Partition, Policy, RunConfig
from hsplit.config.job import BUILT_IN, DataSpec
from hsplit.config.section import is_reference
from hsplit.errors import InputError
from hsplit.extension import origin
from hsplit.lora.aggregation import find_aggregation
from hsplit.models.checkpoint_reader import model_fingerprint
from hsplit.models.dtype import dtype_name, resolve_dtype
from hsplit.models.lookup import ModelSource
from hsplit.models.proof import prove_once
from hsplit.models.recorded_family import RecordedFamily
from hsplit.models.spec import ModelSpec
from hsplit.models.tokenizer import load_tokenizer
from hsplit.planning.importance import find_metric
from hsplit.planning.paced_plan import paces
from hsplit.planning.planning_state import Fleet
from hsplit.planning.rank_rules import find_rank_rule
from hsplit.planning.split_rules import find_split_rule
from hsplit.run.context import Inputs

if TYPE_CHECKING:
    from hsplit.data import Example, Reading

MOST_READ = 20_000
"""Most examples of shared data that are read for a plan alone: a few seconds of tokenizing."""


def resolved_config(run: RunConfig) -> RunConfig:
    """``run`` with a concrete ``job.dtype`` for all holders, and absolute paths of the job.

    A resume from another directory or machine then reads it the same.
    """
    device = "cuda" if run.server.num_gpus > 0 else "cpu"
    job = run.job
    changes: dict[str, Any] = {"dtype": dtype_name(resolve_dtype(job.dtype, device)), "data": _resolved(job.data)}
    if os.path.isdir(model := os.path.expanduser(job.model)):
        changes["model"] = str(Path(model).resolve())
    return run.model_copy(update={"job": job.model_copy(update=changes)})


def _resolved(data: DataSpec) -> DataSpec:
    """``data`` with absolute paths of files, folders and patterns."""
    from hsplit.data import absolute_source

    parts = tuple(part.model_copy(update={"source": absolute_source(part.source)}) for part in data.mixture)
    return data.model_copy(update={"source": absolute_source(data.source), "mixture": parts})


def check_model(run: RunConfig, source: ModelSource) -> None:
    """Refuse a run that does not fit its model.

    Raises:
        InputError: the model cannot be split exactly, targets match nothing, the split is past the last layer, texts
            are longer than the model's learned positions, or a user's own part of the policy cannot be found.
    """
    own_code(run.policy)
    model = source.spec
    if isinstance(model.family, RecordedFamily):
        prove_once(model.config)
        model.family.check_length(run.job.max_length)
    positions = model.family.positions(model.config)
    if positions is not None and run.job.max_length > positions:
        raise InputError(
            f"job.max_length: must be at most {positions}, the positions that {run.job.model} has learned "
            f"(got {run.job.max_length})"
        )
    model.targeted(run.job.targets)
    if isinstance(run.policy.split, int) and run.policy.split > model.layers:
        raise InputError(
            f"policy {run.policy.name}: split: must be at most {model.layers}, the layers of {run.job.model} "
            f"(got {run.policy.split})"
        )


def unadapted_text(model: ModelSpec) -> str:
    """Say which share of the layers' weights can have no adapter; empty where all can."""
    share, names = model.unadaptable
    if not share:
        return ""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{share:.1%} of the layers' weights stay frozen, without adapters: {', '.join(names[:3])}{more}"


def own_code(policy: Policy) -> list[str]:
    """Find the parts that a policy names.

    Returns:
        A sentence about each that is the user's own: the file of its code.

    Raises:
        InputError: one of them cannot be found.
    """
    find_aggregation(policy.aggregation)
    find_rank_rule(policy.ranks)
    find_split_rule(policy.split)
    find_metric(policy.importance.metric)
    named = (policy.aggregation, policy.ranks, policy.split, policy.importance.metric)
    own = [str(word) for word in dict.fromkeys(named) if is_reference(word)]
    return [f"{word} is code from {origin(word)}" for word in own]


def read_shared(
    run: RunConfig, source: ModelSource, tokenizer: Any = None
) -> tuple[list[Example], list[Example], Reading]:
    """The shared data: the clients' examples, and the test part (``data.test``), which no client ever gets.

    Args:
        run: resolved configuration.
        source: the model.
        tokenizer: the model's, if it is loaded already.

    Returns:
        Both, and how the source was read.
    """
    from hsplit.data import read_data, split_off_test, template_of

    job, data = run.job, run.job.data
    template = template_of(tokenizer or load_tokenizer(source.directory))
    reading = read_data(data, job.seed, template)
    return *split_off_test(reading.examples, data.test, job.seed), reading


def shared_sha256(run: RunConfig) -> str:
    """Fingerprint of the shared data: the files' SHA-256, or the generator's or hub data set's name and arguments."""
    from hsplit.data import source_sha256

    data = run.job.data
    found = [source_sha256(source) or f"{source} {data.examples} {run.job.seed}" for source in data.sources]
    return " ".join(found)


def read_inputs(run: RunConfig, source: ModelSource, tokenizer: Any = None) -> Inputs:
    """Check the weights, read the shared data, and partition it over the clients without data of their own.

    Args:
        run: resolved configuration.
        source: the model.
        tokenizer: the model's, if it is loaded already.

    Raises:
        InputError: the weights are not those of the configuration; or the data are unusable or too few, hold tokens
            that the model has no embedding for, or no token that could be learned or tested.
    """
    from hsplit.data import partition

    source.spec.check_weights()
    tokenizer = tokenizer or load_tokenizer(source.directory)
    job, data = run.job, run.job.data
    sharing = [client.name for client in run.clients if client.data is None]
    shares: dict[str, Any] = {client.name: None for client in run.clients}
    digest = reading = ""
    examples: list[Example] = []
    if sharing:
        examples, test, read = read_shared(run, source, tokenizer)
        _check_count(len(examples), sharing, run)
        reading = str(read)
        spec = data.partition
        how = spec.model_dump(exclude_none=True) if isinstance(spec, Partition) else spec
        parts = partition(examples, len(sharing), how, job.seed)
        for name, part in zip(sharing, parts, strict=True):
            shares[name] = [examples[i] for i in part]
        _check_supervised({name: shares[name] for name in sharing}, test, run, tokenizer)
        digest = shared_sha256(run)
    _check_tokens(examples, run, source, tokenizer)
    return Inputs(shares, model_fingerprint(source.directory), digest, reading)


def read_fleet(run: RunConfig, source: ModelSource) -> tuple[Fleet, str]:
    """Read what the first plan depends on of the shared data, as clients report it when a run starts.

    Args:
        run: resolved configuration.
        source: the model; its weights are not read.

    Returns:
        The fleet of a run that has not begun, and why the data are not known; empty where they are, or do not matter.
    """
    from hsplit.data import partition
    from hsplit.data.local_data import LocalData

    fleet, sharing = Fleet.of_run(run), [client.name for client in run.clients if client.data is None]
    if run.policy.placement != "split" or not paces(run.policy.pace) or not sharing:
        return fleet, ""
    job, spec = run.job, run.job.data.partition
    try:
        tokenizer = load_tokenizer(source.directory)
        examples, _, _ = read_shared(run, source, tokenizer)
        _check_count(len(examples), sharing, run)
        if len(examples) > MOST_READ:
            return fleet, f"{len(examples):,} examples, and a plan alone reads at most {MOST_READ:,}"
        how = spec.model_dump(exclude_none=True) if isinstance(spec, Partition) else spec
        parts = partition(examples, len(sharing), how, job.seed)
        shares = zip(sharing, parts, strict=True)
        known = {name: LocalData(name, [examples[i] for i in part], tokenizer, job) for name, part in shares}
    except InputError as error:
        return fleet, str(error)
    vocabulary = {name: len(data.token_ids(job)) for name, data in known.items()}
    return replace(fleet, examples={name: len(data.train) for name, data in known.items()}, vocabulary=vocabulary), ""


def _check_count(count: int, clients: list[str], run: RunConfig) -> None:
    """Refuse fewer examples than the clients that share them need."""
    from hsplit.data.partition import SMALLEST_SHARE

    data, least = run.job.data, SMALLEST_SHARE * len(clients)
    if count >= least:
        return
    made = f", job.data.examples {data.examples}" if BUILT_IN in data.sources else ""
    taken = f", job.data.limit {data.limit}" if data.limit is not None else ""
    taken += f", job.data.test {data.test:g}" if data.test else ""
    where = f"job.data.{data.origin}{made}{taken}"
    if len(clients) == 1:
        has = "1 example" if count else "no example"
        need = f"client {clients[0]} needs at least {least}, one to train on and one to validate on"
        raise InputError(f"{where}: has {has}, and {need}")
    raise InputError(
        f"{where}: more clients than examples to share out: {len(clients)} clients without data of their own need at"
        f" least {least}, {SMALLEST_SHARE} each; there are {count}"
    )


def _check_supervised(shares: dict[str, list[Example]], test: list[Example], run: RunConfig, tokenizer: Any) -> None:
    """Refuse shares that a client cannot train and validate on, and shared data without a token to predict."""
    from hsplit.data.local_data import check_shares, has_example, nothing_supervised

    job = run.job
    supervised = check_shares(shares, tokenizer, job)
    if not supervised and len(shares) == len(run.clients):
        raise nothing_supervised(f"job.data.{job.data.origin}", "training", job.model, job.max_length)
    if test and not has_example(test, tokenizer, sys.maxsize, lambda example: example.supervised > 0):
        raise nothing_supervised(f"job.data.test {job.data.test:g} of {', '.join(job.data.sources)}", "test", job.model)


def _check_tokens(examples: list[Example], run: RunConfig, source: ModelSource, tokenizer: Any) -> None:
    """Refuse ids of the tokenizer's, in its special tokens or ``examples``, that the model has no embedding for."""
    from hsplit.data import check_ids, check_special_tokens, largest_id, tokenize

    vocab_size = source.spec.vocab_size
    if largest_id(tokenizer) < vocab_size:
        return
    check_special_tokens(tokenizer, vocab_size)
    fitting, _ = tokenize(examples, tokenizer, run.job.max_length, run.job.data.long, run.job.data.cache)
    check_ids(fitting, tokenizer, vocab_size, f"data.{run.job.data.origin}")
