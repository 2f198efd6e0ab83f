"""The shell that Ray makes actors of, without Ray."""

from __future__ import annotations

from typing import Any

import pytest

from hsplit.cluster.fork_server import NO_GPU
from hsplit.cluster.ray_executor import ActorShell


class Plain:
    """Stands in an actor's place."""

    def pair(self, first: int) -> tuple[int, str, str]:
        return first, "second", "third"


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell hides GPUs from its process, which is this one."""
    for name, value in NO_GPU.items():
        monkeypatch.setenv(name, value)


def test_a_shell_calls_its_object_and_hands_out_values_one_by_one() -> None:
    shell = ActorShell("phone-0", Plain, 1)
    assert shell.call("pair", 1) == (1, "second", "third")
    assert shell.begin(7, "pair", 2) == 2
    assert (shell.rest(7, 1), shell.rest(7, 0)) == ("third", "second")
    assert repr(shell) == "Plain(phone-0)"


def test_a_shell_whose_object_could_not_be_made_has_a_representation() -> None:
    """Ray asks for it when it reports the error, and ends the process without a word where that fails."""

    def fail() -> Any:
        raise ValueError("no model here")

    shell = ActorShell.__new__(ActorShell)
    with pytest.raises(ValueError, match="no model here"):
        shell.__init__("phone-0", fail, 1)  # type: ignore[misc]
    assert "phone-0" in repr(shell)
