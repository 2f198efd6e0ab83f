"""Law E3 across servers: several of them are holders like any other (METHOD sections 2 and 6)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from hsplit.config import SERVER, Importance, Job, Policy
from hsplit.lora.learned import LearnedTerm, learned_parts
from hsplit.models.factors import LowRank
from tests.in_process import Recorder, coordinator, fixed_plan, random_examples
from tests.tiny import LAYERS

RESIDUAL = Job().residual.max_rank

laws = settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def _dense(term: LowRank) -> torch.Tensor:
    return term.B.double() @ term.A.double()


def _known(state: dict[str, torch.Tensor], name: str, kind: str) -> torch.Tensor | float:
    """The aggregator's state of a weight in fp64: its residual or its common restart."""
    term = learned_parts(state).get(name, LearnedTerm())
    if kind == "residual" and term.matrix is not None:
        return term.matrix.double()
    factors: LowRank | None = getattr(term, kind)
    return 0.0 if factors is None else _dense(factors)


def _started(state: dict[str, torch.Tensor], name: str, rank: int) -> torch.Tensor | float:
    """The restart with which an adapter of ``rank`` began the round, in fp64."""
    common = learned_parts(state).get(name, LearnedTerm()).common
    return 0.0 if common is None else _dense(common.up_to_rank(rank))


def _norm(known: torch.Tensor | float) -> float:
    return float(torch.as_tensor(known).norm())


@laws
@given(
    family=st.sampled_from(["llama", "gpt2"]),
    splits=st.lists(st.integers(0, LAYERS), min_size=2, max_size=5),
    ranks=st.lists(st.integers(1, 4), min_size=5, max_size=5),
    server_rank=st.integers(1, 4),
    servers=st.integers(2, 4),
    training=st.none() | st.integers(1, 4),
    labels=st.sampled_from(["server", "client"]),
    base=st.sampled_from(["fp32", "nf4"]),
    reinit=st.sampled_from(["random", "svd", "mean"]),
    init=st.sampled_from(["shared", "independent"]),
    max_rank=st.sampled_from(["full", RESIDUAL]),
    seed=st.integers(0, 2**16),
)
@example(
    family="llama",
    splits=[1, 1, 2, 4],
    ranks=[1, 2, 3, 4, 1],
    server_rank=3,
    servers=2,
    training=3,
    labels="server",
    base="nf4",
    reinit="svd",
    init="independent",
    max_rank=RESIDUAL,
    seed=1,
)
@example(
    family="gpt2",
    splits=[0, 3],
    ranks=[2, 1, 1, 1, 1],
    server_rank=2,
    servers=3,
    training=None,
    labels="client",
    base="fp32",
    reinit="random",
    init="shared",
    max_rank="full",
    seed=2,
)
def test_e3_the_residual_takes_up_what_every_server_has_learned(
    models: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
    family: str,
    splits: list[int],
    ranks: list[int],
    server_rank: int,
    servers: int,
    training: int | None,
    labels: str,
    base: str,
    reinit: str,
    init: str,
    max_rank: int | str,
    seed: int,
) -> None:
    job: dict[str, Any] = {
        "base": base,
        "clip": Job().clip,
        "rounds": 2,
        "local_steps": 2,
        "lr": 0.01,
        "seed": seed,
        "privacy": {"labels": labels},
        "clients_per_round": training,
        "residual": {"max_rank": max_rank},
    }
    settings_ = Job.model_validate({"dtype": "fp32", "wire": "fp32", **job})
    plan = fixed_plan(models[family], settings_, splits, ranks[: len(splits)], server_rank, servers)
    shares = {f"c{i}": random_examples(12, seed + i) for i in range(len(splits))}
    policy = Policy(init=init, reinit=reinit, importance=Importance(metric="equal"))
    run = coordinator(models[family], tmp_path_factory.mktemp("e3"), plan, shares, Recorder(), policy, **job)
    actors = run._executor.actors  # type: ignore[attr-defined]  # in-process by construction
    server, handed, found = actors[SERVER], [], []
    aggregate = server.aggregate

    def watched(round_: int, *held: Any) -> Any:
        before = server.aggregator.state()
        # Cloned: what restarts afterwards is the same memory.
        holders = [*held, server.holder.held()]
        terms = {
            h.holder: {n: LowRank(t.B.clone(), t.A.clone()) for n, t in h.terms.items()} for h in holders if h.tokens
        }
        tokens = {h.holder: (dict(h.tokens), dict(h.layers)) for h in holders if h.tokens}
        out = aggregate(round_, *held)
        handed.append((terms, tokens))
        found.append((before, server.aggregator.state(), out[0].residual_cut))
        return out

    server.aggregate = watched
    run.run()

    trained = set()
    for (terms, tokens), (before, after, cut) in zip(handed, found, strict=True):
        assert cut == 0 or max_rank != "full"
        for name in server.aggregator.residuals:
            holders = [h for h in terms if name in terms[h] and tokens[h][0].get(tokens[h][1][name], 0)]
            if not holders:
                continue
            trained |= set(holders)
            counts = {h: tokens[h][0][tokens[h][1][name]] for h in holders}
            total = sum(counts.values())
            # A holder starts with as many of the common directions as it has room for; it keeps the others frozen.
            delta = sum(
                counts[h] / total * (_dense(terms[h][name]) - _started(before, name, terms[h][name].rank))
                for h in holders
            )
            # What adapters restart with counts: it has left the residual, and the sum is unchanged.
            change = sum(_known(after, name, kind) for kind in ("residual", "common")) - sum(
                _known(before, name, kind) for kind in ("residual", "common")
            )
            assert isinstance(delta, torch.Tensor)
            # What a cap cuts it cuts, and records; the law is about the rest.
            lost = cut * 1.001 * _norm(_known(after, name, "residual")) / max(1e-12, 1 - cut**2) ** 0.5
            assert (change - delta).norm() <= 1e-5 * delta.norm() + lost, name
    # The law says something about several servers only where several have trained.
    if training is None and max(splits) < LAYERS:
        assert sum(holder.startswith("server") for holder in trained) == min(servers, len(splits))


def test_without_one_of_the_servers_the_law_does_not_hold(models: dict[str, Path], tmp_path: Path) -> None:
    """A second server's part is not small: without it, the sum is another."""
    job: dict[str, Any] = {"base": "fp32", "local_steps": 2, "lr": 0.01}
    plan = fixed_plan(models["llama"], Job.model_validate({"dtype": "fp32", **job}), [1, 1], [2, 2], 2, 2)
    shares = {f"c{i}": random_examples(12, i) for i in range(2)}
    policy = Policy(init="shared", importance=Importance(metric="equal"))
    sums = []
    for deaf in (False, True):
        run = coordinator(models["llama"], tmp_path / str(deaf), plan, shares, Recorder(), policy, **job)
        server = run._executor.actors[SERVER]  # type: ignore[attr-defined]  # in-process by construction
        aggregate = server.aggregate

        def partly(round_: int, *held: Any, deaf: bool = deaf, aggregate: Any = aggregate) -> Any:
            unheard = [replace(h, tokens={}) if deaf and h.holder == "server-1" else h for h in held]
            return aggregate(round_, *unheard)

        server.aggregate = partly
        run.run()
        state = server.aggregator.state()
        sums.append({n: _known(state, n, "residual") + _known(state, n, "common") for n in server.aggregator.residuals})
    deep = [name for name in sums[0] if ".3." in name]
    assert deep
    for name in deep:
        assert (sums[0][name] - sums[1][name]).norm() > 1e-3 * sums[0][name].norm(), name
