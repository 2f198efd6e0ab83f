"""What leaves clients on real Ray, with data of their own and labels at home: the values of every call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import hsplit
from hsplit.actors.executor import Ref
from hsplit.cluster.ray_executor import RayExecutor
from tests.in_process import Recorder
from tests.recording import Passed, Secrets, fields_of, text_in
from tests.run.test_privacy import CLIENTS, LEAVES, long_examples

pytestmark = pytest.mark.usefixtures("ray_cluster")


class RecordingOnRay(RayExecutor):
    """Keeps what actors are given by the driver, and every object that they return."""

    passed: list[Passed]

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        type(self).passed = []
        self._kept: list[Ref[Any]] = []

    def begin(
        self, actor: str, method: Callable[..., Any], arguments: Sequence[Any], returns: int | None = None
    ) -> list[Ref[Any]]:
        # What is passed on by its reference is kept as what was returned.
        plain = [argument for argument in arguments if not isinstance(argument, Ref)]
        self.passed.extend(Passed(actor, method.__name__, "given", argument) for argument in plain)
        refs = super().begin(actor, method, arguments, returns)
        self._kept += refs
        return refs

    def close(self) -> None:
        for ref, value in zip(self._kept, self.wait(self._kept), strict=True):
            self.passed.append(Passed(ref.actor, ref.method, "returned", value))
        self._kept.clear()
        super().close()


def _words(text: str) -> list[int]:
    """The tiny tokenizer's ids of a text."""
    return [int(word.removeprefix("w")) for word in text.split()]


def test_with_labels_at_home_no_id_and_no_text_leaves_a_client_on_ray(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hsplit.cluster.ray_executor.RayExecutor", RecordingOnRay)
    examples = {name: long_examples(24, index) for index, name in enumerate(CLIENTS)}
    for name, own in examples.items():
        lines = "".join(f"{e.prompt}||{e.response.strip()}\n" for e in own)
        (tmp_path / f"{name}.txt").write_text(lines)
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text(
        f"""
server: {{memory_gb: 1, tflops: 0.001}}
clients:
  - {{name: c0, memory_gb: 0.00125, tflops: 0.001, data: {tmp_path / "c0.txt"}}}
  - {{name: c1, memory_gb: 0.0014, tflops: 0.01, data: {tmp_path / "c1.txt"},
      schedule: [{{round: 2, memory_gb: 0.00125}}]}}
job: {{model: {models["llama"]}, dtype: fp32, rounds: 2, local_steps: 2, max_length: 32, rank_set: [1, 2, 4],
  faults: {{deadline: null}}, privacy: {{labels: client}}}}
"""
    )
    # Clients that only compute forward would send no adapters, so that those would not be looked at.
    trains = {"policy.freeze": "never"}
    run = hsplit.launch(cluster, overrides=trains, runs_dir=tmp_path, name="private", display=Recorder())
    assert run.complete
    passed = RecordingOnRay.passed
    returned = [value for value in passed if value.actor in CLIENTS and value.way == "returned"]
    assert fields_of(returned) == LEAVES
    secrets = Secrets(_words(text) for own in examples.values() for e in own for text in (e.prompt, e.response))
    for value in passed:
        assert not secrets.ids_in(value) and not text_in(value.blob), (value.actor, value.method, value.way)
    files = [path for path in run.path.rglob("*") if path.is_file() and "model" not in path.parts]
    for path in files:
        content = path.read_bytes()
        assert not secrets.ids_in_bytes(content) and not text_in(content), path
