"""The files for Ray's own tools fit those tools, and are not presets of hsplit."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml

from hsplit.config import find_preset, load_run_config
from hsplit.errors import InputError

ROOT = Path(__file__).parents[2]
RAY_FILES = ROOT / "cluster" / "ray"
# Options of `ray start` as people write them: in code blocks, in commands, as one line or continued.
_RAY_START = re.compile(r"ray start((?: +(?!#|`)\S+)*)")


def read(name: str) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((RAY_FILES / name).read_text())
    return document


def ray_start_options() -> set[str]:
    from ray.scripts.scripts import start

    return {option for parameter in start.params for option in parameter.opts}


def test_the_cluster_launcher_takes_its_file() -> None:
    config = read("ray-cluster.yaml")
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(config, schema)
    assert len(config["provider"]["worker_ips"]) == config["max_workers"]


def test_kuberay_s_file_has_what_a_ray_cluster_needs() -> None:
    cluster = read("kuberay.yaml")
    assert (cluster["apiVersion"], cluster["kind"]) == ("ray.io/v1", "RayCluster")
    spec = cluster["spec"]
    assert spec["authOptions"] == {"mode": "token"}
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    for group in groups:
        (container,) = group["template"]["spec"]["containers"]
        mounted = {mount["name"] for mount in container.get("volumeMounts", [])}
        assert mounted == {volume["name"] for volume in group["template"]["spec"].get("volumes", [])}
        assert {f"--{key}" for key in group["rayStartParams"]} <= ray_start_options()
        if resources := group["rayStartParams"].get("resources"):
            # The operator puts it into a shell's command line as it stands.
            assert json.loads(json.loads(resources)) == {"patients": 1}
    # The image is of the Ray that the tests pass with.
    pinned = re.search(r"^ray==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None and spec["rayVersion"] == pinned[1]


@pytest.mark.parametrize(
    "path", ["docs/tutorials/three-machines.md", "docs/clusters.md", "cluster/ray/ray-cluster.yaml"]
)
def test_ray_start_knows_every_option_that_we_name(path: str) -> None:
    known, found = ray_start_options(), 0
    text = (ROOT / path).read_text()
    if path.endswith(".yaml"):
        text = "\n".join(
            command for commands in yaml.safe_load(text).values() if isinstance(commands, list) for command in commands
        )
    for line in _RAY_START.findall(text):
        options = [word.partition("=")[0] for word in shlex.split(line) if word.startswith("--")]
        assert set(options) <= known, line
        found += bool(options)
    assert found >= 2


@pytest.mark.parametrize("name", ["ray-cluster", "kuberay"])
def test_they_are_no_presets(name: str) -> None:
    with pytest.raises(InputError, match="no such cluster file, and no preset of that name"):
        find_preset("cluster", name)
    with pytest.raises(InputError, match=rf"{name}\.yaml: \w+: unknown key \(allowed: clients, job, policy, server\)"):
        load_run_config(RAY_FILES / f"{name}.yaml")
