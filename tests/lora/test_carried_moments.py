"""Moments outlive a change of ranks: directions that stay keep theirs exactly, those that begin have none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from hsplit.config import Importance, Job, Policy
from hsplit.lora.adapters import AdapterSet
from hsplit.lora.carried_moments import CarriedMoments, carried_moments, resume_moments
from hsplit.lora.direction_steps import DirectionSteps, step_count
from hsplit.lora.optimizer import kept_state, new_optimizer
from hsplit.models.spec import LinearShape
from tests.in_process import Recorder, coordinator, fixed_plan, random_examples

STEPS = 3
Q0, Q1, V0 = "layers.0.q", "layers.1.q", "layers.0.v"
SHAPES = [LinearShape(Q0, 0, 5, 7), LinearShape(V0, 0, 6, 7), LinearShape(Q1, 1, 5, 7)]
JOB = Job.model_validate({"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.0, "alpha": 6.0})


class Adapted:
    """Adapters with their optimizer, in a flat buffer or leaf by leaf."""

    def __init__(self, ranks: dict[str, int], flat: bool = True, job: Job = JOB) -> None:
        self.adapters = AdapterSet(SHAPES, ranks, job.alpha, torch.float32)
        leaves = [f for n in self.adapters.names for f in (self.adapters.A(n), self.adapters.B(n))]
        self.optimizer = new_optimizer(job, [self.adapters.flat] if flat or not leaves else leaves)
        self.steps = DirectionSteps(self.adapters)

    def stepped(self, steps: int = STEPS) -> Adapted:
        draw, flat = torch.Generator().manual_seed(0), self.adapters.flat
        assert flat.grad is not None
        for _ in range(steps):
            flat.grad.copy_(torch.randn(flat.shape, generator=draw))
            self.optimizer.step()
            self.steps.correct(self.optimizer)
        return self

    def carried(self, ranks: dict[str, int]) -> CarriedMoments | None:
        return carried_moments(self.adapters, self.optimizer, self.steps, ranks)

    def taking_the_place_of(self, other: Adapted, stay: dict[str, int] | None = None) -> Adapted:
        carried = other.carried(self.adapters.ranks)
        assert carried is not None
        resume_moments(carried, self.adapters, self.optimizer, self.steps, stay or self.adapters.ranks)
        return self

    def moments(self, name: str, side: int) -> tuple[Tensor, Tensor]:
        """First and second, of ``A`` (side 0) or of ``s B`` (side 1), directions along the rows."""
        start, shape = self.adapters.spans(name)[side]
        scale = self.adapters.scale(name) if side else 1.0
        kept = kept_state(self.optimizer)
        first, second = (kept[k][start : start + shape[0] * shape[1]].view(shape) for k in ("exp_avg", "exp_avg_sq"))
        return (first / scale).movedim(side, 0), (second / scale**2).movedim(side, 0)


ranks = st.fixed_dictionaries({name: st.sampled_from([0, 1, 2, 4]) for name in (Q0, V0, Q1)})


@settings(max_examples=40, deadline=None)
@given(before=ranks, after=ranks, flats=st.tuples(st.booleans(), st.booleans()))
def test_directions_that_stay_keep_theirs_and_those_that_begin_have_none(
    before: dict[str, int], after: dict[str, int], flats: tuple[bool, bool]
) -> None:
    old = Adapted(before, flats[0]).stepped()
    stays = [name for name in before if before[name] and after[name]]
    if not stays:
        assert old.carried(after) is None
        return
    new = Adapted(after, flats[1]).taking_the_place_of(old)
    assert step_count(new.optimizer) == STEPS
    for name in new.adapters.names:
        size = min(before[name], after[name])
        assert new.steps.begun[name].tolist() == [0] * size + [STEPS] * (after[name] - size)
        for side in (0, 1):
            for now, was in zip(new.moments(name, side), old.moments(name, side) if size else (None,) * 2, strict=True):
                if was is not None:
                    torch.testing.assert_close(now[:size], was[:size])
                assert not now[size:].any()


@pytest.mark.parametrize("flats", [(True, True), (True, False), (False, True)])
def test_the_same_ranks_go_on_exactly(flats: tuple[bool, bool]) -> None:
    own = {Q0: 4, V0: 2, Q1: 1}
    old = Adapted(own, flats[0]).stepped()
    new = Adapted(own, flats[1]).taking_the_place_of(old)
    with torch.no_grad():
        new.adapters.flat.copy_(old.adapters.flat)
    # Scales of 6 / r are divided out and multiplied in again.
    torch.testing.assert_close(new.stepped().adapters.flat, old.stepped().adapters.flat)


def test_nothing_is_carried_where_there_is_nothing_to_carry() -> None:
    own = {Q0: 2}
    fresh = Adapted(own)
    assert fresh.carried(own) is None
    for optimizer in ("sgd", "adamw8bit"):
        other = Adapted(own, job=JOB.model_copy(update={"optimizer": optimizer})).stepped()
        assert other.carried(own) is None


def test_a_direction_that_restarts_afresh_forgets() -> None:
    own = {Q0: 4, V0: 2}
    old = Adapted(own).stepped()
    new = Adapted(own).taking_the_place_of(old, {Q0: 1})
    for name, stays in ((Q0, 1), (V0, 0)):
        for side in (0, 1):
            first, second = new.moments(name, side)
            was_first, was_second = old.moments(name, side)
            torch.testing.assert_close(first[:stays], was_first[:stays])
            torch.testing.assert_close(second[:stays], was_second[:stays])
            assert not first[stays:].any() and not second[stays:].any()
    assert new.steps.begun[Q0].tolist() == [0, STEPS, STEPS, STEPS] and new.steps.begun[V0].tolist() == [STEPS] * 2


def test_ages_are_carried_over_and_where_nothing_stays_all_is_new() -> None:
    own = {Q0: 4, V0: 2}
    old = Adapted(own).stepped()
    old.steps.begin(old.optimizer, {Q0: 2, V0: 2})
    old.stepped()
    new = Adapted({Q0: 8, Q1: 1}).taking_the_place_of(old, {Q0: 3})
    assert new.steps.begun[Q0].tolist() == [0, 0, STEPS] + [2 * STEPS] * 5
    assert new.steps.begun[Q1].tolist() == [2 * STEPS]
    fresh = Adapted({Q0: 8}).taking_the_place_of(old, {V0: 2})
    assert not kept_state(fresh.optimizer) and not fresh.steps.begun[Q0].any()


HOLDERS = ("server", "server-1", "c0", "c1", "c2")


def _looking(actor: Any, gone: list[bool]) -> Any:
    """``actor._hold``, which first notes whether the adapters that there were are gone."""
    hold, old = actor._hold, StorageWeakRef(actor.holder.adapters.flat.untyped_storage())

    def holding(*arguments: Any) -> None:
        gone.append(old.expired())
        hold(*arguments)

    return holding


@pytest.mark.parametrize("moments", ["keep", "fit", "drop"])
def test_a_change_of_plan_leaves_holders_their_moments(models: dict[str, Path], tmp_path: Path, moments: str) -> None:
    """Two servers, and clients whose splits and ranks change, one to no rank at all and back."""
    job = {"base": "fp32", "local_steps": 3, "rounds": 4}
    settled = Job.model_validate({"dtype": "fp32", **job})
    before = fixed_plan(models["llama"], settled, [2, 1, 2], [4, 2, 4], 2, servers=2)
    after = fixed_plan(models["llama"], settled, [1, 2, 2], [2, 4, 0], 4, servers=2)
    shares = {c.name: random_examples(12, i) for i, c in enumerate(before.clients)}
    policy = Policy(
        reinit="svd" if moments == "fit" else "mean", moments=moments, importance=Importance(metric="equal")
    )
    run = coordinator(models["llama"], tmp_path, before, shares, Recorder(), policy, **job)
    actors = run._executor.actors  # type: ignore[attr-defined]  # in-process by construction
    run.start()
    for number, (had, gets) in enumerate([(before, after), (after, before)], start=1):
        while run.state.step < 3 * number:
            run.local_step(run.state.step)
        run.aggregate()
        run.state.round += 1
        least = {n: {w: min(r, gets.part(n).ranks.get(w, 0)) for w, r in had.part(n).ranks.items()} for n in HOLDERS}
        known = {name: actors[name].holder.carried_moments(least[name]) for name in HOLDERS}
        gone: list[bool] = []
        with pytest.MonkeyPatch.context() as patch:
            for name in HOLDERS:
                patch.setattr(actors[name], "_hold", _looking(actors[name], gone))
            run.reconfigure(gets)
        # Old adapters take no memory beside new layers and adapters.
        assert len(gone) == len(HOLDERS) and all(gone)
        for name in HOLDERS:
            now = actors[name].holder.carried_moments(least[name])
            assert (known[name] is not None) == (moments != "drop" and any(least[name].values())), name
            if known[name] is None:
                assert not kept_state(actors[name].holder._optimizer)
                continue
            assert now.step == known[name].step
            torch.testing.assert_close(now.begun, known[name].begun)
            torch.testing.assert_close(now.of_A, known[name].of_A)
            torch.testing.assert_close(now.of_B, known[name].of_B)
    for step in range(run.state.step, run.state.step + 3):
        run.local_step(step)
    run.aggregate()
