"""Reports of nodes, and their refusal; no Ray is started."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from hsplit.cluster import preflight
from hsplit.cluster.preflight import (
    FoundBase,
    NodeReport,
    NodeRequirements,
    check_bases,
    check_node,
    find_bases,
    inspect_node,
    shortages,
    versions,
)
from hsplit.errors import InputError
from hsplit.machine import Machine
from hsplit.models.checkpoint_reader import model_fingerprint
from hsplit.models.lookup import ModelReference

HERE = {"python": "3.11", "hsplit": "0.1.0", "ray": "2.60.0", "bitsandbytes": None}
IDLE = Machine(free_bytes=2_500_000_000, reserve_bytes=0, cores=2, load=0.0, shared_bytes=None, open_files=None)


def refused_node(there: NodeReport) -> str:
    with pytest.raises(InputError) as refusal:
        check_node("lab (10.0.0.2)", there, HERE)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def test_versions_are_those_of_this_environment() -> None:
    import ray
    import torch

    found = versions()
    assert found["ray"] == ray.__version__
    # A build for CPUs and one for GPUs are the same version.
    assert found["torch"] == torch.__version__.partition("+")[0]
    check_node("here", inspect_node(NodeRequirements({}, {})), found)


def test_a_package_that_is_not_there_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "PACKAGES", ("ray", "no-such-package"))
    assert versions()["no-such-package"] is None


def test_other_versions_are_refused() -> None:
    check_node("lab", NodeReport(HERE, {}, IDLE), HERE)
    assert refused_node(NodeReport(HERE | {"ray": "2.59.0"}, {}, IDLE)) == (
        "node lab (10.0.0.2): has ray 2.59.0, the driver 2.60.0: install ray 2.60.0 there"
    )
    assert "has no hsplit, the driver 0.1.0: install" in refused_node(NodeReport(HERE | {"hsplit": None}, {}, IDLE))
    assert "has bitsandbytes 1, the driver none: uninstall" in refused_node(
        NodeReport(HERE | {"bitsandbytes": "1"}, {}, IDLE)
    )


def test_a_client_s_file_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    there = tmp_path / "notes.csv"
    there.write_text("mr,ref\n")
    data = {"home": "~/notes.csv", "gone": str(tmp_path / "none.csv"), "folder": str(tmp_path)}
    found = inspect_node(NodeRequirements({}, data)).unreadable
    assert found == {"gone": f"there is no file {tmp_path}/none.csv", "folder": f"{tmp_path} is a directory, no file"}
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert inspect_node(NodeRequirements({}, data)).unreadable["home"] == f"{there} may not be read"
    assert refused_node(NodeReport(HERE, found, IDLE)) == (
        f"gone: data: there is no file {tmp_path}/none.csv on its node lab (10.0.0.2)"
    )


def test_the_base_is_compared_by_its_files(models: dict[str, Path], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(models["llama"], copy)
    fingerprint = model_fingerprint(models["llama"])
    own = {"server": ModelReference("job/model", models["llama"]), "clinic": ModelReference(str(copy), None)}
    found = find_bases(NodeRequirements(own, {}))
    assert found["clinic"] == FoundBase(copy, fingerprint)
    check_bases("lab", found, fingerprint)

    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(InputError, match=rf"clinic: model: {copy} on its node lab is not the run's base model: sha256"):
        check_bases("lab", find_bases(NodeRequirements(own, {})), fingerprint)

    shutil.rmtree(copy)
    with pytest.raises(InputError) as refusal:
        check_bases("lab", find_bases(NodeRequirements(own, {})), fingerprint)
    assert str(refusal.value) == f"clinic: model: there is no directory {copy} (on its node lab)"


def test_an_actor_on_a_node_that_nobody_has_looked_at_checks_its_base(models: dict[str, Path]) -> None:
    llama = models["llama"]
    assert ModelReference(str(llama), None, model_fingerprint(llama)).locate() == llama.resolve()
    with pytest.raises(InputError, match=r"gpt2\S* is not the run's base model"):
        ModelReference("job/model", models["gpt2"], model_fingerprint(llama)).locate()


def test_what_a_node_lacks_is_reported() -> None:
    assert shortages({"a": 2_000_000_000, "b": 500_000_000}, IDLE, "node lab") == []
    (line,) = shortages({"a": 2_000_000_000, "b": 1_500_000_000}, IDLE, "node lab")
    assert line.startswith("node lab: memory: 2.5 GB free, 3.5 GB declared for a, b: ")
