"""With labels at home neither labels nor token ids nor text leave a client, in any message of a whole run."""

from __future__ import annotations

import pickle
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from hsplit.actors.client import Client
from hsplit.config import SCHEDULER, Job, Policy, RunConfig, ServerConfig
from hsplit.config import ClientConfig as ClientConfig
from hsplit.data import Example
from hsplit.errors import InputError
from hsplit.models.segment import BaseModel
from hsplit.models.spec import ModelSpec
from hsplit.run.coordinator import Inputs
from hsplit.run.in_process import local_run
from hsplit.run_directory import RunDirectory
from tests.in_process import FixedScheduler, Recorder, fixed_plan
from tests.recording import Passed, Recording, Secrets, fields_of, text_in
from tests.tiny import LAYERS, WORDS

CLIENTS = ("c0", "c1")

# Every field of a client's results, labels at home. Activations and gradients are the bytes of floats.
_FLOATS = {f"WireTensor.{field}" for field in ("data: array uint8", "seed: int", "shape[]: int", "wire: str")}
_SECONDS = {"seconds{}.key: str", "seconds{}: float"}
_ACTIVATIONS = {
    "Activations.client: str",
    *(field.replace("WireTensor", "Activations.hidden") for field in _FLOATS),
    "Activations.lengths[]: int",
    "Activations.scored[]: int",
    "Activations.split: int",
    "Activations.step_supervised: int",
    "Activations.trains: bool",
    "Activations.weight: float",
    "Activations.supervised: int",
}
_REPORT = {"ForwardReport.client: str", "ForwardReport.nbytes: int"}
_LOSS = {"client: str", "loss_sum: float", "nbytes: int", "tokens: int"}
_TAIL = {f"LossReport.{field}" for field in _LOSS | _SECONDS} | _FLOATS
LEAVES = {
    "load_data": {
        "DataReport.client: str",
        "DataReport.reading: str",
        "DataReport.skipped: int",
        "DataReport.supervised: int",
        "DataReport.too_long: int",
        "DataReport.train: int",
        "DataReport.validation: int",
        "DataReport.validation_supervised: int",
        "DataReport.vocabulary: int",
    },
    "forward": _ACTIVATIONS | _REPORT | {f"ForwardReport.{field}" for field in _SECONDS},
    "tail": _TAIL,
    "backward": {"dict{}.key: str", "dict{}: float"},  # seconds by phase
    "take_scores": {
        "list[].client: str",
        "list[].scores{}.key: str",
        "list[].scores{}: float",
        "list[].tokens: int",
    },
    "validation_forward": _ACTIVATIONS | _REPORT,
    "validation_tail": {f"LossReport.{field}" for field in _LOSS},
    "collect": {
        "int: int",  # bytes
        "HeldAdapters.holder: str",
        "HeldAdapters.layers{}.key: str",
        "HeldAdapters.layers{}: int",
        "HeldAdapters.terms{}.A: tensor float32",
        "HeldAdapters.terms{}.B: tensor float32",
        "HeldAdapters.terms{}.key: str",
        "HeldAdapters.tokens{}.key: int",
        "HeldAdapters.tokens{}: float",
    },
    # Adapters and moments; the integers are tokens by layer.
    "state": {"dict{}.key: str", "dict{}: tensor float32", "dict{}: tensor float64", "dict{}: tensor int64"},
    "peak_bytes": {"int: int"},
}


@dataclass
class Recorded:
    """A whole run: recorded messages, the clients' data, and the run's directory."""

    passed: list[Passed]
    secrets: Secrets
    folder: Path

    def returned(self) -> list[Passed]:
        """Values that clients returned."""
        return [p for p in self.passed if p.actor in CLIENTS and p.way == "returned"]

    def outside(self) -> list[Passed]:
        """All recorded values but the texts that a client gets at the start."""
        return [p for p in self.passed if not (p.method == "load_data" and p.way == "given")]


def long_examples(count: int, seed: int) -> list[Example]:
    """Examples so long that a run of their ids in some bytes is no coincidence."""
    draw = random.Random(seed)

    def words(number: int) -> str:
        return " ".join(f"w{draw.randrange(2, WORDS)}" for _ in range(number))

    return [Example(words(draw.randint(7, 10)), " " + words(draw.randint(7, 10)), None) for _ in range(count)]


def recorded_run(
    model: Path,
    to: Path,
    monkeypatch: pytest.MonkeyPatch,
    own: bool = False,
    microbatches: int = 1,
    **privacy: Any,
) -> Recorded:
    """Two rounds with probes, validation, aggregation, a change of plan, and checkpoints.

    Args:
        model: to train.
        to: for files.
        monkeypatch: puts the recorder in the executor's place.
        own: each client reads a file of its own.
        microbatches: of each batch.
        privacy: section of the job.
    """
    monkeypatch.setattr("hsplit.run.in_process.InProcess", Recording)
    to.mkdir(exist_ok=True)
    shares = {name: long_examples(24, index) for index, name in enumerate(CLIENTS)}
    files = {name: to / f"{name}.txt" for name in CLIENTS}
    for name, path in files.items():
        path.write_text("".join(f"{e.prompt}||{e.response.strip()}\n" for e in shares[name]))
    job = Job.model_validate(
        {
            "dtype": "fp32",
            "batch_size": 2,
            "max_length": 32,
            "rounds": 2,
            "local_steps": 2,
            "pipeline": {"microbatches": microbatches},
            "privacy": privacy,
        }
    )
    clients = tuple(
        ClientConfig(name=name, kind=name, memory_gb=1.0, tflops=1.0, data=str(files[name]) if own else None)
        for name in CLIENTS
    )
    run = RunConfig(server=ServerConfig(), clients=clients, job=job, policy=Policy(name="hsplitlora"))
    plan, other = (fixed_plan(model, job, splits, [2, 4], 4) for splits in ([1, 3], [2, 1]))
    inputs = Inputs(dict.fromkeys(CLIENTS) if own else shares, "model", "data")
    directory = RunDirectory.create(to, "run")
    scheduler = FixedScheduler(plan, {1: other})
    coordinator = local_run(run, ModelSpec.read(model), directory, inputs, Recorder(), scheduler=scheduler)
    executor: Any = coordinator._executor
    assert coordinator.run()
    held = [data for name in CLIENTS for data in executor.actors[name].data.clients]
    rows = [example.ids for data in held for example in (*data.train, *data.held_out)]
    return Recorded(executor.passed, Secrets(rows), directory.path)


@pytest.mark.parametrize("microbatches", [1, 2])
def test_with_labels_at_home_no_id_and_no_text_leaves_a_client(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, microbatches: int
) -> None:
    run = recorded_run(models["llama"], tmp_path, monkeypatch, microbatches=microbatches, labels="client")
    methods = {p.method for p in run.returned()}
    assert methods >= {"forward", "tail", "backward", "take_scores"}
    assert methods >= {"validation_forward", "validation_tail", "collect", "reconfigure", "state", "peak_bytes"}
    assert {p.actor for p in run.passed} == {*CLIENTS, "server", SCHEDULER}
    for value in run.outside():
        assert not run.secrets.ids_in(value), (value.actor, value.method, value.way)
        assert not text_in(value.blob), (value.actor, value.method, value.way)
    _files_tell_nothing(run)


def _files_tell_nothing(run: Recorded) -> None:
    """The run's directory, checkpoints included, has no ids and no text."""
    files = [path for path in run.folder.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} >= {".safetensors", ".jsonl", ".csv", ".json"}
    for path in files:
        content = path.read_bytes()
        assert not run.secrets.ids_in_bytes(content) and not text_in(content), path


@pytest.mark.parametrize("microbatches", [1, 2])
def test_the_recorder_finds_the_labels_that_a_server_is_given(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, microbatches: int
) -> None:
    """Otherwise finding none in the U-shape would prove nothing."""
    run = recorded_run(models["llama"], tmp_path, monkeypatch, microbatches=microbatches, labels="server")
    found = {(p.actor, p.method, p.way) for p in run.outside() if run.secrets.ids_in(p)}
    sent = {(c, m, "returned") for c in CLIENTS for m in ("forward", "validation_forward")}
    assert found == sent | {("server", m, "given") for m in ("train_step", "evaluate")}
    # In the bytes too, and not only where arrays are looked at.
    in_bytes = {(p.actor, p.method, p.way) for p in run.outside() if run.secrets.ids_in_bytes(p.blob)}
    assert in_bytes == found
    assert not any(text_in(p.blob) for p in run.outside())
    texts = [p for p in run.passed if p.method == "load_data" and p.way == "given"]
    assert {p.actor for p in texts if text_in(p.blob)} == set(CLIENTS)
    _files_tell_nothing(run)


def test_of_data_of_its_own_a_client_is_given_the_path_alone(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = recorded_run(models["llama"], tmp_path, monkeypatch, own=True, labels="client")
    given = [p.value for p in run.passed if p.method == "load_data" and p.way == "given"]
    assert given == [v for name in CLIENTS for v in ({name: None}, str(tmp_path / f"{name}.txt"))]
    for value in run.passed:
        assert not run.secrets.ids_in(value) and not text_in(value.blob), (value.actor, value.method, value.way)
    _files_tell_nothing(run)


def test_all_that_leaves_a_client_is_known_by_name(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every field of every message; a new one must be reviewed, and documented in docs/PRIVACY.md."""
    run = recorded_run(models["llama"], tmp_path, monkeypatch, microbatches=2, labels="client")
    assert fields_of(run.returned()) == LEAVES
    # The integers of a checkpoint: a row a layer that was trained, its index and its number of tokens.
    for state in (p.value for p in run.returned() if p.method == "state"):
        # Of each direction of its adapters the step of the run at which it began.
        assert [name for name, tensor in state.items() if tensor.dtype == torch.int64] == ["begun"]
        counted = state["tokens"].tolist()
        assert all(0 <= layer < LAYERS and count >= 0 for layer, count in counted)
    # Of a probe's gradients only one number for each weight leaves.
    assert all(isinstance(s, float) for p in run.returned() if p.method == "probe_backward"
               for s in p.value.scores.values())  # fmt: skip
    server = recorded_run(models["llama"], tmp_path / "server", monkeypatch, microbatches=2, labels="server")
    targets = {"Activations.targets: array int32"}
    sending = ("forward", "probe_forward", "validation_forward")
    known = {m: LEAVES[m] | (targets if m in sending else set()) for m in LEAVES if "tail" not in m}
    assert fields_of(server.returned()) == known


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "w5 w6 w7,w8 w9 w10\n"),  # no header
        ("b.csv", "prompt,response,w5 w6,w5 w6\na,b,c,d\n"),
        ("c.csv", "prompt,response,w5 w6\na,b\n"),
        ("d.jsonl", '{"w5 w6": "w7 w8", "w9 w10": 1}\n'),
        ("e.jsonl", '{"prompt": ["w5 w6 w7"], "response": "w8"}\n'),
        ("f.jsonl", '{"messages": [{"role": "user", "content": "a"}, {"role": "w5 w6", "content": "b"}]}\n'),
        ("g.jsonl", '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "w5 w6"}]}\n'),
        ("h.txt", "w5 w6||w7 w8||w9\n"),
    ],
)
def test_an_error_in_a_clients_own_file_does_not_quote_it(
    models: dict[str, Path], tmp_path: Path, name: str, content: str
) -> None:
    """Its line goes to the driver and into the run's log."""
    path = tmp_path / name
    path.write_text(content)
    job = Job.model_validate({"dtype": "fp32"})
    client = Client("c0", job, Policy(), BaseModel.of_job(ModelSpec.read(models["llama"]), job))
    with pytest.raises(InputError) as refused:
        client.load_data({"c0": None}, str(path))
    assert str(path) in str(refused.value)
    assert not text_in(pickle.dumps(refused.value)) and not text_in(str(refused.value).encode())
    assert refused.value.__cause__ is None and refused.value.__suppress_context__
