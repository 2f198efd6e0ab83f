"""Refusals before anything starts: ids and lengths that the model has no embedding for; reading inputs once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import hsplit.run.inputs
from hsplit.actors.client import Client
from hsplit.config import ClientConfig, Job, Policy, RunConfig
from hsplit.config.job import DataSpec
from hsplit.errors import InputError
from hsplit.models.lookup import find_model
from hsplit.models.segment import BaseModel
from hsplit.models.spec import ModelSpec
from hsplit.models.tokenizer import load_tokenizer
from hsplit.run.inputs import check_model, read_inputs, read_shared
from tests.tiny import WORDS, wordless_tokenizer


def with_token(model: Path, to: Path, token: str, **special: str) -> Path:
    """The model with one more token in its tokenizer than it has embeddings."""
    shutil.copytree(model, to)
    tokenizer = AutoTokenizer.from_pretrained(to)
    tokenizer.add_tokens([token])
    for kind, text in special.items():
        setattr(tokenizer, kind, text)
    tokenizer.save_pretrained(to)
    return to


def run_of(data: Path | None, *, own: Path | None = None, spec: dict[str, Any] | None = None, **job: Any) -> RunConfig:
    source = {} if data is None else {"source": str(data)}
    made = Job.model_validate({"dtype": "fp32", "data": {**source, **(spec or {})}, **job})
    clients = tuple(
        ClientConfig(name=name, kind=name, memory_gb=1.0, tflops=1.0, data=None if own is None else str(own))
        for name in ("a", "b")
    )
    return RunConfig(clients=clients, job=made)


def rows(path: Path, *responses: str) -> Path:
    path.write_text("prompt,response\n" + "".join(f"w{n + 2} w3,{text}\n" for n, text in enumerate(responses)))
    return path


def test_a_token_of_the_shared_data_that_the_model_lacks_is_named(models: dict[str, Path], tmp_path: Path) -> None:
    source = find_model(str(with_token(models["llama"], tmp_path / "model", "<tool>")))
    plain = ["w4 w5"] * 7
    # A tokenizer with more tokens than the model is no obstacle where no text has them.
    assert read_inputs(run_of(rows(tmp_path / "plain.csv", *plain)), source).shares["a"]
    held = rows(tmp_path / "held.csv", *plain, "w4 <tool> w5")
    with pytest.raises(InputError, match=rf"held\.csv: token '<tool>' \(id {WORDS}\) is beyond .* vocab_size {WORDS}"):
        read_inputs(run_of(held), source)
    # Examples left out for their length are never embedded.
    long = rows(tmp_path / "long.csv", *plain, "w4 <tool> " + "w5 " * 200)
    assert read_inputs(run_of(long), source).shares["a"]


def test_an_eos_that_the_model_lacks_is_named_though_all_data_are_the_clients(
    models: dict[str, Path], tmp_path: Path
) -> None:
    source = find_model(str(with_token(models["llama"], tmp_path / "model", "<end>", eos_token="<end>")))
    own = rows(tmp_path / "own.csv", *["w4 w5"] * 4)
    with pytest.raises(InputError, match=rf"eos token '<end>' \(id {WORDS}\) is beyond the model's vocab_size {WORDS}"):
        read_inputs(run_of(None, own=own), source)


def test_a_client_with_such_a_token_in_its_own_file_is_named_and_its_text_is_not(
    models: dict[str, Path], tmp_path: Path
) -> None:
    directory = with_token(models["llama"], tmp_path / "model", "<tool>")
    job = Job.model_validate({"dtype": "fp32"})
    own = rows(tmp_path / "own.csv", "w4 w5", "w77 <tool> w78", "w6", "w7")
    with pytest.raises(InputError) as refused:
        Client("clinic", job, Policy(), BaseModel.of_job(ModelSpec.read(directory), job)).load_data(
            {"clinic": None}, str(own)
        )
    text = str(refused.value)
    assert text.startswith("client clinic: its data: ") and f"'<tool>' (id {WORDS})" in text
    assert f"vocab_size {WORDS}" in text and not any(word in text for word in ("w77", "w78"))


def test_weights_that_are_not_the_whole_model_are_refused_before_the_data_are_read(
    models: dict[str, Path], tmp_path: Path
) -> None:
    model = Path(shutil.copytree(models["llama"], tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    with pytest.raises(
        InputError, match=r"has no tensor lm_head\.weight, and by config\.json \(tie_word_embeddings: false\)"
    ):
        read_inputs(run_of(tmp_path / "absent.csv"), find_model(str(model)))


def test_texts_beyond_the_learned_positions_are_refused(models: dict[str, Path]) -> None:
    source = find_model(str(models["gpt2"]))
    check_model(run_of(None, max_length=64), source)
    with pytest.raises(InputError, match=r"job\.max_length: must be at most 64, the positions .* \(got 65\)"):
        check_model(run_of(None, max_length=65), source)
    check_model(run_of(None, max_length=65), find_model(str(models["llama"])))


def test_the_tokenizer_is_loaded_once_for_a_shared_chat_file(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(models["llama"], tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "model")
    chats = tmp_path / "chats.jsonl"
    turns = [[{"role": "user", "content": f"w{n}"}, {"role": "assistant", "content": "w9"}] for n in range(2, 32)]
    chats.write_text("\n".join(json.dumps({"messages": messages}) for messages in turns))
    loaded: list[Path] = []

    def counted(directory: Path) -> Any:
        loaded.append(directory)
        return load_tokenizer(directory)

    monkeypatch.setattr(hsplit.run.inputs, "load_tokenizer", counted)
    shares = read_inputs(run_of(chats), find_model(str(tmp_path / "model"))).shares
    assert sum(len(share or []) for share in shares.values()) == 30
    assert len(loaded) == 1


def wordless(model: Path, to: Path) -> Path:
    """The model with a tokenizer that makes no token of words such as ``zz``, and has no eos."""
    shutil.copytree(model, to)
    for file in to.glob("tokenizer*"):
        file.unlink()
    wordless_tokenizer().save_pretrained(to)
    return to


def test_shared_data_without_a_token_to_predict_are_refused(models: dict[str, Path], tmp_path: Path) -> None:
    source = find_model(str(wordless(models["llama"], tmp_path / "model")))
    nothing = rows(tmp_path / "nothing.csv", *["zz"] * 8)
    said = r"^job\.data\.source .*nothing\.csv: no training example .* job\.max_length = .* has a token to predict"
    with pytest.raises(InputError, match=said):
        read_inputs(run_of(nothing), source)
    assert read_inputs(run_of(rows(tmp_path / "some.csv", *["zz"] * 7, "w5", "w6", "w7")), source).shares["a"]


def test_a_test_part_without_a_token_to_predict_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    source = find_model(str(wordless(models["llama"], tmp_path / "model")))
    data = rows(tmp_path / "d.csv", *["w5"] * 9)
    run = run_of(data, spec={"test": 0.1})
    _, (tested,), _ = read_shared(run, source)
    number = int(tested.prompt.split()[0].removeprefix("w")) - 2
    rows(data, *["w5"] * number, "zz", *["w5"] * (8 - number))
    with pytest.raises(InputError, match=r"^job\.data\.test 0\.1 of .*d\.csv: no test example has a token to predict"):
        read_inputs(run, source)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({}, ": more clients than examples to share out: 2 clients without data of their own need at least 4, 2 each"),
        ({"limit": 3}, ", job.data.limit 3: more clients than examples"),
        ({"test": 0.5}, ", job.data.test 0.5: more clients than examples"),
        ({"source": "restaurants", "examples": 3}, "restaurants, job.data.examples 3: more clients than examples"),
    ],
)
def test_too_few_shared_examples_name_the_source_and_what_takes_from_it(
    models: dict[str, Path], tmp_path: Path, data: dict[str, Any], said: str
) -> None:
    file = rows(tmp_path / "few.csv", *["w4"] * (3 if not data else 6))
    with pytest.raises(InputError) as refused:
        read_inputs(run_of(file, spec=data), find_model(str(models["llama"])))
    assert str(refused.value).startswith("job.data.source ") and said in str(refused.value)
    assert str(refused.value).endswith("; there are 3")


def test_limit_is_a_draw_by_the_seed_from_shared_data_and_from_a_client_s_own_file(
    models: dict[str, Path], tmp_path: Path
) -> None:
    file, source = rows(tmp_path / "d.csv", *["w4"] * 60), find_model(str(models["llama"]))

    def drawn(**job: Any) -> set[str]:
        shares = read_inputs(run_of(file, spec={"limit": 12}, **job), source).shares
        return {example.prompt for share in shares.values() for example in share or ()}

    whole = {f"w{n + 2} w3\n" for n in range(60)}
    assert len(drawn()) == 12 and drawn() < whole and drawn() == drawn() != drawn(seed=1)
    assert not drawn() <= {f"w{n + 2} w3\n" for n in range(12)}, "not the first ones"
    job = run_of(None, own=file, spec={"limit": 12}).job
    client = Client("clinic", job, Policy(), BaseModel.of_job(ModelSpec.read(models["llama"]), job))
    report = client.load_data({"clinic": None}, str(file))
    assert report.train + report.validation == 12
    assert "drawn by `seed`" in str(DataSpec.model_fields["limit"].description)


def test_one_client_with_one_shared_example_is_named_with_the_file(models: dict[str, Path], tmp_path: Path) -> None:
    file = rows(tmp_path / "one.csv", "w4")
    run = run_of(file)
    alone = run.model_copy(update={"clients": run.clients[:1]})
    with pytest.raises(InputError) as refused:
        read_inputs(alone, find_model(str(models["llama"])))
    needs = "client a needs at least 2, one to train on and one to validate on"
    assert str(refused.value) == f"job.data.source {file}: has 1 example, and {needs}"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("prompt,response\nw3,w4\n", ": has 1 example; at least 2 are needed"),
        ("prompt,response\nw3,\n", ": row 2: response is blank; must be a text"),
        ("first,second\nw3,w4\n", ": has other columns; needs mr and ref, or prompt and response"),
    ],
)
def test_a_client_s_own_file_that_is_unusable_is_named_with_its_client(
    models: dict[str, Path], tmp_path: Path, content: str, said: str
) -> None:
    own, job = tmp_path / "own.csv", Job.model_validate({"dtype": "fp32"})
    own.write_text(content)
    with pytest.raises(InputError) as refused:
        Client("clinic", job, Policy(), BaseModel.of_job(ModelSpec.read(models["llama"]), job)).load_data(
            {"clinic": None}, str(own)
        )
    text = str(refused.value)
    assert text.startswith("client clinic: data") and f"{own}{said}" in text


def test_a_share_that_does_not_fit_is_refused_in_the_driver_by_client(models: dict[str, Path], tmp_path: Path) -> None:
    long = rows(tmp_path / "long.csv", *["w4 " * 40] * 8)
    with pytest.raises(InputError, match=r"^client a: .*long\.csv: none of its 3 training .* job\.max_length = 16 "):
        read_inputs(run_of(long, max_length=16), find_model(str(models["llama"])))
