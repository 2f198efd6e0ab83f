"""Scores of generated text against its references, by the field's usual implementations.

A new score is one function and one line of ``SCORES``. METEOR is its authors' Java program, from pycocoevalcap.
"""

from __future__ import annotations

import importlib.util
import math
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hsplit.errors import InputError


class Undefined(Exception):
    """Raised by a score that has no value here, for the reason in its text; the evaluation continues without it."""


_ARGUMENTS = ("-", "-", "-stdio", "-l", "en", "-norm")
_HEAP = "-Xmx2G"


def meteor(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus METEOR 1.5 for English, 0 to 1 (Denkowski and Lavie 2014), with its own tokenizer and lower-casing.

    The Java program takes about ten seconds to start and up to 2 GB of memory. pycocoevalcap's own driver of it hangs
    forever if the program dies, so it is driven from here.

    Args:
        outputs: one text for each input, each on one line.
        references: of each output, likewise.

    Raises:
        Undefined: there is no ``java`` on PATH, or the program does not run there.
    """
    java = shutil.which("java")
    if java is None:
        raise Undefined("it is a Java program, and there is no java on PATH")
    jar = _jar()
    command = [java, _HEAP, "-jar", jar.name, *_ARGUMENTS]
    try:
        # The program looks for its tables in the working directory.
        with subprocess.Popen(
            command,
            cwd=jar.parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
        ) as program:
            try:
                return _corpus_score(program, outputs, references)
            finally:
                program.kill()
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise Undefined(f"its Java program does not run here ({reason})") from None


def _corpus_score(program: subprocess.Popen[str], outputs: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Get the statistics of each output, a line sent and a line received, then the score of all of them together."""
    statistics = []
    for output, own in zip(outputs, references, strict=True):
        _send(program, "SCORE", *map(_field, own), _field(output))
        statistics.append(_receive(program))
    _send(program, "EVAL", *statistics)
    # One score for each output, then the corpus's.
    return [float(_receive(program)) for _ in range(len(outputs) + 1)][-1]


def _send(program: subprocess.Popen[str], *fields: str) -> None:
    assert program.stdin is not None
    program.stdin.write(" ||| ".join(fields) + "\n")
    program.stdin.flush()


def _receive(program: subprocess.Popen[str]) -> str:
    assert program.stdout is not None
    line = program.stdout.readline()
    if not line:
        raise OSError(f"it ended with exit code {program.wait()}")
    return line.strip()


def _field(text: str) -> str:
    """The text as a non-empty field of a line, whose fields ``|||`` separates."""
    return " ".join(text.replace("|||", " ").split()) or "-"


def _jar() -> Path:
    found = importlib.util.find_spec("pycocoevalcap")
    for folder in (found and found.submodule_search_locations) or ():
        jar = Path(folder) / "meteor" / "meteor-1.5.jar"
        if jar.is_file():
            return jar
    raise Undefined("this pycocoevalcap comes without meteor-1.5.jar")


PERPLEXITY = "ppl"

References = Sequence[Sequence[str]]
"""References of each input: at least one each; their numbers may differ."""


@cache
def _tokenizer() -> Any:
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    return Tokenizer13a()


def tokens(text: str) -> list[str]:
    """Lower-cased tokens by sacrebleu's 13a (mteval-v13a's), for NIST and CIDEr.

    The scripts of published scores lower-case too. CIDEr's own tokenizer (Penn Treebank, in Java) also drops
    punctuation, which is kept here: scores are comparable with one another, and nearly with published ones.
    """
    return str(_tokenizer()(text.lower())).split()


def bleu(outputs: Sequence[str], references: References) -> float:
    """Corpus BLEU, 0 to 100 (Papineni et al. 2002), by sacrebleu: case kept, 13a tokens, all references.

    Inputs with fewer references than others are padded with ``None``, which sacrebleu ignores.
    """
    from sacrebleu.metrics import BLEU

    width = max(map(len, references))
    # sacrebleu's type lacks the None that its documentation allows.
    streams: Any = [[own[i] if i < len(own) else None for own in references] for i in range(width)]
    return float(BLEU().corpus_score(list(outputs), streams).score)


def nist(outputs: Sequence[str], references: References) -> float:
    """Corpus NIST of order 5 (Doddington 2002), by nltk, over :func:`tokens`; at least 0.

    Raises:
        Undefined: no output has five tokens, so that there is no 5-gram precision.
    """
    from nltk.translate.nist_score import corpus_nist

    hypotheses = [tokens(output) for output in outputs]
    if max(map(len, hypotheses)) < 5:
        raise Undefined("no output has five tokens, which its 5-grams need")
    return float(corpus_nist([[tokens(text) for text in own] for own in references], hypotheses))


def rouge_l(outputs: Sequence[str], references: References) -> float:
    """ROUGE-L F1, 0 to 1 (Lin 2004), without stemming: mean over outputs, each against its best reference."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    best = [
        scorer.score_multi(list(own), output)["rougeL"].fmeasure
        for output, own in zip(outputs, references, strict=True)
    ]
    return float(math.fsum(best) / len(best))


def cider(outputs: Sequence[str], references: References) -> float:
    """CIDEr-D, 0 to 10 (Vedantam et al. 2015), by pycocoevalcap, over :func:`tokens`.

    Raises:
        Undefined: there is only one input, so every n-gram's inverse document frequency is zero.
    """
    from pycocoevalcap.cider.cider import Cider

    if len(outputs) < 2:
        raise Undefined("it weighs words by the inputs they occur in, so it needs at least two inputs")
    found = {i: [" ".join(tokens(output))] for i, output in enumerate(outputs)}
    wanted = {i: [" ".join(tokens(text)) for text in own] for i, own in enumerate(references)}
    value, _ = Cider().compute_score(wanted, found)
    return float(value)


@dataclass(frozen=True)
class Score:
    """A score of generated text.

    Attributes:
        name: in ``--metrics`` and ``eval.json``.
        title: in tables.
        libraries: modules that it needs.
        compute: function of outputs and the references of each; may raise ``Undefined``.
    """

    name: str
    title: str
    libraries: tuple[str, ...]
    compute: Callable[[Sequence[str], References], float]


SCORES: Mapping[str, Score] = {
    score.name: score
    for score in (
        Score("bleu", "BLEU", ("sacrebleu",), bleu),
        Score("nist", "NIST", ("nltk", "sacrebleu"), nist),
        Score("meteor", "METEOR", ("pycocoevalcap",), meteor),
        Score("rouge_l", "ROUGE-L", ("rouge_score",), rouge_l),
        Score("cider", "CIDEr", ("pycocoevalcap", "sacrebleu"), cider),
    )
}


def chosen_metrics(wanted: str | Sequence[str]) -> tuple[str, ...]:
    """Parse ``--metrics``: ``all``, or names separated by commas, perplexity (``ppl``) among them.

    Raises:
        InputError: a name is unknown, or a library that a score needs is not installed.
    """
    known = (PERPLEXITY, *SCORES)
    parts = wanted.split(",") if isinstance(wanted, str) else wanted
    names = [part.strip().lower().replace("-", "_") for part in parts]
    if names == ["all"]:
        names = list(known)
    for name in names:
        if name not in known:
            raise InputError(f"--metrics: {name!r} is unknown; give all, or some of {', '.join(known)}")
    libraries = {library for name in names if name in SCORES for library in SCORES[name].libraries}
    missing = sorted(library for library in libraries if importlib.util.find_spec(library) is None)
    if missing:
        raise InputError(
            f"--metrics: not installed: {', '.join(missing)}; run: pip install 'hsplit[eval]', "
            f"or ask for --metrics {PERPLEXITY} alone"
        )
    return tuple(name for name in known if name in names)


def text_scores(
    names: Sequence[str], outputs: Sequence[str], references: References
) -> tuple[dict[str, float], list[str]]:
    """Compute scores by name, with a sentence about each that has no value for these texts or on this machine.

    Args:
        names: of ``SCORES``.
        outputs: one text for each input, at least one; line ends count as spaces.
        references: the references of each output.
    """
    flat = [" ".join(output.split()) for output in outputs]
    wanted = [[" ".join(text.split()) for text in own] for own in references]
    found, notes = {}, []
    for name in names:
        try:
            found[name] = SCORES[name].compute(flat, wanted)
        except Undefined as reason:
            notes.append(f"{SCORES[name].title} is left out: {reason}")
    return found, notes
