"""What an evaluation found: as a table, as JSON, and as files in the run's directory."""

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
        prompt: what the model was given.
        output: its answer.
        references: what it is compared with.
    """

    prompt: str
    output: str
    references: tuple[str, ...]


@dataclass(frozen=True)
class Evaluation:
    """What ``hsplit eval`` found.

    Attributes:
        target: what was evaluated, as it was given.
        model: in words, how it computes: split and where, or as one model.
        data: in words, what it was evaluated on.
        inputs, references: how many of each.
        supervised_tokens: that perplexity is over; ``None`` where it was not asked for.
        beams, max_new_tokens: of the generation.
        scores: by name: ``ppl``, ``bleu`` (0 to 100), ``nist``, ``meteor``, ``rouge_l`` (0 to 1), ``cider``.
        round: rounds that the run had done; ``None`` for an exported directory.
        notes: what was left out and why, and other things to know.
        generations: one an input; empty where only perplexity was asked for.
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
        """All but the generations."""
        return {name: value for name, value in asdict(self).items() if name != "generations"}

    def write(self, directory: Path) -> Sequence[Path]:
        """Write ``eval.json`` and, where there are generations, ``generations.jsonl`` into ``directory``."""
        files = [directory / "eval.json"]
        if self.generations:
            lines = [json.dumps(asdict(one), ensure_ascii=False) for one in self.generations]
            files.insert(0, directory / "generations.jsonl")
            write_text_atomically(files[0], "\n".join(lines) + "\n")
        write_text_atomically(files[-1], json.dumps(self.to_json(), indent=2, ensure_ascii=False) + "\n")
        return files

    def table(self) -> Group:
        """The scores as a table, and below it what they were measured on."""
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
