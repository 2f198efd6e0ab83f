"""Reading YAML, refusals with their line for any bytes; finding presets."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hsplit.config import find_preset, load_run_config, read_yaml, reading, to_yaml
from hsplit.config.section import Section
from hsplit.errors import InputError

DEEP = "a: " + "[" * 5000 + "]" * 5000
BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 19))
MERGE_BOMB = "a0: &a0 {k: 1}\n" + "".join(
    f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 9)
)
CHAIN = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 600)) + "clients: *a599\n"

WRONG = [
    ("a: 1\nb: 2\na: 3\n", ":3: not valid YAML: key 'a' is repeated (first on line 1)"),
    ("a:\n  - {x: 1, 'x': 2}\n", ":2: not valid YAML: key 'x' is repeated (first on line 2)"),
    ("a: [1\nb: 2\n", ":2: not valid YAML: "),
    ("a: {b: 1\n", ":2: not valid YAML: "),
    ("\ta: 1\n", ":1: not valid YAML: "),
    ("1: a\n", ":1: not valid YAML: a key must be plain text (got '1')"),
    ("{[a]: 1}\n", ":1: not valid YAML: a key must be plain text"),
    ("a: 1\n---\nb: 1\n", ":2: not valid YAML: "),
    ("a: 2024-13-45\n", ":1: not valid YAML: '2024-13-45' is no valid "),
    ("a: !!int x\n", ":1: not valid YAML: 'x' is no valid "),
    ("a: !!bool maybe\n", ":1: not valid YAML: 'maybe' is no valid "),
    ("a: !!python/object:os.system {}\n", ":1: not valid YAML: "),
    ("a: *nothing\n", ":1: not valid YAML: "),
    ("a: &a [*a]\n", ":1: not valid YAML: an alias refers to what it is part of"),
    ('a: "\\UFFFFFFFF"\n', ": not valid YAML: "),
    ("a: 1\nb: \x01\n", ":2: not valid YAML: character "),
    (DEEP, ": not valid YAML: it is nested too deeply"),
    ("a: " + "[" * 30 + "]" * 30, ":1: not valid YAML: more than 20 levels of nesting"),
    (BOMB, ":17: not valid YAML: more than 200000 values once aliases are written out"),
    (MERGE_BOMB, ":7: not valid YAML: more than 200000 values once aliases are written out"),
    ("a: " + "9" * 5000, ":1: not valid YAML: "),
    ("", ": is empty; it must hold a mapping of keys"),
    ("# nothing\n", ": is empty; it must hold a mapping of keys"),
    ("null\n", ": is empty; it must hold a mapping of keys"),
    ("- a\n", ": must hold a mapping of keys at its top (got ['a'])"),
    ("hello\n", ": must hold a mapping of keys at its top (got 'hello')"),
    ("!!set {a, b}\n", ": must hold a mapping of keys at its top (got {"),
]


@pytest.mark.parametrize(("text", "line"), WRONG)
def test_wrong_yaml(write: Any, text: str, line: str) -> None:
    with pytest.raises(InputError) as caught:
        read_yaml(write("c.yaml", text))
    assert str(caught.value).startswith(f"c.yaml{line}")
    assert "\n" not in str(caught.value)


def test_unreadable_files(write: Any, tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe9\n")
    for name, line in [
        ("none.yaml", "none.yaml: there is no such file"),
        (str(tmp_path), ".: cannot be read: Is a directory"),
        ("latin.yaml", "latin.yaml: must be UTF-8 text (byte 3 is not)"),
        ("a\0b", "a b: cannot be read: embedded null byte"),
    ]:
        with pytest.raises(InputError) as caught:
            read_yaml(name)
        assert str(caught.value) == line


def test_numbers_and_text_are_what_they_look_like(write: Any) -> None:
    text = "a: 1e-3\nb: '1e-3'\nc: 2E+5\nd: {e: 1.5e2}\nf: 1e3x\n"
    assert read_yaml(write("c.yaml", text)) == {
        "a": 0.001,
        "b": "1e-3",
        "c": 2e5,
        "d": {"e": 150.0},
        "f": "1e3x",
    }


def test_anchors_and_merges_work(write: Any) -> None:
    text = "a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\n"
    assert read_yaml(write("c.yaml", text)) == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}}


def test_a_long_chain_of_aliases_is_only_a_wrong_value(write: Any) -> None:
    with pytest.raises(InputError, match=r"^c\.yaml: "):
        load_run_config(write("c.yaml", CHAIN))


YAML_ISH = st.text(alphabet="ab1:-?[]{}&*!<>|'\"#%@,. \n\t=~é\x85\u2028\ufeff0e+_", max_size=60)


@given(st.binary(max_size=200) | st.text(max_size=100).map(str.encode) | YAML_ISH.map(str.encode))
@example(b"a: !!timestamp x")
@example(b"a: !!binary \xc3\xa9")
@example(b"a: !!float ''")
@example(b"a: !!int ''")
@example(b"a: !!omap [x]")
@example(b"a: =")
@example(b"<<: x")
@example(b"\xff\xfea\x00")
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "f.yaml"
        path.write_bytes(data)
        try:
            value = read_yaml(path)
        except InputError as error:
            assert len(str(error).splitlines()) == 1
        else:
            assert all(isinstance(key, str) for key in value)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.from_regex("[a-z]{1,5}", fullmatch=True), inner),
    max_leaves=8,
)


@given(VALUES)
@example("1e-3")
@example("a\x85b")
@example("a\u2028b\n \ufeff ")
@example(1e20)
@example(-0.0)
def test_what_is_written_is_read_back(value: Any) -> None:
    assert reading.parse_yaml(to_yaml({"a": value}), "text") == {"a": value}


@given(VALUES)
def test_any_document_is_resolved_or_refused(value: Any) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "f.yaml"
        path.write_text(to_yaml({"clients": [{"name": "a", "memory_gb": 1, "tflops": value}], "job": value}))
        try:
            load_run_config(path)
        except InputError as error:
            assert len(str(error).splitlines()) == 1


@pytest.mark.parametrize("name", ["hetero", "hetero.yaml", "cluster/hetero", "cluster/hetero.yaml"])
def test_presets_are_found_from_anywhere(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = find_preset("cluster", name)
    assert found.name == "hetero.yaml"
    assert "clients" in read_yaml(found)


def test_an_existing_file_is_taken_as_given(write: Any) -> None:
    Path("cluster").mkdir()
    name = write("cluster/hetero.yaml", "mine: 1\n")
    assert find_preset("cluster", name) == Path(name)
    Path("hetero").mkdir()  # a directory is no cluster file
    assert find_preset("cluster", "hetero") != Path("hetero")


def test_a_wheel_s_presets_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site-packages" / "hsplit"
    for directory in (package / "presets" / "cluster", package.parent / "policies"):
        directory.mkdir(parents=True)
        (directory / "only.yaml").write_text("a: 1\n")
    monkeypatch.setattr(reading, "_PACKAGE", package)
    assert find_preset("cluster", "only") == package / "presets" / "cluster" / "only.yaml"
    assert find_preset("policies", "only") == package.parent / "policies" / "only.yaml"


@pytest.mark.parametrize("name", ["nowhere", "", "../hetero", "policies/hetero", "x" * 5000, "a\0b"])
def test_a_preset_that_is_not_there(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no such cluster file") as caught:
        find_preset("cluster", name)
    for preset in ("gpu", "hetero", "homo"):
        assert preset in str(caught.value)


def test_a_close_preset_is_suggested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        load_run_config("hetero", "hsplitlorra")
    assert str(caught.value).startswith(
        "'hsplitlorra': no such policy file, and no preset of that name (did you mean 'hsplitlora'? presets: "
    )


def test_every_key_is_described() -> None:
    def sections(model: type[Section]) -> list[type[Section]]:
        return [found for child in model.__subclasses__() for found in (child, *sections(child))]

    public = [model for model in sections(Section) if not model.__name__.startswith("_")]
    assert len(public) >= 10
    for model in public:
        for key, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{key}"
