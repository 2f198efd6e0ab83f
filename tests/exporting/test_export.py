"""Exports: plain PEFT and transformers load them and compute the same as the split model; reported errors are true."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hsplit.cli import main
from hsplit.errors import InputError
from hsplit.evaluation.split_model import Cut, split_model
from hsplit.evaluation.targets import open_target
from hsplit.exporting.export import ExportOptions, export, export_run
from hsplit.exporting.merge import export_merged, truncated
from hsplit.lora.learned import WEIGHT, learned, learned_parts, trained_weights, with_kind
from hsplit.models.factors import LowRank
from hsplit.models.segment import BaseModel
from hsplit.models.spec import ModelSpec
from hsplit.models.weights import base_values
from tests.errors import error_lines
from tests.file_modes import UMASKS, assert_new, umask
from tests.finished_run import FinishedRun, finished_run, logits_of
from tests.tiny import save_tiny_model

CASES = [("llama", "nf4"), ("llama", "bf16"), ("gpt2", "int8"), ("gpt2", "fp32")]


@pytest.fixture(scope="module")
def runs(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], FinishedRun]:
    return {
        (family, base): finished_run(tmp_path_factory.mktemp("run"), models[family], base=base)
        for family, base in CASES
    }


def _split_logits(run: FinishedRun) -> torch.Tensor:
    _, tensors = run.checkpoint()
    return logits_of(
        split_model(
            BaseModel.of_job(ModelSpec.read(run.model), run.config.job),
            learned_parts(tensors["server"]),
            Cut(3, "fp32", "server"),
        )
    )


def _load(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path).eval()


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_a_merged_model_loads_with_transformers_and_has_the_split_models_logits(
    runs: dict[tuple[str, str], FinishedRun], tmp_path: Path, case: tuple[str, str]
) -> None:
    run = runs[case]
    written = export_run(run.path, tmp_path / "merged", ExportOptions(format="merged"))
    assert written.lines == ()
    model, wanted = _load(written.path), _split_logits(run)
    assert model.dtype == torch.float32
    assert (logits_of(model) - wanted).abs().max() < 1e-4
    assert (logits_of(_load(run.model)) - wanted).abs().max() > 1e-2
    assert AutoTokenizer.from_pretrained(written.path)("w5 w6")["input_ids"] == [5, 6]
    # Tied weights are written once.
    assert "lm_head.weight" not in load_file(written.path / "model.safetensors")


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_an_adapter_loads_with_peft_and_has_the_split_models_logits_on_the_runs_base_values(
    runs: dict[tuple[str, str], FinishedRun], tmp_path: Path, case: tuple[str, str]
) -> None:
    run = runs[case]
    path = export(run.path, tmp_path / "adapter")
    assert (logits_of(open_target(path).model) - _split_logits(run)).abs().max() < 1e-4


def test_an_export_says_nothing_that_is_not_hsplits_own(
    runs: dict[tuple[str, str], FinishedRun], tmp_path: Path
) -> None:
    """In a process of its own, where PEFT imports bitsandbytes for the first time."""
    code = "import sys; from hsplit.cli import main; main(sys.argv[1:])"
    arguments = ["export", str(runs["llama", "nf4"].path), "--to", str(tmp_path / "adapter")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert (done.returncode, done.stdout, error_lines(done.stderr)) == (0, f"{tmp_path / 'adapter'}\n", [])


@pytest.mark.parametrize("format_", ["peft", "merged"])
def test_layers_that_nobody_trained_are_exported_as_they_were(
    models: dict[str, Path], tmp_path: Path, format_: str
) -> None:
    run = finished_run(tmp_path, models["llama"], splits=(1, 1), ranks=(0, 0))
    written = export_run(run.path, tmp_path / "out", ExportOptions(format=format_))
    found = logits_of(_load(written.path) if format_ == "merged" else open_target(written.path).model)
    assert (found - _split_logits(run)).abs().max() < 1e-4
    assert (logits_of(_load(run.model)) - found).abs().max() > 1e-2


def test_an_untied_model_in_several_files_loads_as_one(tmp_path: Path) -> None:
    model = save_tiny_model("gpt2", tmp_path / "model", tie_word_embeddings=False)
    (tmp_path / "out").mkdir()
    draw = torch.Generator().manual_seed(0)
    terms = {
        s.name: LowRank(torch.randn(s.d_out, 2, generator=draw) / 9, torch.randn(2, s.d_in, generator=draw))
        for s in ModelSpec.read(model).linears
    }
    export_merged(ModelSpec.read(model), "fp32", terms, tmp_path / "out", shard_bytes=40_000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    expected = _load(model)
    with torch.no_grad():
        for name, term in terms.items():
            expected.get_submodule(name).weight += term.dense().T
    assert (logits_of(_load(tmp_path / "out")) - logits_of(expected)).abs().max() < 1e-4


def test_a_head_of_its_own_is_exported_though_the_configuration_ties_it(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = save_tiny_model("llama", tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    assert ModelSpec.read(model).config.tie_word_embeddings and "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = torch.randn_like(tensors["model.embed_tokens.weight"])
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "out").mkdir()
    export_merged(ModelSpec.read(model), "fp32", {}, tmp_path / "out")
    written = _load(tmp_path / "out")
    assert torch.equal(written.lm_head.weight, tensors["lm_head.weight"]) and not written.config.tie_word_embeddings
    assert (logits_of(written) - logits_of(_load(model))).abs().max() < 1e-5


def test_a_cut_adapter_has_the_error_that_is_told(runs: dict[tuple[str, str], FinishedRun], tmp_path: Path) -> None:
    run = runs["llama", "nf4"]
    written = export_run(run.path, tmp_path / "cut", ExportOptions(rank=2))
    whole = learned(run.checkpoint()[1]["server"])
    tensors = load_file(written.path / "adapter_model.safetensors")
    squares, relative = [0.0, 0.0], {}
    for name, term in whole.items():
        key = f"base_model.model.{name}.lora_"
        assert tensors[f"{key}A.weight"].shape[0] <= 2
        dense = term.to(torch.float64).dense()
        error = tensors[f"{key}B.weight"].double() @ tensors[f"{key}A.weight"].double() - dense
        # The best of its rank: what the singular values beyond it make.
        best = torch.linalg.svdvals(dense)[2:].norm()
        assert float(error.norm()) == pytest.approx(float(best), rel=1e-4)
        relative[name] = float(error.norm() / dense.norm())
        squares = [squares[0] + float(error.norm()) ** 2, squares[1] + float(dense.norm()) ** 2]
    worst = max(relative, key=lambda name: relative[name])
    total = (squares[0] / squares[1]) ** 0.5
    assert total > 0.01
    (line,) = written.lines
    assert line.endswith(f"{total:.3e} over all weights, at worst {relative[worst]:.3e} ({worst})")
    assert line in (written.path / "README.md").read_text()


def test_a_cut_beyond_what_was_learned_cuts_nothing() -> None:
    term = LowRank(torch.randn(8, 3), torch.randn(3, 6))
    cut, error = truncated({"w": term, "none": LowRank(torch.zeros(8, 0), torch.zeros(0, 6))}, 3)
    assert cut["w"] is term and error is not None and error.total == 0.0
    assert truncated({}, 3) == ({}, None)


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_a_merge_onto_the_original_weights_tells_how_far_the_two_bases_are_apart(
    runs: dict[tuple[str, str], FinishedRun], tmp_path: Path, case: tuple[str, str]
) -> None:
    run = runs[case]
    written = export_run(run.path, tmp_path / "original", ExportOptions(format="merged", base="original"))
    terms, original, merged = learned(run.checkpoint()[1]["server"]), _load(run.model), _load(written.path)
    transposed, difference, size = case[0] == "gpt2", 0.0, 0.0
    for shape in ModelSpec.read(run.model).linears:
        before, after = (m.get_submodule(shape.name).weight.data for m in (original, merged))
        if transposed:
            before, after = before.T, after.T
        assert torch.allclose(after, before + terms[shape.name].dense(), atol=1e-6)
        # int8 is quantized from fp16.
        half = before.half() if case[1] == "int8" else before
        difference += float((base_values(half.contiguous(), case[1], torch.float32) - before).norm()) ** 2
        size += float(before.norm()) ** 2
    (line,) = written.lines
    if case[1] == "fp32":
        assert line.endswith("difference of the two bases: none")
    else:
        assert f"two bases: {(difference / size) ** 0.5:.3e} over all weights" in line
    assert torch.equal(original.get_input_embeddings().weight, merged.get_input_embeddings().weight)


def test_bf16_files_tell_how_much_of_the_update_rounding_took(
    runs: dict[tuple[str, str], FinishedRun], tmp_path: Path
) -> None:
    run = runs["llama", "bf16"]
    written = export_run(run.path, tmp_path / "bf16", ExportOptions(format="merged", dtype="bf16"))
    model, whole = _load(written.path), _load(export(run.path, tmp_path / "fp32", format="merged"))
    assert model.dtype == torch.bfloat16
    error = size = 0.0
    for name, term in learned(run.checkpoint()[1]["server"]).items():
        exact = whole.get_submodule(name).weight.data.double()
        error += float((model.get_submodule(name).weight.data.double() - exact).norm()) ** 2
        size += float(term.to(torch.float64).dense().norm()) ** 2
    # On a bf16 base only the update has digits to lose.
    reported = float(written.lines[0].split("learned update ")[1].split()[0])
    assert reported == pytest.approx((error / size) ** 0.5, rel=1e-2) and reported > 1e-4


# -- full fine-tuning ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_run_that_trained_every_weight_exports_and_evaluates_those(
    runs: dict[tuple[str, str], FinishedRun], tmp_path: Path, family: str
) -> None:
    original = runs[next(case for case in CASES if case[0] == family)]
    path = Path(shutil.copytree(original.path, tmp_path / "run"))
    run = FinishedRun(type(original.directory)(path), original.config, original.data, original.model)
    trained = _load(run.model)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.02)
    weights = with_kind(WEIGHT, {name: p.detach().clone() for name, p in trained.named_parameters()})
    run.replace_checkpoint({"central": {**weights, "tokens": torch.zeros(1, 2)}, "server": {}})
    assert trained_weights(run.checkpoint()[1]).keys() == dict(trained.named_parameters()).keys()

    # As at a run's end, without options: a merged model instead of the adapter.
    exported = export(path)
    assert exported == path / "model"
    assert torch.equal(logits_of(_load(exported)), logits_of(trained))
    assert torch.equal(logits_of(open_target(path).model), logits_of(trained))
    for options, message in (
        ({"format": "peft"}, "every weight was trained"),
        ({"format": "merged", "base": "original"}, "no other base"),
    ):
        with pytest.raises(InputError, match=message):
            export(path, tmp_path / "no", **options)
    assert not (tmp_path / "no").exists()


# -- model card ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("format_", "library"), [("peft", "peft"), ("merged", "transformers")])
def test_the_card_has_front_matter_for_the_hub_and_tells_where_the_model_comes_from(
    runs: dict[tuple[str, str], FinishedRun], tmp_path: Path, format_: str, library: str
) -> None:
    path = Path(shutil.copytree(runs["llama", "nf4"].path, tmp_path / "run"))
    scores = {"scores": {"ppl": 12.5, "bleu": 33.25}, "data": "the test part", "inputs": 4, "references": 12}
    (path / "eval.json").write_text(json.dumps({**scores, "model": "split", "beams": 2, "round": 1}))
    # Scores of an earlier round are not this model's.
    earlier = ModelCard.load(export(path, tmp_path / "earlier", format=format_) / "README.md")
    assert not earlier.data.eval_results and "33.25" not in earlier.text
    (path / "eval.json").write_text(json.dumps({**scores, "model": "split", "beams": 2, "round": 2}))
    card = ModelCard.load(export(path, tmp_path / "out", format=format_) / "README.md")
    data = card.data
    assert data.library_name == library and {"hsplit", "lora"} <= set(data.tags)
    assert {(r.metric_type, r.metric_value) for r in data.eval_results or []} == {("ppl", 12.5), ("bleu", 33.25)}
    # A directory of this machine is no base that the hub could know.
    assert data.base_model is None and str(runs["llama", "nf4"].model) not in card.content
    for text in (
        *("from_pretrained", "nf4", "hsplitlora: for tests", "data.csv", "0.2 of the distinct prompts"),
        *("| c1 | client | 3 |", "Validation perplexity", "33.25", "2 beams", "(virtual: computed, not measured)"),
    ):
        assert text in card.text, text


def test_a_hub_model_is_named_by_its_id(
    runs: dict[tuple[str, str], FinishedRun], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from hsplit.models.lookup import ModelSource

    run = runs["gpt2", "fp32"]
    path = Path(shutil.copytree(run.path, tmp_path / "run"))
    named = run.config.model_copy(update={"job": run.config.job.model_copy(update={"model": "org/some-model"})})
    named.save(path / "config.yaml")
    found = ModelSource(run.model, f"the hub: org/some-model in {run.model}")
    monkeypatch.setattr("hsplit.exporting.export.find_model", lambda *_, **__: found)
    card = ModelCard.load(export(path) / "README.md")
    settings = json.loads((path / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "org/some-model"
    assert card.data.base_model == "org/some-model" and 'base = "org/some-model"' in card.text
    assert str(run.model) not in card.content and str(tmp_path) not in card.content


# -- refusals -----------------------------------------------------------------------------------------------------


REFUSED = [
    (["--rank", "0"], "--rank: 0 is too small"),
    (["--rank", "4", "--format", "merged"], "--rank: cuts an adapter"),
    (["--base", "original"], "--base and --dtype: belong to --format merged"),
    (["--dtype", "bf16", "--format", "peft"], "--base and --dtype: belong to --format merged"),
    (["--to", "{model}"], "holds a merged export already; give another directory"),
    (["--to", "{file}"], "cannot be written"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_wrong_input_is_one_line_and_exit_code_2(
    runs: dict[tuple[str, str], FinishedRun], arguments: list[str], message: str
) -> None:
    run = runs["llama", "nf4"]
    filled = [a.format(model=run.model, file=run.path / "config.yaml" / "x") for a in arguments]
    result = CliRunner().invoke(main, ["export", str(run.path), *filled])
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0], lines


def test_an_export_over_an_older_one_leaves_no_shard_of_it_and_nothing_of_others_is_touched(
    runs: dict[tuple[str, str], FinishedRun], tmp_path: Path
) -> None:
    run, to = runs["gpt2", "fp32"], tmp_path / "out"
    to.mkdir()
    for name in ("model-00001-of-00009.safetensors", "model.safetensors.index.json", "notes.txt"):
        (to / name).write_text("old")
    result = CliRunner().invoke(main, ["export", str(run.path), "--to", str(to), "--format", "merged"])
    assert result.exit_code == 0 and result.stdout.strip() == str(to), result.output
    left = {file.name for file in to.iterdir()}
    assert {"model.safetensors", "notes.txt", "README.md", "config.json"} <= left
    assert not {"model-00001-of-00009.safetensors", "model.safetensors.index.json"} & left
    assert not any(name.startswith(".partial") for name in left)
    assert logits_of(_load(to)).isfinite().all()


@pytest.mark.parametrize("mask", UMASKS, ids=oct)
@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"format": "peft"}, ["adapter_config.json", "adapter_model.safetensors", "README.md"]),
        ({"format": "peft", "rank": 1}, ["adapter_config.json", "adapter_model.safetensors", "README.md"]),
        ({"format": "merged"}, ["config.json", "model.safetensors", "tokenizer.json", "README.md"]),
        ({"format": "merged", "dtype": "bf16", "base": "original"}, ["config.json", "model.safetensors", "README.md"]),
    ],
    ids=["adapter", "cut", "merged", "merged-bf16-original"],
)
def test_all_files_of_an_export_have_the_mode_that_the_umask_gives(
    runs: dict[tuple[str, str], FinishedRun], tmp_path: Path, options: dict[str, Any], names: list[str], mask: int
) -> None:
    with umask(mask):
        to = export(runs["llama", "bf16"].path, tmp_path / "out", **options)
    assert_new(to, mask, *names)


def test_all_files_of_a_model_in_several_have_the_mode_that_the_umask_gives(
    models: dict[str, Path], tmp_path: Path
) -> None:
    with umask(0o027):
        export_merged(ModelSpec.read(models["llama"]), "fp32", {}, tmp_path, shard_bytes=40_000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_new(tmp_path, 0o027, "model.safetensors.index.json")


def test_an_adapter_whose_modules_keep_their_own_ranks_says_who_scales_it_rightly(
    runs: dict[tuple[str, str], FinishedRun], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs["llama", "nf4"]
    path = Path(shutil.copytree(run.path, tmp_path / "run"))
    copy = FinishedRun(type(run.directory)(path), run.config, run.data, run.model)
    _, tensors = run.checkpoint()
    # All but one weight learned in one direction.
    wide = max(learned(tensors["server"]), key=lambda name: learned(tensors["server"])[name].rank)
    server = {
        key: tensor if f".{wide}." in key else tensor[:, :1] if key.endswith(".B") else tensor[:1]
        for key, tensor in tensors["server"].items()
        if key.startswith("residual.")
    }
    copy.replace_checkpoint({**tensors, "server": server})
    assert export_run(path, tmp_path / "one", ExportOptions()).lines == ()
    monkeypatch.setattr("hsplit.exporting.adapter_files.MOST_PADDING_BYTES", 0)
    result = CliRunner().invoke(main, ["export", str(path), "--to", str(tmp_path / "own")])
    assert result.exit_code == 0, result.output
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("modules have ranks of their own") and "rank_pattern and alpha_pattern" in line
    assert line in (tmp_path / "own" / "README.md").read_text()
    settings = json.loads((tmp_path / "own" / "adapter_config.json").read_text())
    assert settings["rank_pattern"] == settings["alpha_pattern"] and settings["r"] == settings["lora_alpha"]
    one, own = (logits_of(open_target(tmp_path / name).model) for name in ("one", "own"))
    assert (one - own).abs().max() < 1e-5
    # A way that the line names.
    assert not any("rank_pattern" in line for line in export_run(path, tmp_path / "cut", ExportOptions(rank=1)).lines)
