"""``hsplit eval``: its inputs, files and refusals."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import hsplit
from hsplit.cli import main
from hsplit.data import read_source, tokenize
from hsplit.errors import InputError
from hsplit.evaluation.evaluate import TestInput, grouped, limited
from hsplit.evaluation.targets import open_target
from hsplit.models.lookup import find_model
from hsplit.run.inputs import read_shared
from tests.finished_run import FinishedRun, finished_run, write_data

WITHOUT_JAVA = "ppl,bleu,nist,rouge-l,cider"


def _call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def _copy(run: FinishedRun, to: Path) -> Path:
    return Path(shutil.copytree(run.path, to / "run"))


def test_a_run_is_evaluated_on_its_test_part_and_the_scores_are_written_into_it(
    runs: dict[str, FinishedRun], tmp_path: Path
) -> None:
    run = runs["llama"]
    path = _copy(run, tmp_path)
    result = _call("eval", path, "--metrics", WITHOUT_JAVA, "--max-new-tokens", 6, "--batch-size", 3, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found == json.loads((path / "eval.json").read_text())
    assert (found["inputs"], found["references"], found["data"]) == (4, 12, "the test part (0.2) of data.csv")
    assert "through the split model, cut at layer 3 of 4 as c1 is" in found["model"]
    assert {"ppl", "bleu", "rouge_l", "cider"} <= set(found["scores"])

    _, test, _ = read_shared(run.config, find_model(str(run.model)))
    lines = [json.loads(line) for line in (path / "generations.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == list(dict.fromkeys(example.prompt for example in test))
    assert [text for line in lines for text in line["references"]] == [example.response.strip() for example in test]
    assert all(isinstance(line["output"], str) for line in lines)
    assert not list(path.glob(".*tmp"))


def test_the_table_shows_every_score_and_what_it_is_over(runs: dict[str, FinishedRun], tmp_path: Path) -> None:
    result = _call("eval", _copy(runs["gpt2"], tmp_path), "--metrics", "ppl,bleu", "--beams", 2, "--limit", 2)
    assert result.exit_code == 0, result.output
    text = " ".join(result.stdout.split())
    for part in ("perplexity", "BLEU", "2 inputs with 6 references", "supervised tokens", "model's context is 64"):
        assert part in text


def test_run_adapter_and_merged_model_have_one_perplexity(runs: dict[str, FinishedRun], tmp_path: Path) -> None:
    run = runs["llama"]
    unseen = write_data(tmp_path / "unseen.csv", seed=9)
    exports = [hsplit.export(run.path, tmp_path / f, format=f) for f in ("peft", "merged")]
    found = [hsplit.evaluate(target, unseen, metrics="ppl") for target in (_copy(run, tmp_path), *exports)]
    reference = found[0]
    assert reference.inputs == 20 and reference.supervised_tokens == found[1].supervised_tokens
    for other in found[1:]:
        assert other.scores["ppl"] == pytest.approx(reference.scores["ppl"], rel=1e-5)
        assert "what it was trained on is not known here" in " ".join(other.notes)
    assert not any((path / "eval.json").exists() for path in exports)
    # It is the run's model and not its base: that one is far off.
    base = hsplit.evaluate(run.model, unseen, metrics="ppl")
    assert abs(base.scores["ppl"] - reference.scores["ppl"]) > 0.01 * reference.scores["ppl"]


def test_a_model_that_lacks_a_weight_is_refused_and_not_drawn(runs: dict[str, FinishedRun], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = Path(shutil.copytree(runs["llama"].model, tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    result = _call("eval", model, "--data", write_data(tmp_path / "unseen.csv"), "--metrics", "ppl")
    assert result.exit_code == 2 and "the checkpoint has no tensor model.layers.1.mlp.up_proj.weight" in result.output


def test_perplexity_does_not_depend_on_the_batch_where_frequencies_depend_on_the_length(tmp_path: Path) -> None:
    from hsplit.evaluation.perplexity import cross_entropy
    from tests.tiny import save_tiny_model

    rope = {"rope_type": "longrope", "rope_theta": 100.0, "original_max_position_embeddings": 8}
    factors = {"short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 3.0, 4.0]}
    model = save_tiny_model("llama", tmp_path / "m", max_position_embeddings=64, rope_parameters=rope | factors)
    texts = [f"{' '.join(['w2'] * words)},{' '.join(['w9'] * words)}" for words in (2, 3, 9)]
    data = tmp_path / "data.csv"
    data.write_text("\n".join(["prompt,response", *texts]))
    one, eight = (hsplit.evaluate(model, data, metrics="ppl", batch_size=size) for size in (1, 8))
    assert eight.scores["ppl"] == one.scores["ppl"]
    # In one batch the short texts would have been computed with the long one's frequencies.
    opened = open_target(model)
    examples = tokenize(_examples(data), opened.tokenizer, 64)[0]
    assert cross_entropy(opened.model, opened.tokenizer, examples, 8).perplexity != pytest.approx(one.scores["ppl"])


def test_inputs_that_the_run_trained_on_are_left_out_and_counted(runs: dict[str, FinishedRun], tmp_path: Path) -> None:
    run = runs["llama"]
    path = _copy(run, tmp_path)
    _, test, _ = read_shared(run.config, find_model(str(run.model)))
    prompts = {example.prompt for example in test}
    found = hsplit.evaluate(path, run.data, metrics="bleu", max_new_tokens=1)
    assert prompts <= {one.prompt for one in found.generations}
    left_out = 20 - found.inputs
    # Of 16 prompts that were shared out, those stay that only validation has.
    assert 0 < left_out <= 16 and f"{left_out} of 20 inputs are left out: the run trained on them" in found.notes

    trained = [e for e in _examples(run.data) if e.prompt not in {one.prompt for one in found.generations}]
    seen = tmp_path / "seen.csv"
    seen.write_text("mr,ref\n" + "".join(f"{e.prompt.removesuffix(' =>')},other\n" for e in trained))
    with pytest.raises(InputError, match=rf"seen\.csv: the run trained on every one of its {left_out} inputs"):
        hsplit.evaluate(path, seen, metrics="ppl")


def _examples(path: Path) -> list[Any]:
    return read_source(str(path)).examples


def test_where_the_runs_data_is_gone_nothing_is_left_out_and_that_is_said(
    models: dict[str, Path], tmp_path: Path
) -> None:
    run = finished_run(tmp_path, models["llama"], base="fp32", rounds=1)
    unseen = write_data(tmp_path / "unseen.csv", prompts=3, seed=9)
    run.data.unlink()
    found = hsplit.evaluate(run.path, unseen, metrics="ppl")
    assert found.inputs == 3 and any("data cannot be read" in note for note in found.notes)


def test_the_cut_is_that_of_the_client_asked_for(runs: dict[str, FinishedRun], tmp_path: Path) -> None:
    path = _copy(runs["llama"], tmp_path)
    assert "cut at layer 1 of 4 as c0 is" in hsplit.evaluate(path, metrics="ppl", client="c0").model


def test_perplexity_alone_needs_no_library(
    runs: dict[str, FinishedRun], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    missing = ("sacrebleu", "nltk", "rouge_score", "pycocoevalcap")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in missing else find(name, *rest))
    path = _copy(runs["llama"], tmp_path)
    assert math.isfinite(hsplit.evaluate(path, metrics="ppl").scores["ppl"])
    result = _call("eval", path)
    assert result.exit_code == 2 and "pip install 'hsplit[eval]'" in result.stderr


def test_inputs_gather_every_reference_of_a_prompt_and_special_tokens_are_no_part_of_one() -> None:
    inputs = grouped(_made("a", "x<eos>") + _made("b", "y") + _made("a", " z "))
    assert inputs == [TestInput("a", ("x<eos>", " z ")), TestInput("b", ("y",))]
    assert inputs[0].references(["<eos>"]) == ["x", "z"]
    many = [TestInput(str(i), ("r",)) for i in range(50)]
    few = limited(many, 5, seed=1)
    assert len(few) == 5 and few == limited(many, 5, seed=1) != limited(many, 5, seed=2)
    assert few == [one for one in many if one in few] and limited(many, 99, seed=1) == many


def _made(prompt: str, response: str) -> list[Any]:
    from hsplit.data import Example

    return [Example(prompt, response, None)]


REFUSED = [
    (["{run}", "--beams", 0], "--beams: 0 is too few"),
    (["{run}", "--limit", 0], "--limit: 0 is too few"),
    (["{run}", "--metrics", "blue"], "--metrics: 'blue' is unknown"),
    (["{run}", "--client", "nobody"], "--client nobody: has no part in the run's last plan; give one of c0, c1"),
    (["{run}", "--data", "/nowhere.csv"], "/nowhere.csv: there is no such file"),
    (["/nowhere"], "/nowhere: there is no such directory"),
    (["{tmp}"], "is no run (config.yaml), no PEFT adapter"),
    (["{model}"], "is an exported directory, which has no data of its own; give --data FILE"),
    (["{model}", "--client", "c0"], "--client c0: "),
    (["{adapter}", "--data", "{tmp}"], "adapter_config.json: names no base_model_name_or_path"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_wrong_input_is_one_line_and_exit_code_2(
    runs: dict[str, FinishedRun], tmp_path: Path, arguments: list[object], message: str
) -> None:
    run = runs["llama"]
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    places = {"run": run.path, "tmp": tmp_path, "model": run.model, "adapter": tmp_path / "adapter"}
    filled = [str(a).format(**places) for a in arguments]
    result = _call("eval", "--metrics", "ppl", *filled)
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0], lines
    assert not (run.path / "eval.json").exists()


@pytest.mark.parametrize("missing", ["target", "test part"])
def test_what_cannot_be_evaluated_is_said_before_a_library_is_asked_for_or_a_model_loaded(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    def loading(*_: object) -> None:
        raise AssertionError("looked further")

    target = tmp_path / "nothing"
    if missing == "test part":
        data = {"source": str(write_data(tmp_path / "data.csv"))}
        target = finished_run(tmp_path, models["llama"], base="fp32", rounds=1, data=data).path
    monkeypatch.setattr("hsplit.evaluation.evaluate.chosen_metrics", loading)
    monkeypatch.setattr("hsplit.evaluation.evaluate.open_target", loading)
    with pytest.raises(InputError, match="no such directory" if missing == "target" else "kept no test part"):
        hsplit.evaluate(target)


def test_a_run_without_a_test_part_says_what_to_do(models: dict[str, Path], tmp_path: Path) -> None:
    data = {"source": str(write_data(tmp_path / "data.csv"))}
    run = finished_run(tmp_path, models["gpt2"], base="fp32", rounds=1, data=data)
    with pytest.raises(
        InputError, match=r"no test part.*--data FILE, or launch another with --set job\.data\.test=0\.1"
    ):
        hsplit.evaluate(run.path, metrics="ppl")


def test_data_that_changed_since_the_run_began_is_refused(runs: dict[str, FinishedRun]) -> None:
    """A test part of other data could contain training examples."""
    run = runs["llama"]
    before = run.data.read_text()
    try:
        run.data.write_text(before + "w2 w3,w4 w5\n")
        with pytest.raises(InputError, match="is not the data that the run was started with"):
            hsplit.evaluate(run.path, metrics="ppl")
    finally:
        run.data.write_text(before)
