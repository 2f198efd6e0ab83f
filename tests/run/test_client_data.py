"""Clients without a token to learn from are reported by name, and refused if all are so."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Any

import pytest

from hsplit.config import ClientConfig, Job, Policy, RunConfig
from hsplit.errors import InputError
from hsplit.observe.events import read_events
from hsplit.observe.tables import read_metrics
from hsplit.planning.planning_state import Fleet, PlanningState
from hsplit.planning.scheduler import Review, Scheduler
from hsplit.run.checkpoint import read_state
from hsplit.run.coordinator import Coordinator
from hsplit.run_directory import RunDirectory
from tests.in_process import Recorder, planned_run
from tests.tiny import wordless_tokenizer


@pytest.fixture(scope="module")
def wordless(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer that makes no token of words such as ``zz``, and has no eos."""
    directory = tmp_path_factory.mktemp("wordless") / "model"
    shutil.copytree(models["llama"], directory)
    for file in directory.glob("tokenizer*"):
        file.unlink()
    wordless_tokenizer().save_pretrained(directory)
    return directory


def a_run(model: Path, to: Path, words: dict[str, str], **job: Any) -> Coordinator:
    """A run of clients with files of their own, in which every response is the client's word of ``words``."""
    clients = []
    for name, word in words.items():
        file = to / f"{name}.csv"
        file.write_text("prompt,response\n" + "".join(f"w{number + 2},{word}\n" for number in range(12)))
        clients.append(ClientConfig(name=name, kind=name, memory_gb=0.3, tflops=1.0, data=str(file)))
    settings = {"base": "fp32", "dtype": "fp32", "rounds": 2, "local_steps": 2, "max_length": 32, "model": str(model)}
    run = RunConfig(clients=tuple(clients), job=Job.model_validate({**settings, **job}), policy=Policy())
    return planned_run(run, model, RunDirectory.create(to / "runs", "run"), dict.fromkeys(words), Recorder())


def test_a_client_without_a_token_to_learn_is_named_and_the_others_learn(wordless: Path, tmp_path: Path) -> None:
    made = a_run(wordless, tmp_path, {"a": "w5 w6", "b": "zz", "c": "w7"})
    assert made.run()
    directory = made.context.directory
    (unsupervised,) = [event for event in read_events(directory.events) if event["event"] == "unsupervised"]
    file = tmp_path / "b.csv"
    assert unsupervised["client"] == "b"
    assert unsupervised["text"] == f"b: no training example has a token to predict, so it learns nothing: data {file}"
    losses = read_metrics(directory.metrics)["val_loss"]
    assert losses.iloc[-1] < losses.iloc[0]


def test_a_run_without_a_token_to_learn_is_refused_and_names_every_file(wordless: Path, tmp_path: Path) -> None:
    made = a_run(wordless, tmp_path, {"a": "zz", "b": "zz"})
    with pytest.raises(InputError) as refused:
        made.run()
    text = str(refused.value)
    assert text.startswith(f"data {tmp_path / 'a.csv'}, data {tmp_path / 'b.csv'}: no training example of at most ")
    assert "job.max_length = 32" in text and f"the tokenizer of {wordless} every response is empty" in text
    assert "\n" not in text and not any(made.context.directory.checkpoints.iterdir())


def test_a_validation_that_would_measure_nothing_is_refused(wordless: Path, tmp_path: Path) -> None:
    made = a_run(wordless, tmp_path, {"a": "w5"})
    (held_out,) = held_out_prompts(made)
    file = tmp_path / "a.csv"
    rows = [f"{p},zz" if p == held_out else f"{p},{r}" for p, r in (row.split(",") for row in file.read_text().split())]
    file.write_text("\n".join(rows) + "\n")
    with pytest.raises(InputError, match=rf"^data {file}: no validation example .* has a token to predict"):
        made.run()


def test_the_first_plan_knows_how_many_tokens_each_client_has_and_a_resumed_run_too(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    first = Scheduler.first

    @functools.wraps(first)
    def watched(self: Scheduler, fleet: Fleet, state: PlanningState) -> Review:
        seen.append((dict(fleet.vocabulary), set(fleet.examples.values())))
        return first(self, fleet, state)

    monkeypatch.setattr(Scheduler, "first", watched)
    made = a_run(models["llama"], tmp_path, {"a": "w5 w6", "b": "w7"}, rounds=1)
    assert made.run()
    # Twelve prompts w2 to w13, which have the responses' words too, and the end of a text.
    assert seen == [({"a": 13, "b": 13}, {11})]
    kept = read_state(made.last_checkpoint or tmp_path)
    assert kept.vocabulary == {"a": 13, "b": 13}
    assert kept.fleet(made.context.run.clients).vocabulary == kept.vocabulary


def held_out_prompts(made: Coordinator) -> list[str]:
    """The prompts that the first client validates on."""
    from hsplit.data import hold_out, read_source
    from hsplit.seeds import hash_seed

    client, job = made.context.run.clients[0], made.context.job
    assert client.data is not None
    every = read_source(client.data).examples
    share = job.validation
    _, held = hold_out(every, share.share, share.max_examples, hash_seed(job.seed, client.name))
    return [example.prompt.strip() for example in held]
