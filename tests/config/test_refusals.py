"""Every wrong input is one line that names the file, the key, and what would be right."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hsplit.config import RunConfig, load_run_config
from hsplit.errors import InputError

CLIENT = "{name: a, memory_gb: 1}"


def cluster(*clients: str, job: str = "{}", server: str = "{}") -> str:
    listed = "".join(f"  - {client}\n" for client in clients)
    return f"server: {server}\nclients:\n{listed}job: {job}\n"


def client(**fields: str) -> str:
    return "{" + ", ".join(f"{key}: {value}" for key, value in {"name": "a", "memory_gb": "1", **fields}.items()) + "}"


def refused(path: str, policy: str | None = None, overrides: Any = ()) -> str:
    with pytest.raises(InputError) as caught:
        load_run_config(path, policy, overrides)
    text = str(caught.value)
    assert "\n" not in text
    assert caught.value.exit_code == 2
    return text


GROUPS = [
    # no clients
    ("server: {}\n", "clients: is required"),
    ("clients: []\n", "clients: must have at least 1 entry (got [])"),
    ("clients:\n", "clients: must be a list (got null)"),
    ("clients: {name: a}\n", "clients: must be a list (got {'name': 'a'})"),
    ("clients: [3]\n", "clients[0]: must be a mapping of keys (got 3)"),
    # budgets
    (cluster("{name: a}"), "clients[0].memory_gb: is required"),
    (cluster(CLIENT, "{name: b, memory_gb: -1}"), "clients[1].memory_gb: must be greater than 0 (got -1)"),
    (cluster(client(memory_gb="0")), "clients[0].memory_gb: must be greater than 0 (got 0)"),
    (cluster(client(tflops="0")), "clients[0].tflops: must be greater than 0 (got 0)"),
    (cluster(client(bandwidth_mbps="-5")), "clients[0].bandwidth_mbps: must be greater than 0 (got -5)"),
    (cluster(client(latency_ms="-0.5")), "clients[0].latency_ms: must be at least 0 (got -0.5)"),
    (cluster(client(memory_gb="1e10")), "clients[0].memory_gb: must be at most 1e+09 (got 1e+10)"),
    *(
        (
            cluster(client(memory_gb=value)),
            "clients[0].memory_gb: must be a finite number, or a distribution such as {uniform: [5, 20]}"
            f" (got {shown})",
        )
        for value, shown in [
            (".nan", "nan"),
            (".inf", "inf"),
            ("1e999", "inf"),
            ("'8'", "'8'"),
            ("8GB", "'8GB'"),
            ("true", "true"),
            ("null", "null"),
            ("[1]", "[1]"),
        ]
    ),
    (cluster(client(num_gpus="-0.1")), "clients[0].num_gpus: must be at least 0 (got -0.1)"),
    (cluster(client(num_gpus="2")), "clients[0].num_gpus: must be at most 1 (got 2)"),
    (cluster(client(num_cpus="-1")), "clients[0].num_cpus: must be at least 0 (got -1)"),
    (cluster(client(num_cpus="yes")), "clients[0].num_cpus: must be a number (got true)"),
    (cluster(client(count="0")), "clients[0].count: must be at least 1 (got 0)"),
    (cluster(client(count="1.5")), "clients[0].count: must be a whole number (got 1.5)"),
    (cluster(client(count="true")), "clients[0].count: must be a whole number (got true)"),
    (cluster(client(count="1_000_000")), "clients[0].count: must be at most 200000 (got 1000000)"),
    (cluster(client(node="''")), "clients[0].node: must not be empty (got '')"),
    (cluster(client(late="'yes'")), "clients[0].late: must be true or false (got 'yes')"),
    (
        cluster(client(late="true"), job="{transport: gloo}"),
        "clients[0].late: nobody can come later with job.transport 'gloo': leave it out, or set that to 'store'",
    ),
    (cluster(client(resources="[clinic]")), "clients[0].resources: must be a mapping of keys (got ['clinic'])"),
    (cluster(client(resources="{clinic: 0}")), "clients[0].resources.clinic: must be at least 0.0001 (got 0)"),
    (cluster(client(resources="{clinic: one}")), "clients[0].resources.clinic: must be a number (got 'one')"),
    (cluster(client(resources="{GPU: 1}")), "clients[0].resources.GPU: has a key of its own: num_gpus"),
    (
        cluster(CLIENT, server="{resources: {memory: 1}}"),
        "server.resources.memory: must be the name of a custom resource, as given to `ray start --resources`",
    ),
    (cluster(client(labels="{gpu: 4090}")), "clients[0].labels.gpu: must be text (got 4090)"),
    (
        cluster(client(labels="{site: '!ward'}")),
        "clients[0].labels.site: must be 1 to 63 letters, digits, '.', '_' or '-', the first and the last a letter or"
        " digit (got '!ward')",
    ),
    (
        cluster(CLIENT, server="{labels: {'a b': c}}"),
        "server.labels: a label's key must be 1 to 63 letters, digits, '.', '_' or '-', the first and the last a letter"
        " or digit, such as site or ray.io/region (got 'a b')",
    ),
    (cluster(CLIENT, server="{late: true}"), "server.late: unknown key (did you mean 'labels'?)"),
    (cluster(client(data="3")), "clients[0].data: must be text (got 3)"),
    (cluster(CLIENT, server="{memory_gb: 0}"), "server.memory_gb: must be greater than 0 (got 0)"),
    (cluster(CLIENT, server="{tflops: .nan}"), "server.tflops: must be a finite number (got nan)"),
    (cluster(CLIENT, server="{num_gpus: -1}"), "server.num_gpus: must be at least 0 (got -1)"),
    (
        cluster(CLIENT, server="{num_gpus: 1.5}"),
        "server.num_gpus: must be a share of one GPU, or a whole number of them (got 1.5)",
    ),
    (cluster(CLIENT, server="5"), "server: must be a mapping of keys (got 5)"),
    # changes of budget
    (
        cluster(client(schedule="[{round: 1, memory_gb: 1}]")),
        "clients[0].schedule[0].round: must be at least 2 (got 1)",
    ),
    (cluster(client(schedule="[{memory_gb: 1}]")), "clients[0].schedule[0].round: is required"),
    (
        cluster(client(schedule="[{round: 2}]")),
        "clients[0].schedule[0]: must change at least one of: memory_gb, tflops, bandwidth_mbps, latency_ms",
    ),
    (
        cluster(client(schedule="[{round: 2, memory_gb: 0}]")),
        "clients[0].schedule[0].memory_gb: must be greater than 0 (got 0)",
    ),
    (
        cluster(client(schedule="[{round: 3, tflops: 1}, {round: 2, tflops: 2}]")),
        "clients[0].schedule: must be in the order of its rounds, each once (got 3, then 2)",
    ),
    (
        cluster(CLIENT, server="{schedule: [{round: 2, latency_ms: 1}]}"),
        "server.schedule[0].latency_ms: the server's budget has no such part (it has memory_gb, tflops)",
    ),
    # distributions
    (
        cluster(client(memory_gb="{uniform: [20, 5]}")),
        "clients[0].memory_gb.uniform: must be [lowest, highest] (got [20.0, 5.0])",
    ),
    (
        cluster(client(memory_gb="{uniform: [-1, 5]}")),
        "clients[0].memory_gb: every value drawn must be greater than 0 (got -1)",
    ),
    (
        cluster(client(memory_gb="{choice: [1, 0]}")),
        "clients[0].memory_gb: every value drawn must be greater than 0 (got 0)",
    ),
    (
        cluster(client(latency_ms="{uniform: [-1, 5]}")),
        "clients[0].latency_ms: every value drawn must be at least 0 (got -1)",
    ),
    (
        cluster(client(memory_gb="{uniform: [1, '5']}")),
        "clients[0].memory_gb.uniform[1]: must be a number (got '5')",
    ),
    (cluster(client(memory_gb="{uniform: [1]}")), "clients[0].memory_gb.uniform[1]: is required"),
    (
        cluster(client(memory_gb="{choice: []}")),
        "clients[0].memory_gb.choice: must have at least 1 entry (got [])",
    ),
    (
        cluster(client(tflops="{lognormal: [1, -0.5]}")),
        "clients[0].tflops.lognormal: must be [mean, coefficient of variation] with a mean above 0 and a"
        " coefficient from 0 to 100 (got [1.0, -0.5])",
    ),
    (
        cluster(client(tflops="{lognormal: [.inf, 1]}")),
        "clients[0].tflops.lognormal[0]: must be a finite number (got inf)",
    ),
    (
        cluster(client(tflops="{unifrom: [1, 2]}")),
        "clients[0].tflops.unifrom: unknown key (did you mean 'uniform'?)",
    ),
    (
        cluster(client(tflops="{}")),
        "clients[0].tflops: must have exactly one of: uniform, lognormal, choice (got {})",
    ),
    # names
    *(
        (
            cluster(client(name=f"'{name}'")),
            "clients[0].name: must be 1 to 64 letters, digits, '.', '_' or '-', the first a letter or digit,"
            f" without '..' (got '{name}')",
        )
        for name in ["", "-a", ".hidden", "a/b", "a..b", "a b", "é"]
    ),
    (cluster(client(name='"a\\n"')), "clients[0].name: must be 1 to 64 letters"),
    (cluster(client(name="a" * 65)), "clients[0].name: must be 1 to 64 letters"),
    (cluster(client(name="3")), "clients[0].name: must be text (got 3)"),
    (cluster(client(name="a" * 63, count="2")), "clients[0].name: is too long for its count"),
    *(
        (
            cluster(client(name=name)),
            f"clients[0].name: '{name}' is reserved (so are central, driver, scheduler, server, server-1 and so"
            " on); choose another name",
        )
        for name in ["server", "scheduler", "driver", "central", "server-1", "server-23"]
    ),
    (
        cluster(client(name="phone-1"), client(name="phone", count="2")),
        "clients[1].name: 'phone-1' is also a name of clients[0] ('phone-1', count 1);"
        " give every client a name of its own",
    ),
    (
        cluster(client(name="phone", count="3"), CLIENT, client(name="phone-2")),
        "clients[2].name: 'phone-2' is also a name of clients[0] ('phone', count 3)",
    ),
    (cluster(CLIENT, CLIENT), "clients[1].name: 'a' is also a name of clients[0] ('a', count 1)"),
    # unknown keys
    ("clint: []\n", "clint: unknown key (did you mean 'clients'?)"),
    ("zzz: 1\nclients: []\n", "zzz: unknown key (allowed: clients, job, policy, server)"),
    (
        f"clients: [{CLIENT}]\npolicy: {{}}\n",
        "policy: unknown key (a policy is a file of its own, given with --policy)",
    ),
    (cluster(client(memory="3")), "clients[0].memory: unknown key (did you mean 'memory_gb'?)"),
    (cluster(client(kind="b")), "clients[0].kind: unknown key"),
    (cluster(CLIENT, server="{name: s}"), "server.name: unknown key"),
]

JOBS = [
    ("{rounds: 0}", "rounds: must be at least 1 (got 0)"),
    ("{rounds: '3'}", "rounds: must be a whole number (got '3')"),
    ("{rounds: 3.0}", "rounds: must be a whole number (got 3.0)"),
    ("{rounds: true}", "rounds: must be a whole number (got true)"),
    ("{rounds: 9_999_999_999}", "rounds: must be at most 1e+09 (got 9999999999)"),
    ("{rouns: 3}", "rouns: unknown key (did you mean 'rounds'?)"),
    ("{local_steps: -1}", "local_steps: must be at least 1 (got -1)"),
    ("{batch_size: 0}", "batch_size: must be at least 1 (got 0)"),
    ("{max_length: 1}", "max_length: must be at least 2 (got 1)"),
    ("{grad_accumulation: 0}", "grad_accumulation: must be at least 1 (got 0)"),
    ("{lr: 0}", "lr: must be greater than 0 (got 0)"),
    ("{lr: .inf}", "lr: must be a finite number (got inf)"),
    ("{lr: true}", "lr: must be a number (got true)"),
    ("{schedule: cosin}", "schedule: must be 'constant', 'linear' or 'cosine' (got 'cosin')"),
    (
        "{optimizer: adam}",
        "optimizer: must be 'adamw', 'adamw8bit', 'paged_adamw', 'paged_adamw8bit' or 'sgd' (got 'adam')",
    ),
    (
        "{optimizer: adamw8bit, dtype: fp64}",
        "optimizer: must be 'adamw' or 'sgd' with dtype 'fp64' (got 'adamw8bit', which steps in fp32)",
    ),
    (
        "{optimizer: paged_adamw}",
        "optimizer: 'paged_adamw' pages moments out of a GPU, and 'a' trains without one (num_gpus 0, or --cpu): give"
        " it one, or choose 'adamw' or 'adamw8bit'",
    ),
    ("{base: fp16}", "base: must be 'fp32', 'bf16', 'int8' or 'nf4' (got 'fp16')"),
    ("{dtype: fp16}", "dtype: must be 'auto', 'fp32', 'bf16' or 'fp64' (got 'fp16')"),
    ("{wire: int3}", "wire: must be 'fp32', 'bf16', 'int8', 'int4' or 'fp64' (got 'int3')"),
    ("{batch_size: 2, pipeline: {microbatches: 3}}", "pipeline.microbatches: must be at most batch_size = 2 (got 3)"),
    ("{clock: virtual}", "clock: must be 'real' or 'emulated' (got 'virtual')"),
    ("{model: ''}", "model: must not be empty (got '')"),
    ('{model: "\\ud800"}', "model: must be valid Unicode text (got '\\ud800')"),
    ("{warmup: -1}", "warmup: must be at least 0 (got -1)"),
    (
        "{rounds: 2, local_steps: 5, warmup: 11}",
        "warmup: must be at most rounds * local_steps = 10 steps (got 11)",
    ),
    ("{clip: 0}", "clip: must be greater than 0 (got 0)"),
    ("{weight_decay: -0.1}", "weight_decay: must be at least 0 (got -0.1)"),
    ("{alpha: 0}", "alpha: must be greater than 0 (got 0)"),
    ("{dropout: 1}", "dropout: must be less than 1 (got 1)"),
    ("{dropout: -0.1}", "dropout: must be at least 0 (got -0.1)"),
    *(
        (
            f"{{targets: {value}}}",
            f"targets: must be 'all-linear' or a list of at least one module name (got {shown})",
        )
        for value, shown in [
            ("[]", "[]"),
            ("q_proj", "'q_proj'"),
            ("[1]", "[1]"),
            ("['']", "['']"),
            ("3", "3"),
        ]
    ),
    ("{rank_set: []}", "rank_set: must have at least 1 entry (got [])"),
    ("{rank_set: 8}", "rank_set: must be a list (got 8)"),
    ("{rank_set: [0, 1]}", "rank_set[0]: must be at least 1 (got 0)"),
    ("{rank_set: [1, true]}", "rank_set[1]: must be a whole number (got true)"),
    ("{rank_set: [2, 1]}", "rank_set: must be increasing ranks, each once (got [2, 1])"),
    ("{rank_set: [1, 2, 2]}", "rank_set: must be increasing ranks, each once (got [1, 2, 2])"),
    ("{seed: -1}", "seed: must be at least 0 (got -1)"),
    ("{keep_checkpoints: 0}", "keep_checkpoints: must be at least 1 (got 0)"),
    ("{validation: {share: 0}}", "validation.share: must be greater than 0 (got 0)"),
    ("{validation: {share: 1}}", "validation.share: must be less than 1 (got 1)"),
    ("{validation: {max_examples: 0}}", "validation.max_examples: must be at least 1 (got 0)"),
    ("{validation: 0.1}", "validation: must be a mapping of keys (got 0.1)"),
    ("{privacy: {labels: both}}", "privacy.labels: must be 'server' or 'client' (got 'both')"),
    ("{privacy: {noise: -1}}", "privacy.noise: must be at least 0 (got -1)"),
    ("{privacy: {noise_clip: 0}}", "privacy.noise_clip: must be greater than 0 (got 0)"),
    *(
        (
            f"{{residual: {{max_rank: {value}}}}}",
            "residual.max_rank: must be a whole number of at least 1, or 'full'",
        )
        for value in ["0", "all", "1.5", "true", "null"]
    ),
    ("{data: restaurants}", "data: must be a mapping of keys (got 'restaurants')"),
    ("{data: {examples: 0}}", "data.examples: must be at least 1 (got 0)"),
    ("{data: {limit: 0}}", "data.limit: must be at least 1 (got 0)"),
    (
        "{data: {partition: even}}",
        "data.partition: must be 'iid', 'label', 'length', {dirichlet: ALPHA}, {unequal: SIGMA} or {shares: [...]} (got"
        " 'even')",
    ),
    ("{data: {partition: {dirichlet: 0}}}", "data.partition.dirichlet: must be greater than 0 (got 0)"),
    ("{data: {partition: {unequal: '1'}}}", "data.partition.unequal: must be a number (got '1')"),
    (
        "{data: {partition: {dirichelt: 1}}}",
        "data.partition.dirichelt: unknown key (did you mean 'dirichlet'?)",
    ),
    (
        "{data: {partition: {dirichlet: 1, unequal: 1}}}",
        "data.partition: must have exactly one of: dirichlet, unequal, shares",
    ),
    ("{data: {partition: {shares: []}}}", "data.partition.shares: must have at least 1 entry (got [])"),
    ("{data: {partition: {shares: [1, 0]}}}", "data.partition.shares[1]: must be greater than 0 (got 0)"),
    (
        "{data: {partition: {shares: [1, 2]}}}",
        "data.partition.shares: must have one entry for each of the 1 clients without data of their own (got 2)",
    ),
]

POLICIES = [
    ("{placement: here}", "placement: must be 'split', 'full' or 'single' (got 'here')"),
    *(
        (
            f"{{split: {value}}}",
            "split: must be 'planned', 'uniform', a number of layers from 0, or package.module:name",
        )
        for value in ["-1", "deep", "true", "1.5", "null", "'my_rules:'", "'a b:c'", "'a:b:c'"]
    ),
    *(
        (f"{{ranks: {value}}}", "ranks: must be 'importance', 'budget', 'uniform', a rank of at least 1, or")
        for value in ["0", "budgets", "false"]
    ),
    (
        "{aggregation: mean}",
        "aggregation: must be 'concat', 'fedavg', 'hetlora', 'flexlora', 'raflora', 'florist', 'fedplora', 'none', or "
        "pack",
    ),
    ("{reinit: zero}", "reinit: must be 'random', 'svd' or 'mean' (got 'zero')"),
    ("{moments: false}", "moments: must be 'drop', 'keep' or 'fit' (got false)"),
    ("{init: same}", "init: must be 'shared' or 'independent' (got 'same')"),
    ("{name: a/b}", "name: must be 1 to 64 letters"),
    ('{description: "\\ud800"}', "description: must be valid Unicode text (got '\\ud800')"),
    ("{rank: 3}", "rank: unknown key (did you mean 'ranks'?)"),
    (
        "{importance: {metric: magic}}",
        "importance.metric: must be 'rngwp', 'spectral', 'equal', or package.module:name (got 'magic')",
    ),
    ("{importance: {tokens: 0}}", "importance.tokens: must be at least 1 (got 0)"),
    ("{importance: {lam_0: 1.5}}", "importance.lam_0: must be at most 1 (got 1.5)"),
    ("{replan: {tau: -1}}", "replan.tau: must be a number from 0 to 2, or null (got -1)"),
    ("{replan: {tau: never}}", "replan.tau: must be a number from 0 to 2, or null (got 'never')"),
    ("{replan: {min_rounds: 0}}", "replan.min_rounds: must be at least 1 (got 0)"),
    (
        "{aggregation: fedavg}",
        "aggregation: fedavg averages factors of equal shape, so it needs one rank for all: set ranks to"
        " 'uniform' or a number, or aggregation to 'concat' (got ranks 'importance')",
    ),
]

OVERRIDES = [
    ("rounds=0", "--set rounds: must be at least 1 (got 0)"),
    ("job.rounds=0", "--set job.rounds: must be at least 1 (got 0)"),
    ("rounds=", "--set rounds: must be a whole number (got null)"),
    ("rounds", "--set 'rounds': must be KEY=VALUE, such as job.rounds=3"),
    ("rounds.x=1", "--set rounds.x: job.rounds: must be a whole number (got {'x': 1})"),
    ("rond=3", "--set rond: unknown key (did you mean 'rounds'?)"),
    ("job.rond=3", "--set job.rond: unknown key (did you mean 'rounds'?)"),
    ("qqq=3", "--set qqq: unknown key (allowed: accept_licence, alpha, base, "),
    ("reinit=svd", "--set reinit: unknown key (did you mean 'policy.reinit'?)"),
    ("memory_gb=1", "--set memory_gb: unknown key (did you mean 'server.memory_gb'?)"),
    ("policy.reinit=x", "--set policy.reinit: must be 'random', 'svd' or 'mean' (got 'x')"),
    ("policy.aggregation=fedavg", "--set policy.aggregation: fedavg averages factors of equal shape"),
    ("server.memory_gb=-1", "--set server.memory_gb: must be greater than 0 (got -1)"),
    ("server.memory=1", "--set server.memory: unknown key (did you mean 'memory_gb'?)"),
    ("clients.a.memory_gb=-1", "--set clients.a.memory_gb: must be greater than 0 (got -1)"),
    ("clients.a.name=server", "--set clients.a.name: 'server' is reserved"),
    (
        "clients.ax.memory_gb=1",
        "--set clients.ax.memory_gb: must be clients.NAME.KEY with the name of a group",
    ),
    ("clients.a=1", "--set clients.a: must be clients.NAME.KEY with the name of a group"),
    ("clients=[]", "--set clients: must have at least 1 entry (got [])"),
    ("job..rounds=1", "--set job..rounds: must be keys joined by single dots"),
    ("=1", "--set : must be keys joined by single dots"),
    ("data={source: x, limt: 3}", "--set data: limt: unknown key (did you mean 'limit'?)"),
    ("data=[", "--set data:1: not valid YAML: "),
    ("data={a: 1, a: 2}", "--set data:1: not valid YAML: key 'a' is repeated"),
    ("warmup=61", "--set warmup: must be at most rounds * local_steps = 60 steps (got 61)"),
    ("model=\udcff", "--set model:1: not valid YAML: character '\\udcff' is not allowed"),
]


@pytest.mark.parametrize(("text", "line"), GROUPS)
def test_wrong_cluster(write: Any, text: str, line: str) -> None:
    assert refused(write("c.yaml", text)).startswith(f"c.yaml: {line}")


@pytest.mark.parametrize(("job", "line"), JOBS)
def test_wrong_job(write: Any, job: str, line: str) -> None:
    assert refused(write("c.yaml", cluster(CLIENT, job=job))).startswith(f"c.yaml: job.{line}")


@pytest.mark.parametrize(("policy", "line"), POLICIES)
def test_wrong_policy(write: Any, policy: str, line: str) -> None:
    text = refused(write("c.yaml", cluster(CLIENT)), write("p.yaml", policy))
    assert text.startswith(f"p.yaml: {line}")


@pytest.mark.parametrize(("override", "line"), OVERRIDES)
def test_wrong_override(write: Any, override: str, line: str) -> None:
    assert refused(write("c.yaml", cluster(CLIENT)), overrides=[override]).startswith(line)


def test_wrong_override_in_a_mapping(write: Any) -> None:
    path = write("c.yaml", cluster(CLIENT))
    assert refused(path, overrides={"lr": "fast"}) == "--set lr: must be a number (got 'fast')"
    assert refused(path, overrides={3: 1}) == "overrides: a key must be text (got 3)"
    assert (
        refused(path, overrides={"seed": 10**5000})
        == "--set seed: must be at most 4.29497e+09 (got a int too large to show)"
    )


def test_the_override_that_breaks_another_key_is_the_one_named(write: Any) -> None:
    path = write("c.yaml", cluster(CLIENT, job="{warmup: 50}"))
    text = refused(path, overrides=["seed=1", "rounds=2", "lr=0.1"])
    assert text == "--set rounds: job.warmup: must be at most rounds * local_steps = 20 steps (got 50)"


def test_a_wrong_file_is_named_even_with_overrides(write: Any) -> None:
    path = write("c.yaml", cluster(CLIENT, job="{lr: -1}"))
    assert refused(path, overrides=["seed=1"]) == "c.yaml: job.lr: must be greater than 0 (got -1)"
    assert load_run_config(path, overrides=["lr=0.1"]).job.lr == 0.1


def test_the_override_is_named_even_when_the_file_was_wrong_elsewhere(write: Any) -> None:
    path = write("c.yaml", cluster(CLIENT, job="{lr: -1}"))
    assert refused(path, overrides=["rounds=0", "lr=0.1"]) == "--set rounds: must be at least 1 (got 0)"


def test_gpus_are_asked_for_where_something_runs_on_them(write: Any) -> None:
    with_gpus = client(num_gpus="0.5")
    many = write("many.yaml", cluster(with_gpus, server="{num_gpus: 2}"))
    assert load_run_config(many).server.num_gpus == 2
    for policy, placement in (("hetlora", "full"), ("cenlora", "single")):
        assert refused(many, policy) == (
            f"many.yaml: server.num_gpus: must be at most 1 with placement '{placement}', which leaves the server no"
            " layers to spread over several (got 2)"
        )


def test_a_paged_optimizer_needs_a_gpu_wherever_adapters_are_trained(write: Any) -> None:
    paged = "job.optimizer=paged_adamw8bit"
    none, clients, server, all_ = (
        write(f"{name}.yaml", cluster(client(num_gpus=there), server=f"{{num_gpus: {at_server}}}"))
        for name, there, at_server in (("none", "0", 0), ("clients", "0.5", 0), ("server", "0", 1), ("all", "0.5", 1))
    )
    for path, policy, who in (
        (none, None, "a"),
        (clients, None, "server"),
        (server, None, "a"),
        (none, "hetlora", "a"),
        (clients, "cenlora", "server"),
    ):
        assert refused(path, policy, [paged]) == (
            f"--set job.optimizer: 'paged_adamw8bit' pages moments out of a GPU, and '{who}' trains without one"
            " (num_gpus 0, or --cpu): give it one, or choose 'adamw' or 'adamw8bit'"
        )
    # Where it does not train it needs none.
    for path, policy in ((all_, None), (clients, "hetlora"), (server, "cenlora")):
        assert load_run_config(path, policy, [paged]).job.optimizer == "paged_adamw8bit"
    # --cpu removes the file's GPU; the override of the paged optimizer is named, even if others follow.
    with pytest.raises(InputError, match=r"--set job\.optimizer: .* 'a' trains without one \(num_gpus 0, or --cpu\)"):
        load_run_config(all_, None, [paged, "rounds=3"], cpu=True)
    assert load_run_config(none, None, ["optimizer=adamw8bit"]).job.optimizer == "adamw8bit"


def test_8_bit_optimizers_are_for_adapters(write: Any) -> None:
    path = write("c.yaml", cluster(CLIENT))
    assert refused(path, "ft", ["optimizer=adamw8bit"]) == (
        "--set optimizer: must be 'adamw' or 'sgd', since this policy trains every weight (got 'adamw8bit', which is"
        " for adapters)"
    )


def test_several_errors_are_counted(write: Any) -> None:
    path = write("c.yaml", cluster("{name: a, memory_gb: -1, count: 0}", job="{rounds: 0}"))
    assert refused(path) == "c.yaml: clients[0].count: must be at least 1 (got 0) (and 2 more)"


def test_a_wrong_saved_configuration_is_refused(write: Any) -> None:
    for text, line in [
        ("clients: [{name: a, memory_gb: 1}]", "clients[0].tflops: is required (and 1 more)"),
        (
            "clients:\n" + 2 * "  - {name: a, kind: a, memory_gb: 1, tflops: 1}\n",
            "clients[1].name: 'a' is also the name of clients[0]",
        ),
    ]:
        with pytest.raises(InputError) as caught:
            RunConfig.load(write("config.yaml", text))
        assert str(caught.value) == f"config.yaml: {line}"


def test_importing_the_configuration_imports_nothing_heavy() -> None:
    heavy = {"torch", "ray", "transformers", "numpy", "pandas"}
    code = f"import sys, hsplit.config; print(*{heavy} & set(sys.modules))"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
