"""Results of an evaluation: as a table, as JSON, and as files in the run's directory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hsplit.evaluation.scores import PERPLEXITY, SCORES
from hsplit.files import write_text_atomically

if TYPE_CHECKING:
    from rich.console import Group


@dataclass(frozen=True)
class Generation:
    """One generated answer.

    Attributes:
        prompt: the model's input.
        output: its answer.
        references: answers in the data.
    """

    prompt: str
    output: str
    references: tuple[str, ...]


@dataclass(frozen=True)
class Evaluation:
    """Result of ``hsplit eval``.

    Attributes:
        target: directory that was evaluated.
        model: its computation in words: split and where, or as one model.
        data: its data in words.
        inputs, references: their numbers.
        supervised_tokens: number of tokens of the perplexity; ``None`` without perplexity.
        beams, max_new_tokens: of the generation.
        scores: by name: ``ppl``, ``bleu`` (0 to 100), ``nist``, ``meteor``, ``rouge_l`` (0 to 1), ``cider``.
        round: completed rounds of the run; ``None`` for an exported directory.
        notes: skipped inputs and scores with the reasons, and other remarks.
        generations: one for each input; empty without scores of text.
    """

    target: str
    model: str
    data: str
    inputs: int
    references: int
    supervised_tokens: int | None
    beams: int
    max_new_tokens: int
    scores: dict[str, float]
    round: int | None
    notes: tuple[str, ...]
    generations: tuple[Generation, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """All fields but the generations."""
        return {name: value for name, value in asdict(self).items() if name != "generations"}

    def write(self, directory: Path) -> Sequence[Path]:
        """Write ``eval.json`` and, if there are generations, ``generations.jsonl`` into ``directory``."""
        files = [directory / "eval.json"]
        if self.generations:
            lines = [json.dumps(asdict(one), ensure_ascii=False) for one in self.generations]
            files.insert(0, directory / "generations.jsonl")
            write_text_atomically(files[0], "\n".join(lines) + "\n")
        write_text_atomically(files[-1], json.dumps(self.to_json(), indent=2, ensure_ascii=False) + "\n")
        return files

    def table(self) -> Group:
        """The scores as a table, with data and model below it."""
        from rich.box import SIMPLE_HEAD
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column("score")
        table.add_column("value", justify="right")
        titles = {PERPLEXITY: "perplexity", **{name: score.title for name, score in SCORES.items()}}
        for name, value in self.scores.items():
            table.add_row(titles[name], f"{value:.3f}")
        lines = [
            f"{self.inputs} inputs with {self.references} references: {self.data}",
            self.model,
            *([f"{self.supervised_tokens} supervised tokens"] if self.supervised_tokens is not None else []),
            *self.notes,
        ]
        return Group(table, Text("\n".join(lines)))
