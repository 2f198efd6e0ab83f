"""A cluster file, policy file or override of any content is read or refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hsplit.config import RunConfig, load_run_config, preset_directory
from hsplit.config.reading import parse_yaml
from hsplit.errors import InputError
from tests.finished_run import FinishedRun
from tests.fuzz.harness import NASTY, damaged, examples, mangled, read_or_refused, tree

CLUSTER = yaml.safe_load(
    """
server: {memory_gb: 8, tflops: 20, num_cpus: 1, num_gpus: 0, replicas: 2, schedule: [{round: 3, tflops: 5}]}
clients:
  - {name: phone, count: 2, memory_gb: 0.16, tflops: 0.5, bandwidth_mbps: 50, latency_ms: 40, labels: {site: ward}}
  - {name: laptop, memory_gb: {uniform: [1, 2]}, tflops: {choice: [1, 2]}, resources: {patients: 1}, node: 10.0.0.1}
  - {name: clinic, memory_gb: {lognormal: [1, 0.5]}, data: ~/notes.csv, model: ./llama, late: true}
job:
  model: HuggingFaceTB/SmolLM2-135M-Instruct
  base: nf4
  data: {source: restaurants, examples: 30, partition: {shares: [1, 2, 3]}, label: food, test: 0.1}
  rounds: 6
  rank_set: [1, 2, 4]
  targets: [q_proj, v_proj]
  optimizer: adamw
  privacy: {labels: client}
  pipeline: {microbatches: 2}
  faults: {recovery: repeat, deadline: 3}
"""
)
POLICY = yaml.safe_load((preset_directory("policies") / "hetlora.yaml").read_text()) | {
    "importance": {"metric": "equal", "tokens": 3},
    "replan": {"tau": 0.5},
    "split": "os.path:join",
}
TOKENS = (
    *(b"&a ", b"*a", b"<<: *a\n", b"!!python/object/apply:os.system [id]", b"!!int ", b"!!binary ", b"!!set ", b"!x "),
    *(
        b"1:" * 200 + b"1",
        b"0x" + b"f" * 5000,
        b"9" * 5000,
        b"? ",
        b"- ",
        b"\t",
        b"%YAML 9.9\n",
        b"---\n",
        b"|\n",
        b'"',
    ),
    *(
        b"\xef\xbb\xbf",
        b"\xff",
        b"\0",
        b"\r",
        b"\xe2\x80\xa8",
        b"{" * 50,
        b"[" * 3000,
        b"a: " * 50,
        b".inf",
        b"2020-13-45",
    ),
)


def _yaml(document: Any) -> bytes:
    # Surrogates cannot be written, and need not be: a YAML file that has them is not UTF-8.
    return yaml.dump(document, allow_unicode=True).encode("utf-8", "replace")


CLUSTER_BYTES, POLICY_BYTES = _yaml(CLUSTER), _yaml(POLICY)


def _load(path: Path, content: bytes, *named: str, **arguments: Any) -> RunConfig | None:
    path.write_bytes(content)
    before = tree(path.parent)
    run: RunConfig | None = read_or_refused(lambda: load_run_config(**{"cluster": path, **arguments}), *named)
    assert tree(path.parent) == before
    if run is not None:
        _stays_inside(run, path.parent)
    return run


def _stays_inside(run: RunConfig, folder: Path) -> None:
    """Each holder has its own files, in the folders for such files only."""
    names = [client.name for client in run.clients]
    files = {str((folder / f"{name}.safetensors").resolve()) for name in (*names, *run.server.names)}
    assert len({file.lower() for file in files}) == len(names) + run.server.replicas
    assert all(Path(file).parent == folder.resolve() for file in files)


@examples(60)
@given(document=damaged(CLUSTER))
def test_a_damaged_cluster_file(tmp_path_factory: pytest.TempPathFactory, document: Any) -> None:
    _load(_folder(tmp_path_factory) / "mine.yaml", _yaml(document), "mine.yaml")


@examples(60)
@given(content=mangled(CLUSTER_BYTES, TOKENS) | st.binary(max_size=200))
def test_a_mangled_cluster_file(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    _load(_folder(tmp_path_factory) / "mine.yaml", content, "mine.yaml")


@examples(40)
@given(content=mangled(POLICY_BYTES, TOKENS) | damaged(POLICY).map(_yaml))
def test_a_damaged_policy_file(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    _load(_folder(tmp_path_factory) / "mine.yaml", content, "mine.yaml", cluster="hetero", policy=_path("mine.yaml"))


_folders: list[Path] = []


def _folder(factory: pytest.TempPathFactory) -> Path:
    """One folder for all inputs of this file, instead of thousands."""
    if not _folders:
        _folders.append(factory.mktemp("fuzz"))
    return _folders[0]


def _path(name: str) -> Path:
    return _folders[0] / name if _folders else Path(name)


KEYS = st.sampled_from(
    ["job.rounds", "rounds", "server.tflops", "clients.phone.count", "clients.phone", "policy.split", "clients", "job"]
) | st.text(max_size=30)
VALUES = st.text(max_size=30) | NASTY.map(str) | st.sampled_from([token.decode("latin-1") for token in TOKENS])


@examples(60)
@given(overrides=st.lists(st.builds("{}={}".format, KEYS, VALUES) | st.text(max_size=20), max_size=3))
def test_overrides(overrides: list[str]) -> None:
    read_or_refused(lambda: load_run_config("hetero", None, overrides), "--set")


@examples(40)
@given(data=st.data())
def test_a_damaged_resolved_configuration(pristine: FinishedRun, tmp_path_factory: Any, data: st.DataObject) -> None:
    whole = pristine.directory.config.read_bytes()
    content = data.draw(mangled(whole, TOKENS) | damaged(yaml.safe_load(whole)).map(_yaml))
    path = _folder(tmp_path_factory) / "config.yaml"
    path.write_bytes(content)
    run = read_or_refused(lambda: RunConfig.load(path), "config.yaml")
    if run is not None:
        _stays_inside(run, path.parent)


def _bomb(levels: int) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    "text",
    [
        _bomb(30),
        "a: " + "[" * 100_000,
        "a: " + "{b: " * 100_000,
        "- " * 100_000,
        "a: " + "1:" * 1_000_000 + "1",
        "a: 0x" + "f" * 1_000_000,
        "a: " + "9" * 1_000_000,
        "a: " + "1" * 1_000_000 + ".5",
        "a: !!binary " + "=" * 100_000,
        "&a a: *a",
        "x" * 1_000_000 + ": 1",
        "clients: [" + "{name: a, memory_gb: 1}, " * 30_000,
    ],
    ids=lambda text: text[:12],
)
def test_documents_made_to_take_for_ever_are_refused(text: str) -> None:
    def read() -> None:
        document = parse_yaml(text, "mine.yaml")
        raise InputError(f"mine.yaml: read as {type(document).__name__}")

    assert read_or_refused(read, "mine.yaml") is None


def test_a_file_that_never_ends_is_not_read_to_its_end(tmp_path: Path) -> None:
    read_or_refused(lambda: load_run_config("/dev/zero"), "/dev/zero")
    large = tmp_path / "large.yaml"
    large.write_text("# " + "x" * 9_000_000)
    with pytest.raises(InputError, match=r"large\.yaml: is larger than 8 MB"):
        load_run_config(large)


@pytest.mark.parametrize(
    "groups",
    [
        "{name: a, count: 1000000000, memory_gb: 1}",
        ", ".join(f"{{name: g{n}, count: 10000, memory_gb: 1}}" for n in range(5000)),
    ],
    ids=["one group", "many groups"],
)
def test_a_crowd_is_refused_at_once(tmp_path: Path, groups: str) -> None:
    path = tmp_path / "crowd.yaml"
    path.write_text(f"clients: [{groups}]")
    with pytest.raises(InputError, match=r"crowd\.yaml: clients.*must be at most 200000"):
        load_run_config(path)


@pytest.mark.parametrize(
    "name",
    [
        *("../x", "..", ".", "a/../b", "/abs", "a\\b", "a\0b", "a" * 65, "-x", "x.", "x ", " x", "a..b"),
        *("CON", "nul.txt", "Com1", "ｘ", "é", "Server", "SERVER-1", "central"),
    ],
)
def test_a_client_cannot_have_a_name_that_is_no_file_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(_yaml({"clients": [{"name": name, "memory_gb": 1}]}))
    with pytest.raises(InputError, match=r"mine\.yaml: clients\[0\]\.name: "):
        load_run_config(path)


@pytest.mark.parametrize("key", ["name", "kind"])
def test_nor_does_a_resolved_configuration_have_one(pristine: FinishedRun, tmp_path: Path, key: str) -> None:
    document = yaml.safe_load(pristine.directory.config.read_bytes())
    document["clients"][0][key] = "../x"
    (tmp_path / "config.yaml").write_bytes(_yaml(document))
    with pytest.raises(InputError, match=rf"config\.yaml: clients\[0\]\.{key}: "):
        RunConfig.load(tmp_path / "config.yaml")


def test_names_that_differ_in_case_alone_are_one_file_s_on_some_systems(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(_yaml({"clients": [{"name": "Phone", "memory_gb": 1}, {"name": "phone", "memory_gb": 1}]}))
    with pytest.raises(InputError, match=r"clients\[1\]\.name: 'phone' is also a name of clients\[0\] \('Phone'"):
        load_run_config(path)


@pytest.mark.parametrize("key", ["job.model", "job.data.source", "clients.phone.data", "clients.phone.model"])
@pytest.mark.parametrize("path", ["/a\0b.csv", "/" + "x" * 300, "/x" * 3000, "~nobody/x.csv"])
def test_a_path_that_no_file_can_have_is_refused_by_its_key(key: str, path: str) -> None:
    with pytest.raises(InputError, match=rf"--set {key}: "):
        load_run_config("hetero", None, {key: path})
