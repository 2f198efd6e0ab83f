"""The probe's sums against autograd, what it leaves behind (nothing), and how sums become scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hsplit.config import Policy
from hsplit.data.batches import probe_batch
from hsplit.data.examples import TokenizedExample
from hsplit.errors import InputError
from hsplit.lora import importance_probe
from hsplit.lora.importance_probe import ImportanceProbe, ProbedRows, probe_working_bytes, shared_spectrum
from hsplit.models.packing import Packing
from hsplit.models.spec import LinearShape
from hsplit.planning.cost.counting import LiveBytes
from hsplit.planning.importance import IMPORTANCE, ImportanceHistory, ImportanceReport, scores
from hsplit.run.probe import probe_importance
from tests.in_process import Recorder, coordinator, fixed_plan, random_examples
from tests.laws.reference import keep_double
from tests.probing import effective_model, job_of, probed_actors, shapes_of, sums_by_autograd, sums_by_client
from tests.tiny import save_tiny_model

TOKENS = 10
DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.float32}
TOLERANCE = {"fp32": 1e-5, "fp64": 1e-11, "bf16": 0.1}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    ("base", "dtype", "matrices"),
    [
        ("fp32", "fp32", False),
        ("fp32", "fp64", True),
        ("nf4", "fp32", False),
        ("nf4", "fp64", True),
        ("int8", "fp32", True),
        ("bf16", "bf16", False),
        ("nf4", "bf16", False),
    ],
)
def test_sums_are_autograds_on_both_sides_of_the_split(
    models: dict[str, Path], family: str, base: str, dtype: str, matrices: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_double(monkeypatch)
    model, job = models[family], job_of(base, dtype=dtype, wire=dtype)
    actors = probed_actors(model, job, [2, 1], matrices)
    found = sums_by_client(probe_importance(actors, {"server": ["c0", "c1"]}, 1, TOKENS, "server").reports)
    unsplit, shapes = effective_model(model, job, DTYPES[dtype]), shapes_of(model, job)
    for client in ("c0", "c1"):
        actors.actors[client].probe_forward(1, TOKENS)
        batch = actors.actors[client]._probed[1]
        assert batch.supervised == TOKENS
        expected = sums_by_autograd(unsplit, batch, shapes)
        assert found[client] == pytest.approx(expected, rel=TOLERANCE[dtype])


def test_chunks_change_nothing_and_bound_what_is_formed(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, job, bound = models["llama"], job_of("fp32", batch_size=1), 600
    actors = probed_actors(model, job, [4])
    whole = sums_by_client(probe_importance(actors, {"server": ["c0"]}, 1, 4, "server").reports)["c0"]
    monkeypatch.setattr(importance_probe, "PROBE_CHUNK_BYTES", bound)
    formed: list[int] = []

    class Allocations(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            taken = [a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)]
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in taken:
                formed.append(out.untyped_storage().nbytes())
            return out

    scored = ImportanceProbe._score

    def watched(*arguments: Any) -> None:
        with Allocations():
            scored(*arguments)

    monkeypatch.setattr(ImportanceProbe, "_score", watched)
    chunked = sums_by_client(probe_importance(actors, {"server": ["c0"]}, 1, 4, "server").reports)["c0"]
    assert chunked == pytest.approx(whole, rel=1e-6)
    # Not even one whole weight: the smallest of them has 32 x 16 entries.
    assert max(formed) <= bound < 4 * 16 * 32
    assert probe_working_bytes(48, 32, 4, 0, torch.float32) == 2 * bound
    assert probe_working_bytes(48, 32, 4, 0, torch.bfloat16) == 2 * bound + 4 * 4 * (48 + 32)


def test_every_adapted_weight_reports_or_the_probe_fails(models: dict[str, Path]) -> None:
    model, job = models["llama"], job_of("fp32")
    client = probed_actors(model, job, [2]).actors["c0"]
    holder = client.holder
    probe = ImportanceProbe(holder.segment, holder.adapters, client._shapes)
    packing = Packing.of([3])
    with probe.watching():
        # The embedding's output does not require a gradient here, so nothing does.
        output = holder.segment.run(holder.segment.embed(torch.tensor([1, 2, 3]), packing), packing, 0, 2)
    with pytest.raises(RuntimeError, match=r"no gradient of c0's probe reached model\.layers\.0\.self_attn\.q_proj"):
        probe.scores(output, torch.ones_like(output), [ProbedRows("c0", slice(0, 3), 0, 1)])


def test_targets_decide_what_is_scored(models: dict[str, Path]) -> None:
    model, job = models["llama"], job_of("fp32", targets=["q_proj", "down_proj"])
    found = sums_by_client(
        probe_importance(probed_actors(model, job, [2]), {"server": ["c0"]}, 1, TOKENS, "server").reports
    )
    assert sorted(found["c0"]) == sorted(shape.name for shape in shapes_of(model, job))
    assert len(found["c0"]) == 8


@pytest.mark.parametrize("labels", ["server", "client"])
def test_a_client_without_layers_scores_nothing_and_gets_no_gradient(models: dict[str, Path], labels: str) -> None:
    job = job_of("nf4", privacy={"labels": labels})
    actors = probed_actors(models["llama"], job, [0, 1])
    outcome = probe_importance(actors, {"server": ["c0", "c1"]}, 1, TOKENS, labels)
    assert [(r.client, r.tokens) for r in outcome.reports] == [(c, TOKENS) for c in ("c0", "c1", "c0", "c1")]
    assert not outcome.reports[0].scores and len(outcome.reports[1].scores) == 7
    assert [len(r.scores) for r in outcome.reports[2:]] == [28, 21]
    assert outcome.bytes_up > 0 and outcome.bytes_down > 0
    if labels == "server":
        _, none, some = actors.actors["server"].probe(*[actors.actors[c].probe_forward(1, 4)[1] for c in ("c0", "c1")])
        assert none is None and some is not None


@pytest.mark.parametrize(("labels", "base"), [("server", "nf4"), ("client", "fp32")])
def test_a_probe_leaves_no_trace(models: dict[str, Path], tmp_path: Path, labels: str, base: str) -> None:
    # Without noise, which is never the same in two runs.
    privacy = {"labels": labels}
    settings = {"base": base, "local_steps": 2, "rounds": 2, "lr": 0.02, "dropout": 0.2, "privacy": privacy}
    states, losses, probes = [], [], []
    for probing in (False, True):
        job = job_of(**settings)
        plan = fixed_plan(models["llama"], job, [0, 3], [2, 4], 4)
        recorder = Recorder()
        shares = {f"c{i}": random_examples(20, i) for i in range(2)}
        run = coordinator(models["llama"], tmp_path / str(probing), plan, shares, recorder, Policy(), **settings)
        executor: Any = run._executor

        def probe(step: int, executor: Any = executor) -> None:
            probes.append(probe_importance(executor, {"server": ["c0", "c1"]}, step, TOKENS, labels))

        recorder.after_step = probe if probing else None
        run.run()
        states.append([executor.actors[name].state() for name in ("c0", "c1", "server")])
        losses.append((recorder.losses, [row.val_loss for row in recorder.rows]))
    assert len(probes) == 4
    assert losses[0] == losses[1]
    for plain, probed in zip(*states, strict=True):
        assert plain.keys() == probed.keys()
        for name, tensor in plain.items():
            assert torch.equal(tensor, probed[name]), name


@pytest.mark.parametrize("planted", ["transformer.h.2.mlp.c_proj", "transformer.h.1.attn.c_proj"])
def test_a_planted_weight_is_found(tmp_path: Path, planted: str) -> None:
    """Of all adapted weights the loss depends on one: it ranks first by far, on either side of the split."""
    from safetensors.torch import load_file, save_file

    model = save_tiny_model("gpt2", tmp_path)
    tensors = load_file(model / "model.safetensors")
    inner = planted.replace("mlp.c_proj", "mlp.c_fc").replace("attn.c_proj", "attn.c_attn")
    for name, tensor in tensors.items():
        if name.startswith("transformer.h") and name.endswith("weight") and tensor.dim() == 2 and planted not in name:
            tensor *= 0.01
    # What the planted weight reads comes from a bias, which is not adapted.
    bias = tensors[f"{inner}.bias"]
    bias.copy_(torch.randn(bias.shape, generator=torch.Generator().manual_seed(0)))
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    job = job_of("fp32")
    for split in (0, 3):
        actors = probed_actors(model, job, [split], plain=True)
        reports = probe_importance(actors, {"server": ["c0"]}, 1, TOKENS, "server").reports
        found = scores(reports, shapes_of(model, job))
        first, second = sorted(found, key=lambda name: -found[name])[:2]
        assert first == planted and found[first] > 5 * found[second]


def test_probe_batches_have_exactly_the_wanted_tokens() -> None:
    examples = [TokenizedExample(tuple(range(i, i + 12)), prompt_length=4) for i in range(30)]
    for tokens, used, rows in ((1, 1, 1), (8, 8, 1), (9, 9, 2), (20, 20, 3), (100, 32, 4)):
        batch = probe_batch(examples, tokens, 4, seed=1)
        assert (batch.supervised, len(batch.lengths)) == (used, rows)
    # Whoever is asked for fewer tokens sees the first of the same ones.
    few, many = probe_batch(examples, 9, 4, seed=1), probe_batch(examples, 16, 4, seed=1)
    assert torch.equal(few.ids, many.ids) and int((few.targets != many.targets).sum()) == 7
    first = [probe_batch(examples, 1, 4, seed).ids[0, 0].item() for seed in range(20)]
    assert len(set(first)) > 8
    with pytest.raises(ValueError, match="tokens and batch_size must be at least 1"):
        probe_batch(examples, 0, 4, seed=1)


def test_batches_depend_on_seed_client_and_round_alone(models: dict[str, Path]) -> None:
    def drawn(seed: int, client: str, round_: int) -> list[int]:
        actors = probed_actors(models["llama"], job_of("fp32", seed=seed), [1, 1]).actors
        actors[client].probe_forward(round_, TOKENS)
        ids: list[int] = actors[client]._probed[1].ids.flatten().tolist()
        return ids

    assert drawn(0, "c0", 1) == drawn(0, "c0", 1)
    assert len({tuple(drawn(*key)) for key in ((0, "c0", 1), (1, "c0", 1), (0, "c1", 1), (0, "c0", 2))}) == 4


SHAPES = [LinearShape("a", 0, 6, 4), LinearShape("b", 1, 3, 5)]


def test_scores_are_the_token_weighted_mean() -> None:
    reports = [
        ImportanceReport("c0", 30, {"a": 2.0}),
        ImportanceReport("c0", 30, {"b": 1.0}),
        ImportanceReport("c1", 10, {"a": 4.0, "b": 5.0}),
        ImportanceReport("c1", 10, {}),
    ]
    assert scores(reports, SHAPES) == pytest.approx({"a": 2.5, "b": 2.0})
    assert scores(reports, SHAPES, "equal") == {"a": 24, "b": 15}


@pytest.mark.parametrize(
    ("reports", "text"),
    [
        ([ImportanceReport("c0", 3, {"a": 1.0})], "missing for c0: b"),
        ([ImportanceReport("c0", 3, {"a": 1.0, "b": 1.0}), ImportanceReport("c0", 3, {"b": 1.0})], "reported twice"),
        ([ImportanceReport("c0", 0, {"a": 0.0, "b": 0.0})], "no client had a supervised token"),
    ],
)
def test_incomplete_reports_are_refused(reports: list[ImportanceReport], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        scores(reports, SHAPES)


@pytest.mark.parametrize("endless", [float("nan"), float("inf")])
def test_a_score_that_is_no_number_is_no_matter_of_importance(endless: float) -> None:
    with pytest.raises(FloatingPointError, match="the importance of b for c0 is not finite"):
        scores([ImportanceReport("c0", 3, {"a": 1.0, "b": endless})], SHAPES)


def test_history_blends_as_the_method_says() -> None:
    history = ImportanceHistory(rounds=10)
    assert history.blend(1, {"a": 1.0, "b": 4.0}) == {"a": 1.0, "b": 4.0}
    # a: nu = 1, lam = 0.9 * 0.8 / 2 = 0.36; b: nu = 0.
    assert history.blend(2, {"a": 2.0, "b": 4.0}) == pytest.approx({"a": 1.36, "b": 4.0})
    # At the end of the run the least trust is left, and a jump from nothing has no more.
    assert history.blend(10, {"a": 2.36, "b": 4.0}) == pytest.approx({"a": 1.46, "b": 4.0})
    none = ImportanceHistory(rounds=10, lam_0=1.0, lam_min=0.2)
    none.blend(0, {"a": 0.0, "b": 1.0})
    assert none.blend(0, {"a": 1.0, "b": 3.0}) == pytest.approx({"a": 0.2, "b": 1 + 2 / 3})
    with pytest.raises(ValueError, match="not in both: b, c"):
        history.blend(3, {"a": 1.0, "c": 1.0})
    with pytest.raises(ValueError, match="lam_0 and lam_min"):
        ImportanceHistory(rounds=10, lam_0=1.5)


def test_history_does_not_depend_on_the_unit_of_the_scores() -> None:
    first, second = {"a": 1.0, "b": 0.0, "c": 3.0}, {"a": 2.0, "b": 1.0, "c": 2.0}
    plain, scaled = ImportanceHistory(4), ImportanceHistory(4)
    for round_, now in enumerate((first, second, first)):
        plain.blend(round_, now)
        scaled.blend(round_, {name: 1e-30 * score for name, score in now.items()})
    assert scaled.scores == pytest.approx({name: 1e-30 * score for name, score in plain.scores.items()})


def test_history_moves_between_zero_and_two_and_survives_a_checkpoint() -> None:
    history = ImportanceHistory(rounds=5, lam_0=0.8, lam_min=0.05)
    history.blend(1, {"a": 1.0, "b": 3.0})
    assert history.moved({"a": 10.0, "b": 30.0}) == pytest.approx(0.0)
    assert history.moved({"a": 1.0, "b": 1.0}) == pytest.approx(0.5)
    assert history.moved({"a": 1.0, "b": 0.0}) == pytest.approx(1.5)
    again = ImportanceHistory.from_json(json.loads(json.dumps(history.to_json())))
    assert again.blend(2, {"a": 0.3, "b": 0.1}) == history.blend(2, {"a": 0.3, "b": 0.1})
    assert again.to_json() == history.to_json()


def test_spectra_are_average_curves_concave_and_in_one_unit() -> None:
    reports = [
        ImportanceReport("c0", 30, {"a": (3.0, 4.0, 0.0), "b": (1.0, 0.0, 0.0)}),
        ImportanceReport("c1", 10, {"a": (3.0, 0.0, 0.0), "b": (5.0, 0.0, 0.0)}),
    ]
    # Spectra are averaged first: (3, 3, 0) and (2, 0, 0).
    found = scores(reports, SHAPES, "spectral")
    assert found["a"] == pytest.approx((3.0, 18**0.5, 18**0.5))
    assert found["b"] == pytest.approx((2.0, 2.0, 2.0))


def _planted(noise: float, seed: int, tokens: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    """Slopes and inputs of tokens whose gradient has three directions, of 8, 4 and 2, and noise of each token's own."""
    draw = torch.Generator().manual_seed(seed)
    left, right = (torch.linalg.qr(torch.randn(64, 3, generator=draw)).Q for _ in range(2))
    signs = torch.randint(0, 2, (tokens, 3), generator=draw) * 2.0 - 1.0
    slopes = (signs * torch.tensor([8.0, 4.0, 2.0])) @ left.T / tokens
    strays = torch.randn(tokens, 64, generator=draw) * noise / tokens
    return slopes + strays, signs @ right.T + torch.randn(tokens, 64, generator=draw) * noise


@pytest.mark.parametrize("seed", range(3))
def test_a_spectrum_is_what_the_halves_share(seed: int) -> None:
    exact = shared_spectrum(*_planted(0.0, seed), 0)
    assert exact[:3].tolist() == pytest.approx([8.0, 4.0, 2.0], rel=0.1) and float(exact[3:].max()) < 1e-4
    delta, x = _planted(0.7, seed)
    noisy, whole = shared_spectrum(delta, x, 0), torch.linalg.svdvals(delta.T @ x)
    assert noisy[:2].tolist() == pytest.approx([8.0, 4.0], rel=0.25)
    # The tail of the singular values is noise, and most of it is gone.
    assert float(noisy[4:].sum()) < 0.25 * float(whole[4:32].sum())
    assert (noisy.diff() <= 0).all() and (noisy >= 0).all()


@pytest.mark.parametrize(("tokens", "d_out", "d_in"), [(100, 576, 576), (64, 512, 2752), (600, 48, 32), (9, 300, 40)])
def test_sketches_take_no_more_than_is_counted(tokens: int, d_out: int, d_in: int) -> None:
    delta, x = torch.randn(tokens, d_out), torch.randn(tokens, d_in)
    with LiveBytes([delta, x]) as live:
        shared_spectrum(delta, x, 0)
    assert 0 < live.peak <= probe_working_bytes(d_out, d_in, tokens, 0, torch.float32, spectral=True)


def test_a_spectrum_of_a_single_token_or_of_none_has_nothing_in_common() -> None:
    for tokens in (0, 1):
        assert not shared_spectrum(torch.ones(tokens, 8), torch.ones(tokens, 6), 0).any()


def test_history_blends_curves_as_a_whole() -> None:
    history = ImportanceHistory(10)
    history.blend(0, {"a": (3.0, 4.0), "b": (1.0, 1.0)})
    blended = history.blend(1, {"a": (6.0, 8.0), "b": (1.0, 1.5)})
    ratio = blended["a"][0] / 3.0  # type: ignore[index]
    assert blended["a"] == pytest.approx((3.0 * ratio, 4.0 * ratio)) and 1.0 < ratio < 2.0
    assert ImportanceHistory.from_json(json.loads(json.dumps(history.to_json()))).scores == history.scores
    assert history.moved(history.scores) == 0.0
    # All of a number's change, and of a curve's directions.
    assert history.moved({"a": 1.0, "b": 0.0}) == pytest.approx(
        2 * blended["b"][-1] / (blended["a"][-1] + blended["b"][-1])  # type: ignore[index]
    )


@pytest.mark.parametrize("curve", [(1.0, 3.0), (2.0, 1.0), (), (1.0, float("nan"))])
def test_a_curve_that_is_not_concave_is_refused(curve: tuple[float, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(IMPORTANCE, "rngwp", lambda sums, shapes: {shape.name: curve for shape in shapes})
    with pytest.raises(InputError, match="or a concave curve"):
        scores([ImportanceReport("c0", 3, {"a": 1.0, "b": 1.0})], SHAPES)
