"""Scores of generated text against figures worked out by hand, with one and with several references."""

from __future__ import annotations

import importlib.util
import math
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest

from hsplit.errors import InputError
from hsplit.evaluation.scores import SCORES, chosen_metrics, text_scores

IN_PYTHON = ["bleu", "nist", "rouge_l", "cider"]
PERFECT = ["the old mill serves cheap pasta by the river .", "a coffee shop near the city centre called Zizzi ."]
# Unequally many references, the output the last of its own.
REFERENCES = [["nothing like it at all here", "or that one", PERFECT[0]], [PERFECT[1]]]


def test_perfect_outputs_have_the_best_scores_whatever_the_number_of_references() -> None:
    scores, notes = text_scores(IN_PYTHON, PERFECT, REFERENCES)
    assert not notes
    assert scores["bleu"] == pytest.approx(100.0) and scores["rouge_l"] == 1.0
    single, _ = text_scores(IN_PYTHON, PERFECT, [[PERFECT[0]], [PERFECT[1]]])
    assert single["cider"] == pytest.approx(10.0)
    # CIDEr is the mean over references, so that ones unlike the output lower it.
    assert scores["cider"] == pytest.approx((10 / 3 + 10) / 2, rel=1e-6)


def test_outputs_without_a_word_of_a_reference_score_nothing() -> None:
    scores, _ = text_scores(IN_PYTHON, ["x y z u v w", "q r s t p o"], REFERENCES)
    assert scores == {"bleu": 0.0, "nist": 0.0, "rouge_l": 0.0, "cider": 0.0}


def test_rouge_l_is_the_f1_of_the_best_reference() -> None:
    # Longest common subsequence "a b c": recall 3/4, precision 3/5; the other reference has "a" alone.
    scores, _ = text_scores(["rouge_l"], ["a x b y c"], [["a q q q q q q", "a b c d"]])
    assert scores["rouge_l"] == pytest.approx(2 * 0.75 * 0.6 / (0.75 + 0.6))


def test_bleu_is_the_geometric_mean_with_brevity_penalty_over_every_reference() -> None:
    # n-gram precisions 5/6, 3/5, 1/4 from both references together, and 4-grams by sacrebleu's smoothing: 1 / (2 * 3);
    # as long as the nearest reference, so no penalty.
    scores, _ = text_scores(["bleu"], ["a b c d e f"], [["a b c x x y", "z z d e z z z z"]])
    expected = 100 * math.exp((math.log(5 / 6) + math.log(3 / 5) + math.log(1 / 4) + math.log(1 / 6)) / 4)
    assert scores["bleu"] == pytest.approx(expected)


def test_nist_is_the_information_of_the_n_grams_that_are_found() -> None:
    # Five different words: log2 5 bits a word, and a longer n-gram says nothing new. Case is not counted.
    scores, _ = text_scores(["nist"], ["A b c d e"], [["a B c d e"]])
    assert scores["nist"] == pytest.approx(math.log2(5))


def test_line_ends_count_as_spaces_and_empty_outputs_are_scored() -> None:
    assert text_scores(["rouge_l"], ["a\nb"], [["a b"]])[0] == {"rouge_l": 1.0}
    assert text_scores(["bleu", "rouge_l", "cider"], ["", "a"], [["a"], ["b"]])[0]["bleu"] == 0.0


@pytest.mark.parametrize(
    ("name", "outputs", "why"),
    [("cider", ["a b c d e"], "at least two inputs"), ("nist", ["a b", "c"], "five tokens")],
)
def test_a_score_that_is_undefined_for_the_texts_is_left_out_with_the_reason(
    name: str, outputs: list[str], why: str
) -> None:
    scores, notes = text_scores([name, "rouge_l"], outputs, [["a b c d e"]] * len(outputs))
    assert list(scores) == ["rouge_l"]
    assert len(notes) == 1 and notes[0].startswith(f"{SCORES[name].title} is left out: ") and why in notes[0]


def test_meteor_is_left_out_with_a_note_where_there_is_no_java(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    scores, notes = text_scores(["meteor", "rouge_l"], PERFECT, REFERENCES)
    assert list(scores) == ["rouge_l"]
    assert notes == ["METEOR is left out: it is a Java program, and there is no java on PATH"]


def test_meteor_is_left_out_with_a_note_where_java_cannot_run_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\nexit 1\n")
    java.chmod(java.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    scores, notes = text_scores(["meteor"], PERFECT, REFERENCES)
    assert not scores and len(notes) == 1 and "its Java program does not run here" in notes[0]


@pytest.mark.real
@pytest.mark.skipif(shutil.which("java") is None, reason="METEOR needs java on PATH")
def test_meteor_of_perfect_and_of_unlike_outputs() -> None:
    scores, notes = text_scores(["meteor"], PERFECT, REFERENCES)
    assert not notes and scores["meteor"] == pytest.approx(1.0)
    # Fields of its protocol that stand in a text, and an empty output, must not confuse it.
    unlike, _ = text_scores(["meteor"], ["", "x ||| y"], REFERENCES)
    assert unlike["meteor"] < 0.05


def test_metrics_are_chosen_by_name_in_their_own_order() -> None:
    assert chosen_metrics("all") == ("ppl", *SCORES)
    assert chosen_metrics("ROUGE-L, ppl") == chosen_metrics(["ppl", "rouge_l"]) == ("ppl", "rouge_l")
    with pytest.raises(InputError, match="--metrics: 'blue' is unknown; give all, or some of ppl, bleu"):
        chosen_metrics("ppl,blue")


def test_a_missing_library_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec

    def without(name: str, *rest: Any) -> Any:
        return None if name in ("sacrebleu", "nltk", "rouge_score", "pycocoevalcap") else find(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    with pytest.raises(InputError, match=r"not installed: nltk, sacrebleu; run: pip install 'hsplit\[eval\]'"):
        chosen_metrics("nist")
    assert chosen_metrics("ppl") == ("ppl",)
