"""Refusals before anything starts: ids and lengths that the model has no embedding for; and what is read once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import hsplit.preparation
from hsplit.actors.client import Client as ClientActor
from hsplit.actors.participant import base_model
from hsplit.config import Client, Job, Policy, RunConfig
from hsplit.errors import InputError
from hsplit.models.segment import load_tokenizer
from hsplit.models.source import find_model
from hsplit.preparation import check_model, read_inputs
from tests.tiny import WORDS


def with_token(model: Path, to: Path, token: str, **special: str) -> Path:
    """The model with one more token in its tokenizer than it has embeddings."""
    shutil.copytree(model, to)
    tokenizer = AutoTokenizer.from_pretrained(to)
    tokenizer.add_tokens([token])
    for kind, text in special.items():
        setattr(tokenizer, kind, text)
    tokenizer.save_pretrained(to)
    return to


def run_of(data: Path | None, *, own: Path | None = None, **job: Any) -> RunConfig:
    source = {} if data is None else {"data": {"source": str(data)}}
    made = Job.model_validate({"dtype": "fp32", **source, **job})
    clients = tuple(
        Client(name=name, kind=name, memory_gb=1.0, tflops=1.0, data=None if own is None else str(own))
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
    # What is left out for its length is never embedded.
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
        ClientActor("clinic", job, Policy(), base_model(directory, job)).load_data({"clinic": None}, str(own))
    text = str(refused.value)
    assert text.startswith("client clinic: its data: ") and f"'<tool>' (id {WORDS})" in text
    assert f"vocab_size {WORDS}" in text and not any(word in text for word in ("w77", "w78"))


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

    monkeypatch.setattr(hsplit.preparation, "load_tokenizer", counted)
    shares = read_inputs(run_of(chats), find_model(str(tmp_path / "model"))).shares
    assert sum(len(share or []) for share in shares.values()) == 30
    assert len(loaded) == 1
