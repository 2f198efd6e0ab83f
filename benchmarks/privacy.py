"""Tokens that a curious server reads from activations, and the cost of noise against it.

    python -m benchmarks.privacy [--data FILE] [--quick]        # or: hsplit bench privacy

For every split depth and noise: clients fine-tune on private texts with the product's own code, in this process, and
the server attacks their messages (``inversion.py``), before and after the training. The server is honest but curious:
it follows the protocol and knows the base model, the split, the size of the noise, and public texts of the same kind
whose restaurants (the ``name`` of a meaning representation) are none of the private ones.

The noise is given in units of ``privacy.noise_clip``, which is set to the median norm of a token's activations at that
depth: without noise nothing is clipped either. A cell is written down as soon as it is done, and a call with the same
settings continues where the last one ended; ``--cells N`` ends it after N.
"""

from __future__ import annotations

import argparse
import csv
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from benchmarks import common, inversion
from benchmarks.common import Table
from benchmarks.inversion import Observed
from hsplit.actors.client import ActivationNoise, Client
from hsplit.actors.executor import InProcess
from hsplit.actors.messages import WireTensor
from hsplit.config import DataSpec, RunConfig
from hsplit.config.job import BUILT_IN
from hsplit.data import Example, TokenizedExample, read_source, tokenize
from hsplit.data.examples import parse_meaning
from hsplit.models.loading import load_segment
from hsplit.models.lookup import find_model
from hsplit.models.packing import Packing
from hsplit.models.segment import BaseModel, Segment, SegmentSpec
from hsplit.models.tail import Tail
from hsplit.models.tokenizer import load_tokenizer
from hsplit.observe.observer import SilentDisplay
from hsplit.observe.tables import perplexities
from hsplit.run.coordinator import Inputs

CLUSTER = """
server: {memory_gb: 64, tflops: 2}
clients: [{name: client, count: 4, memory_gb: 8, tflops: 0.5}]
"""
POLICY = """
split: {split}
ranks: 8
importance: {{metric: equal}}
reinit: random
moments: drop
init: independent
freeze: never
replan: {{measured: false}}
"""
# Of the most frequent tokens of public texts so many are no content: they are guessed anyway.
FREQUENT = 100
SCOPES = ("all", "content", "names")
# Computing the activation of every token of the vocabulary takes long in deep layers.
NEAREST_TO = 4
TOP = 5


@dataclass(frozen=True)
class Attacked:
    """Share of the private texts that one attack recovers.

    Attributes:
        split, noise: layers on the client; noise in units of the clip.
        trained: whether the activations were sent by clients that have trained.
        attack: ``nearest``, ``linear`` or ``inverter``.
        knows: the attack's model of the clients' front: the ``base`` model's, or with the clients' ``adapters``
            (a server knows them: it aggregates them).
        scope: ``all`` tokens, those with ``content`` (not among the most frequent of public texts), or the ``names``
            in the prompts.
        positions: their number.
        top1, top5: share of them whose token is the first guess, or among the first five.
    """

    split: int
    noise: float
    trained: bool
    attack: str
    knows: str
    scope: str
    positions: int
    top1: float
    top5: float


@dataclass(frozen=True)
class Learned:
    """Result of the clients' training.

    Attributes:
        split, noise: as in :class:`Attacked`.
        clip: ``privacy.noise_clip``.
        val_ppl_before, val_ppl: validation perplexity as the run has it, with the noise, before and after training.
        val_ppl_noiseless: of the trained model without noise and clipping, as it is exported.
    """

    split: int
    noise: float
    clip: float
    val_ppl_before: float
    val_ppl: float
    val_ppl_noiseless: float


@dataclass(frozen=True)
class Texts:
    """Texts of the clients and of the server.

    Attributes:
        private: the clients' examples, in four shares.
        public: the server's examples.
        attacked: private examples whose activations are attacked.
        names: for each of those its positions in which a name of the prompt stands.
        frequent: the most frequent tokens of ``public``, in their order.
    """

    private: dict[str, list[Example]]
    public: list[TokenizedExample]
    attacked: list[TokenizedExample]
    names: list[list[int]]
    frequent: list[int]

    def scope(self, name: str, ids: Tensor) -> Tensor:
        """Return the mask of the attacked positions ``(n,)`` that count."""
        if name == "all":
            return torch.ones_like(ids, dtype=torch.bool)
        if name == "content":
            return ~torch.isin(ids, torch.tensor(self.frequent[:FREQUENT]))
        marks = torch.zeros_like(ids, dtype=torch.bool)
        start = 0
        for example, places in zip(self.attacked, self.names, strict=True):
            marks[[start + place for place in places]] = True
            start += len(example.ids)
        return marks


def main(arguments: Sequence[str] | None = None) -> None:
    """Do the cells that are missing, print the table and write it down."""
    options = _options(arguments)
    console = Console(width=150)
    benchmark = _Benchmark(options)
    benchmark.run(console)
    found = table(benchmark.learned, benchmark.attacked)
    common.show_table(console, *found)
    facts = benchmark.facts()
    for line in facts:
        console.print(line)
    text = common.markdown_table(*found) + "\n" + "".join(f"- {fact}\n" for fact in facts)
    (options.to / "privacy.md").write_text(text)
    _plot(benchmark.learned, benchmark.attacked, options.to / "privacy.svg")
    console.print(f"written to {options.to}")


def table(learned: Sequence[Learned], attacked: Sequence[Attacked]) -> Table:
    """Columns and cells, a row a split and noise."""
    columns = ["split", "noise", "perplexity before", "after", "without noise", "nearest", "linear", "inverter"]
    columns += ["best, content", "best, names", "best, trained"]
    cells = []
    for row in sorted(learned, key=lambda r: (r.split, r.noise)):
        perplexities = [_short(p) for p in (row.val_ppl_before, row.val_ppl, row.val_ppl_noiseless)]
        each = [best(attacked, row, False, "all", attack) for attack in ("nearest", "linear", "inverter")]
        over_all = [best(attacked, row, *of) for of in ((False, "content"), (False, "names"), (True, "all"))]
        shares = ["" if share is None else f"{share:.1%}" for share in (*each, *over_all)]
        cells.append([str(row.split), f"{row.noise:g}", *perplexities, *shares])
    return columns, cells


def best(
    attacked: Sequence[Attacked], cell: Learned, trained: bool, scope: str, attack: str | None = None
) -> float | None:
    """Share of tokens that ``attack``, or the most successful one, recovers in a cell; ``None`` if there is none."""
    return max(
        (
            a.top1
            for a in attacked
            if (a.split, a.noise, a.trained, a.scope) == (cell.split, cell.noise, trained, scope)
            and attack in (None, a.attack)
        ),
        default=None,
    )


def _short(perplexity: float) -> str:
    return f"{perplexity:.2f}" if perplexity < 1e4 else f"{perplexity:.1e}"


# -- cells --------------------------------------------------------------------------------------------------------


class _Benchmark:
    """The finished cells, and the inputs of the others."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.source = find_model(options.model)
        self.run_config = self._configured(0, 0.0, 1.0)
        self.base = BaseModel.of_job(self.source.spec, self.run_config.job)
        self.vocabulary = self.source.spec.vocab_size
        self.texts = texts_of(options, self.source.directory, self.run_config)
        self.made = inversion.scrambled(self.texts.public[: options.made], self.vocabulary, options.seed)
        settings = {key: value for key, value in vars(options).items() if key not in _NOT_OF_A_CELL}
        settings["data"] = Path(options.data).name
        self.header = {
            **common.machine_description("torch", "transformers"),
            "command": "hsplit bench privacy"
            + (f" --data {Path(options.data).name}" if options.data != BUILT_IN else "")
            + (" --quick" if options.quick else ""),
            "settings": "; ".join(f"{key} {value}" for key, value in sorted(settings.items())),
        }
        self.learned = [Learned(**row) for row in self._kept("utility.csv", Learned)]
        done = {(row.split, row.noise) for row in self.learned}
        self.attacked = [row for row in (Attacked(**r) for r in self._kept("attacks.csv", Attacked))
                         if (row.split, row.noise) in done]  # fmt: skip
        self.labels = self._kept("labels.csv", dict)

    def run(self, console: Console) -> None:
        """Do the missing cells, at most ``--cells`` of them."""
        options, done = self.options, {(row.split, row.noise) for row in self.learned}
        missing = [(s, n) for s in options.splits for n in options.noises if (s, n) not in done]
        if not self.labels:
            self.labels = self._labels_read()
        for split in dict.fromkeys(split for split, _ in missing[: options.cells]):
            front = load_segment(self.base, SegmentSpec(0, split, embedding=True))
            known = [inversion.activations(front, part) for part in (self.texts.public, self.made, self.texts.attacked)]
            clip = known[0].typical_norm
            alone = self._alone(front) if split <= NEAREST_TO else None
            for noise in (n for s, n in missing[: options.cells] if s == split):
                learned, attacked = self._cell(front, known, alone, noise, clip)
                self.learned.append(learned)
                self.attacked += attacked
                self._write()
                recovered = best(attacked, learned, False, "all")
                console.print(
                    f"split {split}, noise {noise:g}: perplexity {_short(learned.val_ppl)}, {recovered:.1%} of tokens"
                    " recovered"
                )

        self._write()

    def _write(self) -> None:
        to, in_order = self.options.to, sorted(self.learned, key=lambda row: (row.split, row.noise))
        common.write_rows(to / "labels.csv", self.labels, self.header)
        # The attacked texts first: a cell counts as done when its training is written.
        attacked = sorted(self.attacked, key=lambda row: (row.split, row.noise, row.trained))
        common.write_rows(to / "attacks.csv", attacked, self.header)
        common.write_rows(to / "utility.csv", in_order, self.header)

    def facts(self) -> list[str]:
        """Sentences beside the table."""
        texts = self.texts
        ids = torch.tensor([token for example in texts.attacked for token in example.ids])
        lines = []
        for scope in SCOPES:
            marks = texts.scope(scope, ids)
            # Of content the most frequent token that is any.
            guess = texts.frequent[0 if scope == "all" else min(FREQUENT, len(texts.frequent) - 1)]
            share = float((ids[marks] == guess).float().mean()) if bool(marks.any()) else 0.0
            lines.append(f"{scope}: {int(marks.sum())} positions; guessing the most frequent token: {share:.1%}")
        lines += [
            f"labels read out of the gradients that clients' tails return, wire {row['wire']}:"
            f" {float(row['recovered']):.1%} of {row['positions']}"
            for row in self.labels
        ]
        return lines

    def _kept(self, file: str, kind: Any) -> list[Any]:
        """Rows of an earlier call with the same settings."""
        path = self.options.to / file
        if not path.is_file():
            return []
        lines = path.read_text().splitlines()
        if f"# settings: {self.header['settings']}" not in lines:
            return []
        rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
        if kind is dict:
            return rows
        readers: dict[str, Callable[[str], Any]] = {"int": int, "float": float, "str": str}
        readers["bool"] = lambda text: text == "True"
        types = {name: readers[str(field.type)] for name, field in kind.__dataclass_fields__.items()}
        return [{name: types[name](value) for name, value in row.items()} for row in rows]

    def _configured(self, split: int, noise: float, clip: float) -> RunConfig:
        options = self.options
        overrides = {
            "job.model": options.model,
            "job.base": options.base,
            "job.batch_size": 1,
            "job.rounds": options.rounds,
            "job.local_steps": options.steps,
            "job.validation.max_examples": options.validation,
            "job.privacy.noise": noise,
            "job.privacy.noise_clip": clip,
        }
        with tempfile.TemporaryDirectory() as name:
            return common.configured(Path(name), CLUSTER, POLICY.format(split=split), overrides)

    # -- one cell -------------------------------------------------------------------------------------------------

    def _alone(self, front: Segment) -> Tensor:
        first = self.source.spec.config.bos_token_id or 0
        return inversion.alone(front, first, self.vocabulary)

    def _cell(
        self, front: Segment, known: Sequence[Observed], alone: Tensor | None, noise: float, clip: float
    ) -> tuple[Learned, list[Attacked]]:
        """Attack, train, and attack again.

        Args:
            front: of the base model.
            known: activations of the public texts, of made ones, and of those that are attacked.
            alone: activation of each token alone; ``None`` skips the *nearest* attack.
            noise, clip: the job's.
        """
        split = front.spec.last
        texts, options = self.texts, self.options
        adding, wire = ActivationNoise(noise, clip), self.run_config.job.wire
        embeddings = front.embeddings["embed_tokens"].weight
        assert isinstance(embeddings, Tensor)
        embeddings = embeddings.detach().float()

        def arrived(sent: Observed) -> Observed:
            return inversion.received(sent, adding, wire)

        def fitted(public: Observed, made: Observed) -> inversion.Linear:
            hidden, ids = (torch.cat([getattr(part, of) for part in (public, made)]) for of in ("hidden", "ids"))
            return inversion.Linear(Observed(hidden, ids, public.lengths + made.lengths), embeddings)

        found = []

        def count(trained: bool, attack: str, knows: str, guessed: Tensor, ids: Tensor) -> None:
            hits = guessed == ids[:, None]
            for scope in SCOPES:
                marks = texts.scope(scope, ids)
                if bool(marks.any()):
                    own = hits[marks]
                    top1, top5 = float(own[:, 0].float().mean()), float(own.any(dim=1).float().mean())
                    found.append(
                        Attacked(split, noise, trained, attack, knows, scope, len(own), round(top1, 5), round(top5, 5))
                    )

        public, made, before = (arrived(sent) for sent in known)
        linear = fitted(public, made)
        inverter = inversion.trained_inverter(linear, public, made, embeddings, options.inverter_steps, options.seed)
        if alone is not None:
            # Deep in the model all activations have a large part in common: the mean of the public texts' tokens.
            centred, table = before.hidden - public.hidden.mean(dim=0), alone - alone[public.ids].mean(dim=0)
            count(False, "nearest", "base", inversion.guesses(centred, table, TOP), before.ids)
        count(False, "linear", "base", inversion.guesses(linear.vectors(before), embeddings, TOP), before.ids)
        count(False, "inverter", "base", inverter.guesses(before, embeddings, TOP), before.ids)
        learned, trained = self._learned(split, noise, clip)
        after = arrived(inversion.activations(trained, texts.attacked))
        count(True, "inverter", "base", inverter.guesses(after, embeddings, TOP), after.ids)
        # A regression needs fewer texts than an inverter.
        few = [arrived(inversion.activations(trained, part[: len(part) // 2])) for part in (texts.public, self.made)]
        refitted = fitted(*few)
        count(True, "linear", "adapters", inversion.guesses(refitted.vectors(after), embeddings, TOP), after.ids)
        return learned, found

    def _learned(self, split: int, noise: float, clip: float) -> tuple[Learned, Segment]:
        """Fine-tune on the private texts; returns also a client's front at the end."""
        run = self._configured(split, noise, clip)
        display = SilentDisplay()
        inputs = Inputs(self.texts.private, "model", "data")
        with common.in_process(run, self.source.directory, inputs, display) as (coordinator, _):
            coordinator.run()
            executor = coordinator._executor
            assert isinstance(executor, InProcess)
            clients: list[Client] = [a for name, a in executor.actors.items() if name.startswith("client")]
            for client in clients:
                client._noise = ActivationNoise(0.0, clip)
            found = coordinator.validate()
            front = clients[0].holder.segment
        noiseless = min(found.loss, 700.0)
        (_, before), *_, (_, after) = perplexities(display.rows)
        exact = float(torch.tensor(noiseless, dtype=torch.float64).exp())
        return Learned(split, noise, clip, before, after, exact), front

    # -- labels ---------------------------------------------------------------------------------------------------

    def _labels_read(self) -> list[dict[str, Any]]:
        """The U-shape: how many labels the tails' gradients give away, by wire."""
        layers = self.source.spec.layers
        whole = load_segment(self.base, SegmentSpec(0, layers, embedding=True, tail=True))
        tail = whole.tail
        # The server attacks in a higher precision than the run's.
        exact = load_segment(replace(self.base, dtype=torch.float32), SegmentSpec(layers, layers, tail=True)).tail
        assert tail is not None and exact is not None
        deep, targets = [], []
        for example in self.texts.attacked[: self.options.label_examples]:
            ids, packing = torch.tensor(example.ids), Packing.of((len(example.ids),))
            with torch.no_grad():
                output = whole.run(whole.embed(ids, packing), packing, 0, layers)
            first = max(example.prompt_length, 1)
            deep.append(output[first - 1 : -1])
            targets.append(ids[first:])
        rows, labels = torch.cat(deep), torch.cat(targets)
        found = []
        for wire in ("fp32", "bf16", "int8"):
            sent = WireTensor.pack(rows, wire).unpack(rows.dtype, "cpu").requires_grad_()
            tail.token_losses(sent, labels).sum().backward()
            assert sent.grad is not None
            returned = WireTensor.pack(sent.grad, wire).unpack(rows.dtype, "cpu")
            assert isinstance(exact, Tail)
            read = inversion.labels_from_gradients(exact, sent.detach(), returned)
            share = float((read == labels).float().mean())
            found.append({"wire": wire, "positions": str(len(labels)), "recovered": f"{share:.5f}"})
        return found


# -- texts --------------------------------------------------------------------------------------------------------


def texts_of(options: argparse.Namespace, model: Path, run: RunConfig) -> Texts:
    """Deal the data out to clients and server so that no restaurant of one is one of the other's."""
    tokenizer = load_tokenizer(model)
    data = DataSpec(examples=4 * (options.public + options.private))
    examples = read_source(options.data, data, options.seed).examples
    draw = random.Random(options.seed)
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(_name(example.prompt) or example.prompt, []).append(example)
    order = sorted(groups)
    draw.shuffle(order)
    private: list[Example] = []
    while len(private) < options.private and len(order) > 1:
        private += groups[order.pop()]
    others = [example for name in order for example in groups[name]]
    draw.shuffle(private)
    draw.shuffle(others)
    private = private[: options.private]
    longest = run.job.max_length
    attacked, names = [], []
    for example in private[: options.attacked]:
        for one in tokenize([example], tokenizer, longest)[0]:
            attacked.append(one)
            names.append(_name_positions(example.prompt, one, tokenizer))
    public, _ = tokenize(others[: options.public], tokenizer, longest)
    frequent = Counter(token for example in public for token in example.ids)
    clients = [client.name for client in run.clients]
    shares = {name: private[index :: len(clients)] for index, name in enumerate(clients)}
    return Texts(shares, public, attacked, names, [token for token, _ in frequent.most_common()])


def _name(prompt: str) -> str | None:
    """The restaurant's name in a meaning representation; ``None`` where there is none."""
    return (parse_meaning(prompt.removesuffix(" =>")) or {}).get("name")


def _name_positions(prompt: str, example: TokenizedExample, tokenizer: Any) -> list[int]:
    """Tokens of ``example`` that have a letter of the name in its prompt."""
    name = _name(prompt)
    if name is None:
        return []
    first = prompt.index(name)
    spans = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    # A bos may stand before them.
    shift = example.prompt_length - len(spans)
    return [shift + i for i, (start, stop) in enumerate(spans) if start < first + len(name) and stop > first]


# -- showing ------------------------------------------------------------------------------------------------------


def _plot(learned: Sequence[Learned], attacked: Sequence[Attacked], to: Path) -> None:
    figure = common.new_figure(9, 3.6)
    left, right = figure.subplots(1, 2)
    splits = sorted({row.split for row in learned})
    for noise in sorted({row.noise for row in learned}):
        own = sorted((row for row in learned if row.noise == noise), key=lambda row: row.split)
        places = [splits.index(row.split) for row in own]
        recovered = [100 * (best(attacked, row, False, "all") or 0.0) for row in own]
        left.plot(places, recovered, "o-", label=f"noise {noise:g}")
        right.plot(recovered, [row.val_ppl for row in own], "o", label=f"noise {noise:g}")
        for row, share in zip(own, recovered, strict=True):
            right.annotate(str(row.split), (share, row.val_ppl), fontsize="x-small", xytext=(3, 3),
                           textcoords="offset points")  # fmt: skip
    left.set(xlabel="layers on the client", ylabel="tokens recovered by the best attack, %", ylim=(0, 102))
    left.set_xticks(range(len(splits)), labels=[str(split) for split in splits])
    right.set(xlabel="tokens recovered, % (numbers: layers on the client)", ylabel="validation perplexity, with noise",
              yscale="log")  # fmt: skip
    left.legend(fontsize="small")
    common.save_figure(figure, to)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = common.flags_of("privacy", __doc__)
    parser.add_argument("--data", default=BUILT_IN, help="file of texts; default: the built-in restaurants")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="default: the job's own")
    parser.add_argument("--base", default="bf16", help="values of the frozen weights (default: bf16)")
    parser.add_argument("--splits", type=int, nargs="+", help="layers on the client (default: 0 1 2 4 8 15)")
    parser.add_argument("--noises", type=float, nargs="+", help="units of the clip (default: 0 0.02 0.1)")
    parser.add_argument("--rounds", type=int, help="of the clients' training (default: 1)")
    parser.add_argument("--steps", type=int, help="local steps a round, one example each (default: 12)")
    parser.add_argument("--validation", type=int, help="examples held out by each client (default: 4)")
    parser.add_argument("--private", type=int, help="examples of all clients together (default: 400)")
    parser.add_argument("--public", type=int, help="examples that the server has (default: 500)")
    parser.add_argument("--made", type=int, help="texts with drawn tokens that the server makes (default: 200)")
    parser.add_argument("--attacked", type=int, help="private examples that are attacked (default: 24)")
    parser.add_argument("--inverter-steps", type=int, help="that the inverter is trained (default: 50)")
    parser.add_argument("--label-examples", type=int, help="whose labels are read from gradients (default: 6)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cells", type=int, help="end after so many cells; the next call goes on")
    parser.add_argument("--quick", action="store_true", help="small defaults, two or three minutes")
    options = parser.parse_args(arguments)
    for key, (full, quick) in _DEFAULTS.items():
        if getattr(options, key) is None:
            setattr(options, key, quick if options.quick else full)
    if Path(options.data).expanduser().is_file():
        options.data = str(Path(options.data).expanduser())
    return options


# A larger grid continues a smaller one.
_NOT_OF_A_CELL = ("to", "cells", "quick", "splits", "noises")
# In full, and with --quick.
_DEFAULTS: dict[str, tuple[Any, Any]] = {
    "splits": ([0, 1, 2, 4, 8, 15], [0, 2]),
    "noises": ([0.0, 0.02, 0.1], [0.0, 0.1]),
    "rounds": (1, 1),
    "steps": (12, 4),
    "validation": (4, 3),
    "private": (400, 100),
    "public": (500, 150),
    "made": (200, 60),
    "attacked": (24, 16),
    "inverter_steps": (50, 20),
    "label_examples": (6, 2),
}


if __name__ == "__main__":
    main()
