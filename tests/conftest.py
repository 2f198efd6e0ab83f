"""Shared fixtures: tiny random models of both families, a tiny tokenizer, and runs in this process."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Ray reads these once, when it is imported: its token authentication stays on in tests, with a token of this session's
# own, so that nothing is written under the home directory.
os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN"] = "t" * 64
# The time of an example depends on the machine's load, so it is no criterion. The same examples are drawn every time,
# unless HSPLIT_FUZZ is set.
settings.register_profile("hsplit", deadline=None, derandomize="HSPLIT_FUZZ" not in os.environ)
settings.load_profile("hsplit")
FAMILIES = ("llama", "gpt2")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two processes for the default tier; the other tiers' runs need the machine for themselves."""
    return 0 if config.option.markexpr in ("real", "drill") else 2


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    # Tiny models gain nothing from a second one, and threads that wait for each other lose much on a busy machine.
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _quantized_anew() -> None:
    """Separate tests from the user's cache, in both directions."""
    from hsplit.models import weights

    weights.SMALLEST_ENTRIES = sys.maxsize


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache of this test's own."""
    monkeypatch.setenv("HSPLIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories of a tiny random model of each family, with a tokenizer."""
    from tests.tiny import save_tiny_model

    return {family: save_tiny_model(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}
