"""`hsplit bench privacy`: attacks that succeed without noise and fail with much of it, and a run under noise."""

from __future__ import annotations

import random
from pathlib import Path

import pandas
import pytest
import torch
from click.testing import CliRunner

from benchmarks import inversion, privacy
from hsplit.actors.client import ActivationNoise
from hsplit.cli import main
from hsplit.data import TokenizedExample
from hsplit.models.loading import load_segment
from hsplit.models.segment import BaseModel, SegmentSpec
from hsplit.models.spec import ModelSpec
from tests.tiny import LAYERS, WORDS, tiny_tokenizer


@pytest.fixture
def restaurants(tmp_path: Path) -> Path:
    """Meaning representations in the tiny tokenizer's words: 20 names, eight examples each."""
    draw = random.Random(0)

    def words(count: int) -> str:
        return " ".join(f"w{draw.randrange(2, WORDS)}" for _ in range(count))

    lines = []
    for name in {words(2) for _ in range(20)}:
        lines += [f'"name[ {name} ], food[ {words(1)} ]","{words(6)}"\n' for _ in range(8)]
    path = tmp_path / "restaurants.csv"
    path.write_text("mr,ref\n" + "".join(lines))
    return path


def test_the_bench_goes_on_where_it_was_ended_and_reads_what_noise_does_not_drown(
    models: dict[str, Path], restaurants: Path, tmp_path: Path
) -> None:
    to = tmp_path / "results"
    flags = ["--quick", "--model", str(models["llama"]), "--data", str(restaurants), "--base", "fp32"]
    flags += ["--splits", "0", "1", "--noises", "0", "5", "--private", "40", "--inverter-steps", "5", "--to", str(to)]
    first = CliRunner().invoke(main, ["bench", "privacy", *flags, "--cells", "1"], catch_exceptions=False)
    assert first.exit_code == 0
    (done,) = pandas.read_csv(to / "utility.csv", comment="#").to_dict("records")
    assert (done["split"], done["noise"]) == (0, 0)
    shown = CliRunner().invoke(main, ["bench", "privacy", *flags], catch_exceptions=False).output
    assert "split 0, noise 0:" not in shown and "split 1, noise 5:" in shown
    utility = pandas.read_csv(to / "utility.csv", comment="#")
    assert utility.to_dict("records")[0] == done
    assert list(zip(utility.split, utility.noise, strict=True)) == [(0, 0), (0, 5), (1, 0), (1, 5)]
    assert (utility.val_ppl_noiseless[utility.noise == 0] - utility.val_ppl[utility.noise == 0]).abs().max() < 1e-6
    assert (utility.val_ppl_noiseless[utility.noise == 5] != utility.val_ppl[utility.noise == 5]).all()
    attacks = pandas.read_csv(to / "attacks.csv", comment="#").set_index(["split", "noise", "attack", "scope"])
    before = attacks[~attacks.trained].top1
    # At depth 0 without noise what is sent is the embedding itself.
    assert before[0, 0, "nearest", "all"] == before[0, 0, "linear", "all"] == 1
    assert before[0, 5, "nearest", "all"] < 0.2
    assert (attacks.top5 >= attacks.top1).all()
    assert len(attacks[attacks.trained]) > 0
    labels = pandas.read_csv(to / "labels.csv", comment="#").set_index("wire")
    assert labels.recovered["fp32"] == 1
    assert "| 0 | 5 |" in (to / "privacy.md").read_text()
    assert (to / "privacy.svg").read_text().startswith("<?xml")
    assert not any(str(tmp_path) in line for line in (to / "utility.csv").read_text().splitlines() if "data" in line)


def test_no_restaurant_is_both_the_servers_and_a_clients(models: dict[str, Path], restaurants: Path) -> None:
    options = privacy._options(["--quick", "--model", str(models["llama"]), "--data", str(restaurants)])
    benchmark = privacy._Benchmark(options)
    private = {privacy._name(e.prompt) for share in benchmark.texts.private.values() for e in share}
    names = {privacy._name(e.prompt) for e in privacy.read_source(str(restaurants)).examples}
    assert len(names) == 20 and 0 < len(private) < 20
    tokenizer = tiny_tokenizer()
    public = {tokenizer.decode(e.ids[1:3]) for e in benchmark.texts.public}
    assert len(public) == 20 - len(private) and not public & private
    for example, places in zip(benchmark.texts.attacked, benchmark.texts.names, strict=True):
        assert tokenizer.decode([example.ids[place] for place in places]) in private


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_returned_gradient_tells_the_label(models: dict[str, Path], family: str) -> None:
    base = BaseModel(ModelSpec.read(models[family]), "fp32", torch.float32)
    tail = load_segment(base, SegmentSpec(LAYERS, LAYERS, tail=True)).tail
    assert tail is not None
    labels = torch.arange(WORDS)
    deep = torch.randn(WORDS, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    tail.token_losses(deep, labels).sum().backward()
    assert deep.grad is not None
    read = inversion.labels_from_gradients(tail, deep.detach(), deep.grad)
    assert float((read == labels).float().mean()) > 0.95
    wrong = inversion.labels_from_gradients(tail, deep.detach(), deep.grad.roll(1, dims=0))
    assert float((wrong == labels).float().mean()) < 0.2


def test_an_inverter_learns_what_is_likely_beyond_the_regression(models: dict[str, Path]) -> None:
    """Of texts in which only three words ever stand, noise that drowns the regression leaves it much to guess by."""
    base = BaseModel(ModelSpec.read(models["llama"]), "fp32", torch.float32)
    front = load_segment(base, SegmentSpec(0, 1, embedding=True))
    draw = random.Random(0)
    texts = [TokenizedExample(tuple(draw.choice((5, 6, 7)) for _ in range(8)), 1) for _ in range(64)]
    sent = [inversion.activations(front, part) for part in (texts[:48], texts[48:])]
    noise = ActivationNoise(0.4, sent[0].typical_norm)
    public, seen = (inversion.received(one, noise, "fp32") for one in sent)
    anything = [TokenizedExample(tuple(draw.randrange(2, WORDS) for _ in range(8)), 1) for _ in range(200)]
    made = inversion.received(inversion.activations(front, anything), noise, "fp32")
    embeddings = front.embeddings["embed_tokens"].weight.detach()
    linear = inversion.Linear(made, embeddings)
    inverter = inversion.trained_inverter(linear, public, made, embeddings, 60, 0)
    regression = inversion.guesses(linear.vectors(seen), embeddings, 1)[:, 0]
    guessed = inverter.guesses(seen, embeddings, 1)[:, 0]
    right, right_linear = ((g == seen.ids).float().mean() for g in (guessed, regression))
    assert right > right_linear + 0.1 and right > 0.4


def test_the_table_has_the_best_attack_of_every_cell() -> None:
    learned = [privacy.Learned(2, 0.1, 3.0, 2e4, 300.0, 9.5), privacy.Learned(2, 0.0, 3.0, 12.0, 4.0, 4.0)]
    attacked = [
        privacy.Attacked(2, noise, trained, attack, "base", scope, 10, share, share)
        for noise, trained, attack, scope, share in (
            (0.1, False, "nearest", "all", 0.5),
            (0.1, False, "inverter", "all", 0.25),
            (0.1, False, "inverter", "content", 0.75),
            (0.1, False, "linear", "content", 0.5),
            (0.1, True, "linear", "all", 0.125),
            (0.0, False, "linear", "all", 1.0),
        )
    ]
    columns, cells = privacy.table(learned, attacked)
    assert all(len(row) == len(columns) for row in cells)
    assert cells[0] == ["2", "0", "12.00", "4.00", "4.00", "", "100.0%", "", "", "", ""]
    assert cells[1] == ["2", "0.1", "2.0e+04", "300.00", "9.50", "50.0%", "", "25.0%", "75.0%", "", "12.5%"]
