"""A direction that restarts has no past: its steps are those of an AdamW that began with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hsplit.config import Importance, Job, Policy
from hsplit.lora.adapters import AdapterSet
from hsplit.lora.direction_steps import DirectionSteps, step_count
from hsplit.lora.holder import Holder
from hsplit.lora.optimizer import FIRST, SECOND, moment_views, new_optimizer
from hsplit.models.spec import LinearShape
from tests.in_process import Recorder, coordinator, fixed_plan, random_examples
from tests.tiny import LAYERS

Q, V = "layers.0.q", "layers.0.v"
SHAPES = [LinearShape(Q, 0, 5, 7), LinearShape(V, 0, 6, 4)]
RANKS = {Q: 4, V: 3}
JOB = Job.model_validate({"optimizer": "adamw", "lr": 0.01, "dtype": "fp64"})


def _parts(adapters: AdapterSet, name: str, direction: int) -> tuple[Tensor, Tensor]:
    return adapters.A(name).detach()[direction], adapters.B(name).detach()[:, direction]


@settings(max_examples=40, deadline=None)
@given(
    rounds=st.lists(
        st.tuples(st.integers(0, 3), st.fixed_dictionaries({Q: st.integers(0, 4), V: st.integers(0, 3)})),
        min_size=1,
        max_size=4,
    ),
    flat=st.booleans(),
    decay=st.sampled_from([0.0, 0.1]),
    resumed=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_each_direction_steps_as_an_adamw_of_its_own(
    rounds: list[tuple[int, dict[str, int]]], flat: bool, decay: float, resumed: bool, seed: int
) -> None:
    """``rounds``: steps that are made, then how many leading directions stay."""
    job = JOB.model_copy(update={"weight_decay": decay})
    adapters = AdapterSet(SHAPES, RANKS, job.alpha, torch.float64)
    leaves = [factor for name in adapters.names for factor in (adapters.A(name), adapters.B(name))]
    optimizer, steps = new_optimizer(job, [adapters.flat] if flat else leaves), DirectionSteps(adapters)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        adapters.flat.copy_(torch.randn(adapters.flat.shape, generator=draw, dtype=torch.float64))
    alone: dict[tuple[str, int], Any] = {}

    def begin(name: str, direction: int) -> None:
        own = [nn.Parameter(part.clone()) for part in _parts(adapters, name, direction)]
        alone[name, direction] = own, torch.optim.AdamW(own, lr=job.lr, weight_decay=decay)

    for name, rank in RANKS.items():
        for direction in range(rank):
            begin(name, direction)
    for count, stay in [*rounds, (3, {})]:
        for _ in range(count):
            assert adapters.flat.grad is not None
            adapters.flat.grad.copy_(torch.randn(adapters.flat.shape, generator=draw, dtype=torch.float64))
            optimizer.step()
            steps.correct(optimizer)
            for (name, direction), (own, own_optimizer) in alone.items():
                gradients = adapters.A(name).grad, adapters.B(name).grad
                assert gradients[0] is not None and gradients[1] is not None
                own[0].grad, own[1].grad = gradients[0][direction].clone(), gradients[1][:, direction].clone()
                own_optimizer.step()
        for (name, direction), (own, _) in alone.items():
            for found, expected in zip(_parts(adapters, name, direction), own, strict=True):
                torch.testing.assert_close(found, expected.detach(), rtol=1e-11, atol=1e-13)
        if stay:
            steps.begin(optimizer, stay)
            for name, rank in RANKS.items():
                for direction in range(stay[name], rank):
                    begin(name, direction)
        if resumed:
            state, steps = steps.state(), DirectionSteps(adapters)
            steps.load_state(state)


def test_without_the_own_count_a_first_step_would_have_another_length() -> None:
    """The law can fail: with moments of zero alone, a direction's first step is that of a long run's bias."""
    adapters = AdapterSet(SHAPES, RANKS, 8.0, torch.float64)
    optimizer, steps = new_optimizer(JOB, [adapters.flat]), DirectionSteps(adapters)
    assert adapters.flat.grad is not None
    adapters.flat.grad.fill_(1.0)
    for _ in range(50):
        optimizer.step()
    steps.begin(optimizer, {Q: 2, V: 3})
    before = adapters.A(Q).detach().clone()
    optimizer.step()
    moved = (adapters.A(Q).detach() - before).abs()
    assert float(moved[2:].max()) < 0.8 * JOB.lr
    steps.correct(optimizer)
    moved = (adapters.A(Q).detach() - before).abs()
    torch.testing.assert_close(moved[2:], torch.full_like(moved[2:], JOB.lr), rtol=1e-6, atol=0.0)


def test_fitted_moments_are_freed_of_the_bias_of_directions_that_began_late() -> None:
    adapters = AdapterSet(SHAPES, RANKS, 8.0, torch.float64)
    optimizer, steps = new_optimizer(JOB, [adapters.flat]), DirectionSteps(adapters)
    assert adapters.flat.grad is not None
    # With gradients of one size all that differs between directions is the bias of their moments.
    adapters.flat.grad.fill_(2.0)
    for _ in range(20):
        optimizer.step()
    steps.begin(optimizer, {Q: 2, V: 1})
    for _ in range(5):
        optimizer.step()
    view = moment_views(optimizer)
    assert view is not None
    before = [view(SECOND, span).clone() for name in adapters.names for span in adapters.spans(name)]
    for _ in range(2):
        # Twice is as good as once.
        steps.fit(optimizer, adapters.names)
        after = [view(SECOND, span) for name in adapters.names for span in adapters.spans(name)]
        for was, now in zip(before, after, strict=True):
            torch.testing.assert_close(now, was)
        # A direction that has made no step says nothing about the others.
        steps.begin(optimizer, {Q: 3, V: 3})
        before = [view(SECOND, span).clone() for name in adapters.names for span in adapters.spans(name)]


HOLDING = st.tuples(st.integers(0, LAYERS), st.sampled_from([0, 1, 2, 4]))
PLAN = st.tuples(st.lists(HOLDING, min_size=2, max_size=2), st.sampled_from([1, 2, 4]))
"""Split and rank of each client, and the server's rank."""


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    plans=st.lists(PLAN, min_size=3, max_size=3),
    reinit=st.sampled_from(["random", "svd", "mean"]),
    moments=st.sampled_from(["keep", "drop", "fit"]),
    seed=st.integers(0, 2**16),
)
# Ranks grow and shrink; a layer goes from a client to the server and back.
@example([([(2, 2), (3, 4)], 2), ([(1, 4), (3, 1)], 4), ([(2, 2), (3, 4)], 2)], "mean", "keep", 0)
@example([([(2, 2), (3, 4)], 2), ([(1, 4), (3, 1)], 4), ([(2, 2), (3, 4)], 2)], "random", "keep", 1)
@example([([(2, 2), (3, 4)], 2), ([(1, 4), (3, 1)], 4), ([(2, 2), (3, 4)], 2)], "svd", "fit", 2)
@example([([(2, 2), (3, 4)], 2), ([(1, 4), (3, 1)], 4), ([(2, 2), (3, 4)], 2)], "svd", "keep", 3)
def test_directions_that_restart_in_a_run_begin_again_and_others_go_on(
    models: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
    plans: list[tuple[list[tuple[int, int]], int]],
    reinit: str,
    moments: str,
    seed: int,
) -> None:
    job: dict[str, Any] = {"base": "fp32", "local_steps": 2, "rounds": 3, "clip": Job().clip, "seed": seed}
    settled = Job.model_validate({"dtype": "fp32", **job})
    made = [
        fixed_plan(models["llama"], settled, [s for s, _ in clients], [r for _, r in clients], server)
        for clients, server in plans
    ]
    shares = {f"c{i}": random_examples(12, seed + i) for i in range(2)}
    policy = Policy.model_validate({"reinit": reinit, "moments": moments, "importance": {"metric": "equal"}})
    assert policy.importance == Importance(metric="equal")
    run = coordinator(models["llama"], tmp_path_factory.mktemp("run"), made[0], shares, Recorder(), policy, **job)
    actors = run._executor.actors  # type: ignore[attr-defined]  # in-process by construction
    run.start()
    for round_, plan in enumerate(made[1:], start=1):
        while run.state.step < round_ * settled.local_steps:
            run.local_step(run.state.step)
        held = _stepped(actors)
        run.aggregate()
        run.state.round += 1
        between = _checked(actors, moments, held)
        run.reconfigure(plan)
        _checked(actors, moments, between)
    for name in ("server", "c0", "c1"):
        _assert_fresh_ones_step_as_in_a_first_step(actors[name].holder)


Ages = dict[str, dict[str, list[int]]]
"""Steps of each direction, by holder and weight."""


def _ages(holder: Holder) -> dict[str, list[int]]:
    optimizer, names = holder._optimizer, holder.adapters.names
    made = step_count(optimizer) if optimizer.state else 0
    return {name: (made - holder._steps.begun[name]).tolist() for name in names}


def _stepped(actors: Any) -> Ages:
    return {name: _ages(actors[name].holder) for name in ("server", "c0", "c1")}


def _checked(actors: Any, moments: str, before: Ages) -> Ages:
    """Check every direction that a round's end, or a change of plan, has left; returns their ages."""
    now = _stepped(actors)
    for holder, weights in now.items():
        adapters, view = actors[holder].holder.adapters, moment_views(actors[holder].holder._optimizer)
        for name, ages in weights.items():
            had = before[holder].get(name, [])
            for direction, age in enumerate(ages):
                # B is zero where a direction is fresh, and after two steps nowhere else.
                fresh = not bool(adapters.B(name)[:, direction].any())
                goes_on = not fresh and moments != "drop" and direction < len(had) and had[direction] > 0
                assert age == (had[direction] if goes_on else 0), (holder, name, direction)
                if age or view is None:
                    continue
                for side, span in enumerate(adapters.spans(name)):
                    for key in (FIRST, SECOND):
                        assert not view(key, span).select(side, direction).any(), (holder, name, direction)
    return now


def _assert_fresh_ones_step_as_in_a_first_step(holder: Holder) -> None:
    adapters, lr = holder.adapters, holder._job.lr
    if not adapters.names:
        return
    ages, gradient = _ages(holder), adapters.flat.grad
    assert gradient is not None
    still = adapters.flat.detach().clone()
    for sign in (0.0, 1.0):
        gradient.fill_(sign)
        before = {name: (adapters.A(name).detach().clone(), adapters.B(name).detach().clone()) for name in ages}
        holder.step(0)
        for name, own in ages.items():
            for direction in [i for i, age in enumerate(own) if age == 0]:
                for side, factor in enumerate((adapters.A(name), adapters.B(name))):
                    moved = (factor.detach() - before[name][side]).select(side, direction)
                    if sign == 0.0:
                        assert not moved.any(), (name, direction)
                    else:
                        # The gradient of its second step is its first: 0.1 against 0.19, 0.001 against 0.001999.
                        expected = -lr * (0.1 / 0.19) / (0.001 / 0.001999) ** 0.5
                        torch.testing.assert_close(moved, torch.full_like(moved, expected), rtol=1e-3, atol=1e-8)
    assert not torch.equal(still, adapters.flat.detach())
