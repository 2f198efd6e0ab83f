"""Resolving files and overrides, and reading a configuration back as it was saved."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from hsplit.config import Job, Pace, Partition, Policy, RunConfig, load_run_config, preset_directory, to_yaml

TWO = "clients: [{name: phone, count: 2, memory_gb: 1}, {name: v1.2, memory_gb: 3}]\n"


def test_clients_are_counted_out_in_si_units(write: Any) -> None:
    client = "{name: phone, count: 2, memory_gb: 0.16, tflops: 0.5, bandwidth_mbps: 50, latency_ms: 40}"
    config = load_run_config(write("c.yaml", f"clients: [{client}, {{name: big, memory_gb: 2}}]\n"))
    assert [(client.name, client.kind) for client in config.clients] == [
        ("phone-0", "phone"),
        ("phone-1", "phone"),
        ("big", "big"),
    ]
    phone = config.clients[0]
    assert (phone.memory_bytes, phone.flops) == (160_000_000, 5e11)
    assert (phone.bandwidth_bps, phone.latency_s) == (5e7, 0.04)
    assert (config.server.memory_bytes, config.server.flops) == (8_000_000_000, 2e13)


def test_changes_of_budget_are_every_clients_of_the_group(write: Any, tmp_path: Path) -> None:
    group = "{name: phone, count: 2, memory_gb: 1, schedule: [{round: 3, memory_gb: 0.5}, {round: 5, tflops: 2}]}"
    config = load_run_config(write("c.yaml", f"server: {{schedule: [{{round: 2, tflops: 1}}]}}\nclients: [{group}]\n"))
    for client in config.clients:
        assert [(c.round, c.values()) for c in client.schedule] == [(3, {"memory_gb": 0.5}), (5, {"tflops": 2.0})]
    assert config.clients[0].changed(config.clients[0].schedule[0].values()).memory_bytes == 500_000_000
    assert config.server.schedule[0].values() == {"tflops": 1.0}
    config.save(tmp_path / "config.yaml")
    assert RunConfig.load(tmp_path / "config.yaml") == config


def test_only_a_plan_that_depends_on_importance_needs_a_probe() -> None:
    assert Policy().probes
    assert Policy(ranks="budget").probes
    # One rank for all captures the same wherever the model is split.
    assert not Policy(ranks=4).probes and not Policy(ranks="uniform").probes
    assert not Policy(split=2, ranks="uniform").probes
    assert not Policy.model_validate({"importance": {"metric": "equal"}}).probes


def test_defaults(write: Any) -> None:
    config = load_run_config(write("c.yaml", TWO))
    assert config.job == Job()
    assert config.job.rank_set == (1, 2, 4, 8, 16, 32)
    assert config.policy.model_copy(update={"description": "", "pace": Pace()}) == Policy()
    assert config.policy.pace.periods == "planned"


def test_a_client_s_own_paths(write: Any, tmp_path: Path) -> None:
    own = [
        "{name: a, memory_gb: 1, data: notes.csv, model: ./llama}",
        "{name: b, memory_gb: 1, data: ~/notes.csv, model: org/name}",
        "{name: c, memory_gb: 1, data: /srv/../srv/notes.csv, model: ../llama}",
    ]
    config = load_run_config(write("c.yaml", f"clients: [{', '.join(own)}]\n"))
    assert [(client.data, client.model) for client in config.clients] == [
        (str(tmp_path / "notes.csv"), str(tmp_path / "llama")),
        ("~/notes.csv", "org/name"),
        ("/srv/../srv/notes.csv", str(tmp_path.parent / "llama")),
    ]


def test_overrides_reach_every_section(write: Any) -> None:
    given = [
        "rounds=3",
        "job.lr=1e-4",
        "privacy.labels=client",
        "policy.reinit=random",
        "server.num_gpus=1",
        "clients.phone.memory_gb=0.2",
        "clients.v1.2.tflops=7",
        "clip=null",
        "rank_set=[4, 8]",
        "targets=[q_proj, v_proj]",
        "residual.max_rank=full",
        "rounds=4",
    ]
    path = write("c.yaml", TWO)
    config = load_run_config(path, overrides=given)
    assert (config.job.rounds, config.job.lr, config.job.clip) == (4, 1e-4, None)
    assert config.job.privacy.labels == "client"
    assert config.job.rank_set == (4, 8)
    assert config.job.targets == ("q_proj", "v_proj")
    assert config.job.residual.max_rank == "full"
    assert config.policy.reinit == "random"
    assert config.server.num_gpus == 1.0
    assert [client.memory_gb for client in config.clients] == [0.2, 0.2, 3.0]
    assert [client.tflops for client in config.clients] == [1.0, 1.0, 7.0]
    as_mapping = {"rounds": 4, "lr": 1e-4, "clip": None, "data": {"partition": {"dirichlet": 2}}}
    assert load_run_config(path, overrides=as_mapping).job.data.partition == Partition(dirichlet=2)


def test_an_override_replaces_the_choice_that_the_file_made(write: Any) -> None:
    for partition in ("iid", "{unequal: 1.0}", "{dirichlet: 1.0}"):
        path = write("c.yaml", f"{TWO}job: {{data: {{partition: {partition}, limit: 9}}}}\n")
        config = load_run_config(path, overrides=["data.partition.dirichlet=0.5"])
        assert config.job.data.partition == Partition(dirichlet=0.5)
        assert config.job.data.limit == 9
        assert load_run_config(path, overrides=["data.partition=iid"]).job.data.partition == "iid"
    drawn = load_run_config(path, overrides=["clients.phone.memory_gb.uniform=[5, 6]"])
    assert all(5 <= client.memory_gb <= 6 for client in drawn.clients[:2])


def test_policy_s_name_is_its_file_s(write: Any) -> None:
    path = write("c.yaml", TWO)
    assert load_run_config(path, write("mine.yaml", "ranks: 8\naggregation: fedavg\n")).policy.name == "mine"
    assert load_run_config(path, write("mine.yaml", "name: other\n")).policy.name == "other"


def test_published_policies(write: Any) -> None:
    path = write("c.yaml", TWO)
    for name, choices in {
        "hsplitlora": ("planned", "importance", "concat", "mean", "keep", "shared"),
        "splitlora": ("uniform", "uniform", "fedavg", "mean", "keep", "shared"),
    }.items():
        policy = load_run_config(path, name).policy
        assert policy.name == name
        assert (
            policy.split,
            policy.ranks,
            policy.aggregation,
            policy.reinit,
            policy.moments,
            policy.init,
        ) == choices


@pytest.mark.parametrize("preset", sorted(preset_directory("cluster").glob("*.yaml")), ids=lambda path: path.stem)
def test_cluster_presets_load_with_every_policy(preset: Path) -> None:
    for policy in preset_directory("policies").glob("*.yaml"):
        assert load_run_config(preset, policy).clients


def test_cpu_takes_every_gpu_away() -> None:
    with_gpus, without = load_run_config("gpu"), load_run_config("gpu", cpu=True)
    assert with_gpus.server.num_gpus > 0 and all(client.num_gpus > 0 for client in with_gpus.clients)
    assert without.server.num_gpus == 0 and all(client.num_gpus == 0 for client in without.clients)


def test_configurations_are_frozen() -> None:
    config = load_run_config("hetero")
    with pytest.raises(ValidationError, match="frozen"):
        config.job.rounds = 3


def test_a_failed_save_leaves_the_old_file(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_run_config(write("c.yaml", TWO))
    config.save("config.yaml")

    def full_disk(_: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        config.model_copy(update={"clients": config.clients[:1]}).save("config.yaml")
    assert RunConfig.load("config.yaml") == config
    assert sorted(path.name for path in Path().iterdir()) == ["c.yaml", "config.yaml"]


positive = st.floats(1e-6, 1e6)
text = st.text(min_size=1, max_size=20)
paths = text.filter(lambda path: "\0" not in path and not path.startswith("~"))
bounds = st.tuples(positive, positive).map(sorted).map(list)
budget = (
    positive
    | st.integers(1, 1000)
    | st.fixed_dictionaries({"uniform": bounds})
    | st.fixed_dictionaries({"lognormal": st.tuples(positive, st.floats(0, 3)).map(list)})
    | st.fixed_dictionaries({"choice": st.lists(positive, min_size=1, max_size=3)})
)
groups = st.lists(
    st.fixed_dictionaries(
        {"memory_gb": budget},
        optional={
            "count": st.integers(1, 3),
            "tflops": budget,
            "bandwidth_mbps": budget,
            "latency_ms": budget | st.just(0),
            "num_cpus": st.floats(0, 8),
            "num_gpus": st.floats(0, 1),
            "node": st.none() | text,
            "resources": st.dictionaries(st.sampled_from(["clinic", "x y", "1"]), st.floats(0.0001, 9)),
            "labels": st.dictionaries(st.sampled_from(["site", "ray.io/region"]), st.sampled_from(["a", "on", "1e-3"])),
            "late": st.booleans(),
            "data": st.none() | paths,
            "model": st.none() | paths,
        },
    ),
    min_size=1,
    max_size=3,
)
partition = (
    st.just("iid") | st.fixed_dictionaries({"dirichlet": positive}) | st.fixed_dictionaries({"unequal": positive})
)
jobs = st.fixed_dictionaries(
    {},
    optional={
        "model": paths,
        "base": st.sampled_from(["fp32", "bf16", "int8", "nf4"]),
        "dtype": st.sampled_from(["auto", "fp32", "bf16", "fp64"]),
        "data": st.fixed_dictionaries(
            {"partition": partition},
            optional={"source": paths, "separator": st.none() | st.text(max_size=5), "limit": st.integers(1, 99)},
        ),
        "rounds": st.integers(1, 100),
        "lr": positive,
        "optimizer": st.sampled_from(["adamw", "sgd"]),
        "clip": st.none() | positive,
        "dropout": st.floats(0, 0.99),
        "targets": st.just("all-linear") | st.lists(text, min_size=1, max_size=3),
        "rank_set": st.sets(st.integers(1, 64), min_size=1).map(sorted),
        "seed": st.integers(0, 2**32 - 1),
        "residual": st.fixed_dictionaries({"max_rank": st.integers(1, 999) | st.just("full")}),
    },
)
policies = st.fixed_dictionaries(
    {},
    optional={
        "description": st.text(max_size=20),
        "split": st.sampled_from(["planned", "uniform"]) | st.integers(0, 40),
        "ranks": st.sampled_from(["importance", "uniform"]) | st.integers(1, 64),
        "reinit": st.sampled_from(["random", "svd"]),
        "moments": st.sampled_from(["drop", "keep", "fit"]),
        "init": st.sampled_from(["shared", "independent"]),
    },
)


@given(groups, jobs, policies)
def test_a_saved_configuration_is_read_back_equal(
    groups: list[dict[str, Any]], job: dict[str, Any], policy: dict[str, Any]
) -> None:
    named = [{"name": f"g{index}", **group} for index, group in enumerate(groups)]
    with tempfile.TemporaryDirectory() as directory:
        cluster, policy_file, saved = (Path(directory) / name for name in ("c.yaml", "p.yaml", "config.yaml"))
        cluster.write_text(to_yaml({"clients": named, "job": job}), encoding="utf-8")
        policy_file.write_text(to_yaml({"name": "p", **policy}), encoding="utf-8")
        config = load_run_config(cluster, policy_file)
        config.save(saved)
        assert RunConfig.load(saved) == config
    assert len(config.clients) == sum(group.get("count", 1) for group in groups)
    assert config.job.model_dump(exclude_unset=True, include={"lr", "seed", "model"}) == {
        key: job[key] for key in ("lr", "seed", "model") if key in job
    }
