"""Who reaches a Ray that hsplit has started: this machine alone, and nobody without the token."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from hsplit.errors import InputError

# In a process of its own: the tests' shared Ray has no dashboard.
_PROGRAM = textwrap.dedent(
    """
    import json, os, sys, urllib.error, urllib.request
    import psutil, ray
    from hsplit.config import ClientConfig, RunConfig
    from hsplit.cluster.ray_session import helpers_of, ray_of

    def status(path, token=None):
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        try:
            with urllib.request.urlopen(urllib.request.Request(f"http://{dashboard}{path}", headers=headers)) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code

    run = RunConfig(clients=(ClientConfig(name="a", kind="a", memory_gb=1.0, tflops=1.0),))
    with helpers_of(run, None) as helpers, ray_of(run, None, helpers) as dashboard:
        token = os.environ["RAY_AUTH_TOKEN"]
        port = int(dashboard.rpartition(":")[2])
        listening = {c.laddr.ip for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.laddr.port == port}
        paths = ["/api/version", "/api/jobs/", "/nodes?view=summary", "/api/v0/actors"]
        print("FOUND " + json.dumps({
            "dashboard": dashboard,
            "listening": sorted(listening),
            "mode": os.environ.get("RAY_AUTH_MODE"),
            "without": [status(path) for path in paths],
            "wrong": [status(path, "w" * 64) for path in paths],
            "with": status("/api/jobs/", token),
        }))
    """
)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    environment = {**os.environ, "RAY_AUTH_TOKEN": "t" * 64, "HOME": str(tmp_path_factory.mktemp("home"))}
    # Not asked for: it is the default that counts.
    environment.pop("RAY_AUTH_MODE", None)
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert lines, done.stderr
    answer: dict[str, object] = json.loads(lines[0].removeprefix("FOUND "))
    return answer


def test_the_dashboard_answers_nobody_without_the_token(found: dict[str, object]) -> None:
    assert found["mode"] == "token"
    assert found["without"] == [401] * 4
    assert found["with"] == 200
    assert set(found["wrong"]) <= {401, 403}  # type: ignore[call-overload]


def test_the_dashboard_listens_on_this_machine_alone(found: dict[str, object]) -> None:
    assert str(found["dashboard"]).startswith("127.0.0.1:")
    assert found["listening"] == ["127.0.0.1"]


def test_tests_run_with_the_token_too() -> None:
    assert os.environ["RAY_AUTH_MODE"] == "token" and len(os.environ["RAY_AUTH_TOKEN"]) == 64


def test_a_token_that_others_may_read_is_made_the_user_s_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hsplit.cluster.connection import _keep_token

    monkeypatch.setenv("HOME", str(tmp_path))
    _keep_token()
    token = tmp_path / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("secret")
    token.chmod(0o644)
    _keep_token()
    assert token.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("address", "host", "reason"),
    [
        ("auto", "0.0.0.0", "--dashboard-host 0.0.0.0: the Ray cluster at auto has its dashboard already"),
        (None, "everywhere", "--dashboard-host everywhere: must be an IP address of this machine"),
    ],
)
def test_where_the_dashboard_listens_is_checked_before_anything_starts(
    address: str | None, host: str, reason: str
) -> None:
    from hsplit.cluster.connection import connect

    with pytest.raises(InputError, match=re.escape(reason)):
        connect(address, 1, dashboard_host=host)
