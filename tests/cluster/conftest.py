"""One Ray for every test of this folder; starting one takes longer than most of them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.in_process import random_examples


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    import ray

    from hsplit.cluster.connection import NOT_BEFOREHAND, WORKER_ENVIRONMENT
    from hsplit.cluster.fork_server import ForkServer

    patch = pytest.MonkeyPatch()
    # Metrics are exported more often than every ten seconds, so that a test need not wait so long for them.
    often = {"RAY_metrics_report_interval_ms": "2000"}
    for name, value in (WORKER_ENVIRONMENT | NOT_BEFOREHAND | often).items():
        patch.setenv(name, value)
    # Ray's sockets have paths of at most 107 bytes.
    with tempfile.TemporaryDirectory(prefix="ray") as temporary, ForkServer() as fork_server:
        ray.init(
            address="local",
            num_cpus=8,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=200_000_000,
            runtime_env={"py_executable": fork_server.worker_command},
            _temp_dir=temporary,
        )
        yield
        ray.shutdown()
    patch.undo()


@pytest.fixture(scope="session")
def word_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared data in the tiny tokenizer's words."""
    path = tmp_path_factory.mktemp("data") / "words.txt"
    lines = [f"{e.prompt}||{e.response.strip()}" for e in random_examples(80, seed=3)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="session")
def cluster_file(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path], word_file: Path) -> Path:
    """Three unequal clients, two of which have less in the last round, and a tiny model.

    In fp32 and without a deadline for clients, so that runs can be compared number by number on a machine of any pace.
    """
    path = tmp_path_factory.mktemp("cluster") / "tiny.yaml"
    path.write_text(
        f"""
server: {{memory_gb: 1, tflops: 0.001}}
clients:
  - {{name: small, memory_gb: 0.00113, tflops: 0.001}}
  - {{name: large, count: 2, memory_gb: 0.0014, tflops: 0.01, schedule: [{{round: 3, memory_gb: 0.00118}}]}}
job:
  model: {models["llama"]}
  data: {{source: {word_file}}}
  dtype: fp32
  wire: fp32
  rounds: 3
  local_steps: 4
  max_length: 32
  rank_set: [1, 2, 4]
  faults: {{deadline: null}}
"""
    )
    return path
