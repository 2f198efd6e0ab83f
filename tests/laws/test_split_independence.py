"""Law E5: the importance of weights does not depend on where the model is split (METHOD section 3)."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from hsplit.lora.importance_probe import ProbedRows
from hsplit.planning.importance import scores
from hsplit.run.probe import probe_importance
from tests.laws.reference import keep_double
from tests.probing import job_of, probed_actors, shapes_of, sums_by_client
from tests.tiny import LAYERS

TOKENS = 10
TOLERANCE = {"fp32": 1e-5, "fp64": 1e-12}

laws = settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@pytest.fixture(autouse=True)
def _double(monkeypatch: pytest.MonkeyPatch) -> None:
    keep_double(monkeypatch)


@laws
@given(
    family=st.sampled_from(["llama", "gpt2"]),
    splits=st.lists(st.integers(0, LAYERS), min_size=1, max_size=4),
    labels=st.sampled_from(["server", "client"]),
    base=st.sampled_from(["fp32", "nf4"]),
    dtype=st.sampled_from(["fp32", "fp64"]),
    matrices=st.booleans(),
    round_=st.integers(0, 100),
)
@example(family="llama", splits=[0, 2, 4], labels="server", base="nf4", dtype="fp32", matrices=False, round_=1)
@example(family="gpt2", splits=[4, 4], labels="client", base="fp32", dtype="fp32", matrices=False, round_=2)
@example(family="gpt2", splits=[3, 0, 1], labels="client", base="nf4", dtype="fp64", matrices=True, round_=3)
def test_e5_scores_are_those_of_each_client_alone_before_an_unsplit_server(
    models: dict[str, Path],
    family: str,
    splits: list[int],
    labels: str,
    base: str,
    dtype: str,
    matrices: bool,
    round_: int,
) -> None:
    model, job = models[family], job_of(base, dtype=dtype, wire=dtype, privacy={"labels": labels})
    shapes, clients = shapes_of(model, job), [f"c{i}" for i in range(len(splits))]
    together = probe_importance(
        probed_actors(model, job, splits, matrices), {"server": clients}, round_, TOKENS, labels
    ).reports

    unsplit = probed_actors(model, job, [0] * len(splits), matrices)
    alone = [r for c in clients for r in probe_importance(unsplit, {"server": [c]}, round_, TOKENS, labels).reports]

    found, expected = sums_by_client(together), sums_by_client(alone)
    for client in clients:
        assert found[client] == pytest.approx(expected[client], rel=TOLERANCE[dtype]), client
    assert scores(together, shapes) == pytest.approx(scores(alone, shapes), rel=TOLERANCE[dtype])


@laws
@given(
    family=st.sampled_from(["llama", "gpt2"]),
    splits=st.lists(st.integers(0, LAYERS), min_size=1, max_size=3),
    labels=st.sampled_from(["server", "client"]),
    round_=st.integers(0, 100),
)
@example(family="gpt2", splits=[4, 0, 2], labels="client", round_=3)
def test_e5_spectra_are_those_of_each_client_alone_before_an_unsplit_server(
    models: dict[str, Path], family: str, splits: list[int], labels: str, round_: int
) -> None:
    """In fp64: directions of nearly equal singular values turn with any rounding."""
    model, job = models[family], job_of("fp32", dtype="fp64", wire="fp64", privacy={"labels": labels})
    shapes, clients = shapes_of(model, job), [f"c{i}" for i in range(len(splits))]
    together = probe_importance(
        probed_actors(model, job, splits, metric="spectral"), {"server": clients}, round_, TOKENS, labels
    ).reports
    unsplit = probed_actors(model, job, [0] * len(splits), metric="spectral")
    alone = [r for c in clients for r in probe_importance(unsplit, {"server": [c]}, round_, TOKENS, labels).reports]
    found, expected = (scores(reports, shapes, "spectral") for reports in (together, alone))
    assert found.keys() == expected.keys()
    for name, curve in found.items():
        assert isinstance(curve, tuple) and 16 <= len(curve) <= 32
        assert curve == pytest.approx(expected[name], rel=1e-6), name


def test_scoring_the_joint_sum_would_break_e5(models: dict[str, Path]) -> None:
    """The law can fail: unlike clients' tokens averaged into one gradient cancel, and score less."""
    model, job = models["llama"], job_of("fp32")
    actors = probed_actors(model, job, [0, 0])
    found = sums_by_client(probe_importance(actors, {"server": ["c0", "c1"]}, 1, TOKENS, "server").reports)
    server = actors.actors["server"]
    probe, joined = server._watched([actors.actors[client].probe_forward(1, TOKENS)[1] for client in ("c0", "c1")])
    losses, counts = joined.losses(server._tail)
    everything = ProbedRows("both", slice(0, joined.output.shape[0]), 0, int(counts.sum()))
    joint = probe.scores(losses.sum(), None, [everything])["both"]
    for name, value in joint.items():
        assert value < 0.9 * (found["c0"][name] + found["c1"][name]) / 2, name
