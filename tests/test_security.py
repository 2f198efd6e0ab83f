"""The code as a whole unpickles, evaluates and runs no content of files."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hsplit.cluster.fork_server import ForkServer
from hsplit.config import load_run_config
from hsplit.errors import HsplitError, InputError
from hsplit.extension import find_part

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*(ROOT / "hsplit").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")])

# Ways to have a file or a text run as a program. A name of several parts is the end of what is called.
BUILT_IN = {"eval", "exec", "compile"}
RUN_CODE = {
    *("os.system", "os.popen", "pickle.load", "pickle.loads", "pickle.Unpickler"),
    *("cloudpickle.load", "cloudpickle.loads", "dill.load", "dill.loads", "marshal.load", "marshal.loads"),
    *("shelve.open", "joblib.load", "torch.load", "torch.hub.load", "np.load", "numpy.load", "pd.read_pickle"),
    *("pandas.read_pickle", "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load"),
    *("load_module", "run_module", "tarfile.open", "shutil.unpack_archive", "extractall"),
}
# Arguments that make an otherwise harmless call run code, and the value that they must have.
SAFE_VALUES = {"shell": False, "allow_pickle": False, "trust_remote_code": False, "weights_only": True}
# transformers' readers of a directory, which ask on the terminal whether to run code, without trust_remote_code=False.
READERS = {"from_pretrained", "from_config"}
UNASKED = {("hsplit/evaluation/targets.py", "PeftModel.from_pretrained")}


def _called(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_called(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def _unsafe(tree: ast.AST, file: str) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            if {module.partition(".")[0] for module in modules} & {"pickle", "marshal", "dill", "joblib", "shelve"}:
                yield f"{file}:{node.lineno} imports {modules}"
        if not isinstance(node, ast.Call):
            continue
        called = _called(node.func)
        if any(f".{called}".endswith(f".{name}") for name in RUN_CODE - BUILT_IN) or called in BUILT_IN:
            yield f"{file}:{node.lineno} calls {called}"
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        for name, value in given.items():
            if name in SAFE_VALUES and not (isinstance(value, ast.Constant) and value.value is SAFE_VALUES[name]):
                yield f"{file}:{node.lineno} gives {called} another {name} than {SAFE_VALUES[name]}"
        reads = called.rpartition(".")[2] in READERS and (file, called) not in UNASKED
        if reads and "trust_remote_code" not in given:
            yield f"{file}:{node.lineno} calls {called} without trust_remote_code=False"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_runs_what_a_file_says(path: Path) -> None:
    assert list(_unsafe(ast.parse(path.read_text()), str(path.relative_to(ROOT)))) == []


@pytest.mark.parametrize(
    "code",
    [
        *("import pickle", "from pickle import loads", "torch.load(f)", "yaml.load(t)", "x = eval(t)", "os.system(t)"),
        *("np.load(f, allow_pickle=True)", "subprocess.run(c, shell=True)", "AutoConfig.from_pretrained(d)"),
        *("AutoConfig.from_pretrained(d, trust_remote_code=told)", "ray.cloudpickle.loads(b)", "a.extractall()"),
    ],
)
def test_the_scan_finds_what_it_looks_for(code: str) -> None:
    assert list(_unsafe(ast.parse(code), "x.py"))


# -- code of the user's own ---------------------------------------------------------------------------------------


NO_REFERENCE = (
    *("hsplit.errors:__loader__", "hsplit.errors:InputError.__init__", "__main__:x", "hsplit._x:y", "a.b", ":x", "x:"),
    *("a..b:c", "../x:y", "/abs/x:y", "x-y:z", "a:b:c", "a: b", "a:b()", "ａ:b", "a:b\n", "a\0:b", ""),
)


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("os:system", "the module os is Python's own"),
        ("os.path:join", "the module os.path is Python's own"),
        ("builtins:eval", "the module builtins is Python's own"),
        ("subprocess:run", "the module subprocess is Python's own"),
        ("antigravity:x", "the module antigravity is Python's own"),
        ("hsplit.nowhere:x", "no module named 'hsplit.nowhere'"),
        *((word, r"must be one of concat, or package\.module:name") for word in NO_REFERENCE),
    ],
)
def test_a_word_that_is_no_rule_of_the_users_loads_nothing(word: str, reason: str) -> None:
    before = set(sys.modules)
    with pytest.raises(InputError, match=rf"^policy: aggregation: .*{reason}"):
        find_part(word, {"concat": len}, "policy: aggregation")
    assert not {"antigravity", "this"} & (set(sys.modules) - before)


def test_a_file_in_the_working_directory_is_not_loaded(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    (tmp_path / "lurking.py").write_text(f"open({str(ran)!r}, 'w')\ndef rule(*_): ...\n")
    (tmp_path / "mine.yaml").write_text("aggregation: lurking:rule\n")
    (tmp_path / "cluster.yaml").write_text("clients: [{name: a, memory_gb: 1}]\njob: {model: ./none}\n")
    code = (
        "from hsplit.lora.aggregation import find_aggregation; from hsplit.config import load_run_config;"
        "find_aggregation(load_run_config('cluster.yaml', 'mine.yaml').policy.aggregation)"
    )
    # As for the console command: without the working directory in the path.
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "InputError: policy: aggregation: lurking:rule: no module named 'lurking'" in done.stderr
    assert not ran.exists()


def test_workers_are_forked_from_a_process_that_imports_nothing_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = tmp_path / "ran"
    for name in ("lurking", "json", "torch"):
        (tmp_path / f"{name}.py").write_text(f"open({str(ran)!r}, 'w')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    with ForkServer(modules=["json", "lurking"]) as server:
        # It ends because there is no such module.
        assert server._process.wait(timeout=60) == 1
    assert not ran.exists()


def test_the_modules_of_the_process_that_starts_it_are_the_fork_server_s_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lurking.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nimport os; os._exit(7)\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    with ForkServer(modules=["lurking"]) as server:
        assert server._process.wait(timeout=60) == 7


# -- messages -----------------------------------------------------------------------------------------------------


def test_no_message_breaks_its_line_or_steers_a_terminal() -> None:
    assert str(InputError("a\x1b[2Jb\r\nc\u202ed\ud800")) == "a [2Jb  c d "
    assert len(str(HsplitError("x" * 10**6))) == 4000


def test_an_error_on_the_terminal_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text('clients: [{name: "\\e[2J\\n\\u202e", memory_gb: 1}]\n')
    with pytest.raises(InputError) as caught:
        load_run_config(path)
    assert str(caught.value).isprintable()
