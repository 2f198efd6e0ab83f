"""Law E4: a change of plan between two rounds changes no output (METHOD section 5)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from hsplit.config import Importance, Job, Pace, Policy
from hsplit.lora.learned import learned
from hsplit.planning.plan import Plan
from tests.in_process import Recorder, coordinator, fixed_plan, random_examples
from tests.tiny import LAYERS

laws = settings(
    max_examples=20,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

SPLITS = st.integers(0, LAYERS)
RANKS = st.sampled_from([1, 2, 4, 8])
CLIENT_RANKS = RANKS | st.just(0)
HOLDING = st.tuples(SPLITS, CLIENT_RANKS, SPLITS, CLIENT_RANKS)
"""A client's split point and rank before the change, and after it; with rank 0 it only computes forward."""


def _loss(run: Any) -> float:
    loss: float = run.validate().loss
    return loss


@laws
@given(
    family=st.sampled_from(["llama", "gpt2"]),
    holdings=st.lists(HOLDING, min_size=1, max_size=3),
    server_ranks=st.tuples(RANKS, RANKS),
    labels=st.sampled_from(["server", "client"]),
    base=st.sampled_from(["fp32", "bf16", "int8", "nf4"]),
    reinit=st.sampled_from(["svd", "random", "mean"]),
    moments=st.sampled_from(["drop", "keep", "fit"]),
    max_rank=st.sampled_from(["full", Job().residual.max_rank]),
    wait=st.sampled_from([0.0, 0.9]),
    seed=st.integers(0, 2**16),
)
@example(
    family="llama",
    holdings=[(0, 8, LAYERS, 1), (LAYERS, 8, 0, 8), (2, 4, 2, 4)],
    server_ranks=(8, 1),
    labels="server",
    base="nf4",
    reinit="svd",
    moments="keep",
    max_rank="full",
    wait=0.9,
    seed=1,
)
@example(
    family="gpt2",
    holdings=[(1, 8, 3, 2), (3, 2, 1, 8)],
    server_ranks=(8, 2),
    labels="client",
    base="fp32",
    reinit="svd",
    moments="drop",
    max_rank="full",
    wait=0.0,
    seed=2,
)
@example(
    family="llama",
    holdings=[(2, 1, 3, 4), (3, 4, 2, 1)],
    server_ranks=(8, 2),
    labels="server",
    base="nf4",
    reinit="svd",
    moments="fit",
    max_rank=128,
    wait=0.9,
    seed=3,
)
@example(
    family="llama",
    holdings=[(2, 0, 3, 4), (3, 4, 2, 0), (1, 0, 1, 0)],
    server_ranks=(8, 8),
    labels="server",
    base="bf16",
    reinit="svd",
    moments="fit",
    max_rank=128,
    wait=0.9,
    seed=4,
)
@example(
    family="llama",
    holdings=[(2, 2, 3, 4), (3, 4, 1, 8)],
    server_ranks=(4, 8),
    labels="server",
    base="nf4",
    reinit=Policy().reinit,
    moments=Policy().moments,
    max_rank=Job().residual.max_rank,
    wait=0.0,
    seed=5,
)
def test_e4_another_plan_changes_no_output(
    models: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
    family: str,
    holdings: list[tuple[int, int, int, int]],
    server_ranks: tuple[int, int],
    labels: str,
    base: str,
    reinit: str,
    moments: str,
    max_rank: int | str,
    wait: float,
    seed: int,
) -> None:
    job: dict[str, Any] = {
        "base": base,
        "local_steps": 3,
        "lr": 0.05,
        "clip": Job().clip,
        "rounds": 3,
        "privacy": {"labels": labels},
        "seed": seed,
    }
    job["residual"] = {"max_rank": max_rank}
    settings_ = Job.model_validate({"dtype": "fp32", **job})
    before_splits, before_ranks, after_splits, after_ranks = zip(*holdings, strict=True)

    def planned(splits: Any, ranks: Any, server_rank: int) -> Plan:
        return fixed_plan(models[family], settings_, splits, ranks, server_rank)

    before = planned(before_splits, before_ranks, server_ranks[0])
    after = planned(after_splits, after_ranks, server_ranks[1])
    shares = {c.name: random_examples(12, seed + i) for i, c in enumerate(before.clients)}
    policy = Policy(
        init="independent",
        reinit=reinit,
        moments=moments,
        importance=Importance(metric="equal"),
        pace=Pace(residual_wait=wait),
    )
    to = tmp_path_factory.mktemp("run")
    recorder = Recorder()
    run = coordinator(models[family], to, before, shares, recorder, policy, **job)
    actors = run._executor.actors  # type: ignore[attr-defined]  # in-process by construction
    run.start()
    plans = [after, before]
    for round_, plan in enumerate(plans, start=1):
        while run.state.step < round_ * settings_.local_steps:
            run.local_step(run.state.step)
        run.aggregate()
        run.state.round += 1
        settled = _loss(run)
        # Unless all layers are with clients that only compute forward.
        trained = any(term.dense().norm() > 0 for term in learned(actors["server"].state()).values())
        assert trained or not any(any(part.ranks.values()) for part in (before.server, *before.clients))
        recorder.notes.clear()
        run.reconfigure(plan)
        # What a cap cuts it cuts, and records; the law is about the rest.
        cut = any("was cut" in note for note in recorder.notes)
        assert not (cut and max_rank == "full")
        assert cut or _loss(run) == pytest.approx(settled, rel=1e-5)
        for client in plan.clients:
            held = actors[client.name].parameters_held()
            layers = {int(name.split(".")[1]) for name in held if name.startswith("layers.")}
            assert layers == set(range(client.split or 0))
            assert actors[client.name].holder.adapters.ranks == {w: r for w, r in client.ranks.items() if r}
        held = actors["server"].parameters_held()
        layers = {int(name.split(".")[1]) for name in held if name.startswith("layers.")}
        assert layers == set(range(plan.server.split or 0, LAYERS))
        assert actors["server"].holder.adapters.ranks == plan.server.ranks
