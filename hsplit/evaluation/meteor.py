"""METEOR, by its authors' Java program as pycocoevalcap carries it."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from hsplit.evaluation.undefined import Undefined

_ARGUMENTS = ("-", "-", "-stdio", "-l", "en", "-norm")
_HEAP = "-Xmx2G"


def meteor(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus METEOR 1.5 for English, 0 to 1 (Denkowski and Lavie 2014), with its own tokenizer and lower-casing.

    Takes about ten seconds to start and up to 2 GB of memory, both the Java program's. pycocoevalcap's own driver of it
    hangs for good where the program dies, so it is driven from here.

    Args:
        outputs: one text an input, each on one line.
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
        # It finds its tables beside itself.
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
                return _asked(program, outputs, references)
            finally:
                program.kill()
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise Undefined(f"its Java program does not run here ({reason})") from None


def _asked(program: subprocess.Popen[str], outputs: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Statistics of each output, one line asked and one answered; then the score of all of them together."""
    statistics = []
    for output, own in zip(outputs, references, strict=True):
        _say(program, "SCORE", *map(_field, own), _field(output))
        statistics.append(_answer(program))
    _say(program, "EVAL", *statistics)
    # One score an output, then the corpus's.
    return [float(_answer(program)) for _ in range(len(outputs) + 1)][-1]


def _say(program: subprocess.Popen[str], *fields: str) -> None:
    assert program.stdin is not None
    program.stdin.write(" ||| ".join(fields) + "\n")
    program.stdin.flush()


def _answer(program: subprocess.Popen[str]) -> str:
    assert program.stdout is not None
    line = program.stdout.readline()
    if not line:
        raise OSError(f"it ended with exit code {program.wait()}")
    return line.strip()


def _field(text: str) -> str:
    """The text as a field of a line of fields that ``|||`` parts, none of which may be empty."""
    return " ".join(text.replace("|||", " ").split()) or "-"


def _jar() -> Path:
    found = importlib.util.find_spec("pycocoevalcap")
    for folder in (found and found.submodule_search_locations) or ():
        jar = Path(folder) / "meteor" / "meteor-1.5.jar"
        if jar.is_file():
            return jar
    raise Undefined("this pycocoevalcap comes without meteor-1.5.jar")
