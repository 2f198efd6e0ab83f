"""``hsplit eval``: perplexity and the scores of generated text, of a run or of an export."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from hsplit.config import DataSpec, RunConfig
from hsplit.config.reading import displayed
from hsplit.data import Example, TokenizedExample, check_ids, hold_out, read_source, template_of, tokenize
from hsplit.data.local_data import nothing_supervised
from hsplit.errors import InputError
from hsplit.evaluation.generation import generate
from hsplit.evaluation.perplexity import cross_entropy
from hsplit.evaluation.score_report import Evaluation, Generation
from hsplit.evaluation.scores import PERPLEXITY, SCORES, chosen_metrics, text_scores
from hsplit.evaluation.targets import Target, kind_of, open_target
from hsplit.models.packing import depends_on_length
from hsplit.run_directory import RunDirectory
from hsplit.seeds import hash_seed


@dataclass(frozen=True)
class TestInput:
    """One input with its references.

    Attributes:
        prompt: the model's input, separator included.
        responses: the data's answers to it, as in training.
        turns: see `Example`.
        unsupervised: by response, what of it is not learned, see `Example`; empty where all is.
    """

    # Not a test class, despite its name.
    __test__ = False

    prompt: str
    responses: tuple[str, ...]
    turns: str | None = field(default=None, compare=False)
    unsupervised: tuple[tuple[tuple[int, int], ...], ...] = ()

    @property
    def examples(self) -> list[Example]:
        """One example for each response, as in training."""
        spans = self.unsupervised or ((),) * len(self.responses)
        return [
            Example(self.prompt, response, None, self.turns, own)
            for response, own in zip(self.responses, spans, strict=True)
        ]

    def references(self, special_tokens: Iterable[str]) -> list[str]:
        """The responses as references: the first answer alone, without special tokens and surrounding blanks."""
        texts = []
        for example in self.examples:
            text = example.response[: example.unsupervised[0][0]] if example.unsupervised else example.response
            for token in special_tokens:
                text = text.replace(token, "")
            texts.append(text.strip())
        return texts


def grouped(examples: Iterable[Example]) -> list[TestInput]:
    """Group the examples of a prompt into one input, with the prompt of the first; all orders are kept."""
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(example.input_key, []).append(example)
    return [
        TestInput(
            group[0].prompt,
            tuple(example.response for example in group),
            group[0].turns,
            tuple(example.unsupervised for example in group) if any(example.unsupervised for example in group) else (),
        )
        for group in groups.values()
    ]


def without(inputs: Sequence[TestInput], keys: Collection[str]) -> list[TestInput]:
    """The inputs whose ``input_key`` (see `Example`) is not in ``keys``."""
    return [one for one in inputs if one.examples[0].input_key not in keys]


def limited(inputs: Sequence[TestInput], limit: int | None, seed: int) -> list[TestInput]:
    """At most ``limit`` inputs in their order, drawn by the seed from all of them, since files are often sorted."""
    if limit is None or limit >= len(inputs):
        return list(inputs)
    return [inputs[index] for index in sorted(random.Random(seed).sample(range(len(inputs)), limit))]


def evaluate(
    target: str | Path,
    data: str | Path | None = None,
    *,
    limit: int | None = None,
    beams: int = 1,
    max_new_tokens: int = 64,
    batch_size: int = 8,
    metrics: str | Sequence[str] = "all",
    client: str | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Evaluation:
    """Evaluate a run at its last checkpoint, or an exported directory.

    A run is evaluated through its split model, which computes as its holders do; ``eval.json`` and
    ``generations.jsonl`` are written into its directory.

    Args:
        target: directory of a run, a PEFT adapter or a merged model.
        data: a file of examples, as for ``data.source``; by default the test part of the run's own data. Inputs that
            the run trained on are skipped.
        limit: largest number of inputs, drawn by the run's seed.
        beams: of the search; 1 is greedy.
        max_new_tokens: most tokens of an answer.
        batch_size: examples or prompts computed at once.
        metrics: ``all``, or some of ``ppl``, ``bleu``, ``nist``, ``meteor``, ``rouge_l`` and ``cider``.
        client: of a run: the client whose split the model is cut at; by default the deepest split.
        progress: called with a line about each stage.

    Raises:
        InputError: an argument is wrong, a library is missing, or no input is left.
    """
    for name, value in (
        ("--limit", limit),
        ("--beams", beams),
        ("--max-new-tokens", max_new_tokens),
        ("--batch-size", batch_size),
    ):
        if value is not None and value < 1:
            raise InputError(f"{name}: {value} is too few; must be at least 1")
    if data is None:
        # Checked before loading, which takes a while.
        _refuse_without_test_part(Path(target), client)
    else:
        kind_of(Path(target), client)
    chosen = chosen_metrics(metrics)
    opened = open_target(Path(target), client)
    notes = list(opened.notes)
    if depends_on_length(opened.model.config):
        # In a batch all texts would get the frequencies of the longest; in training each has its own.
        batch_size = 1
    inputs, described = _inputs(opened, data, notes)
    inputs = limited(inputs, limit, opened.seed)
    inputs, tokenized = _fitting(opened, inputs, described, notes)

    scores: dict[str, float] = {}
    supervised = None
    if PERPLEXITY in chosen:
        progress(f"perplexity over {len(inputs)} inputs")
        examples = [example for own in tokenized for example in own]
        if not any(example.supervised for example in examples):
            raise nothing_supervised(described, "test", str(target))
        measured = cross_entropy(opened.model, opened.tokenizer, examples, batch_size)
        scores[PERPLEXITY], supervised = measured.perplexity, measured.tokens
    generations: tuple[Generation, ...] = ()
    of_text = [name for name in chosen if name in SCORES]
    if of_text:
        prompts = [own[0].ids[: own[0].prompt_length] for own in tokenized]
        max_new_tokens = _room(opened, prompts, max_new_tokens, notes)
        outputs = generate(
            opened.model,
            opened.tokenizer,
            prompts,
            beams=beams,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            progress=lambda done: progress(f"generated {done} of {len(inputs)}"),
        )
        special = opened.tokenizer.all_special_tokens
        generations = tuple(
            Generation(one.prompt, output, tuple(one.references(special)))
            for one, output in zip(inputs, outputs, strict=True)
        )
        progress("scores")
        found, skipped = text_scores(of_text, outputs, [one.references for one in generations])
        scores |= found
        notes += skipped
    evaluation = Evaluation(
        target=str(target),
        model=opened.how,
        data=described,
        inputs=len(inputs),
        references=sum(len(one.responses) for one in inputs),
        supervised_tokens=supervised,
        beams=beams,
        max_new_tokens=max_new_tokens,
        scores=scores,
        round=None if opened.state is None else opened.state.round,
        notes=tuple(notes),
        generations=generations,
    )
    if opened.run is not None:
        evaluation.write(Path(target))
    return evaluation


# -- inputs -------------------------------------------------------------------------------------------------------


def _inputs(opened: Target, data: str | Path | None, notes: list[str]) -> tuple[list[TestInput], str]:
    """The inputs, and their origin in words."""
    if data is None:
        return _test_part(opened)
    how = DataSpec() if opened.run is None else opened.run.job.data
    how = how.model_copy(update={"label": None, "separator": opened.separator, "limit": None})
    reading = read_source(str(data), how, opened.seed, template_of(opened.tokenizer))
    if reading.left_out:
        notes.append(str(reading))
    inputs = grouped(reading.examples)
    if opened.run is None:
        notes.append("what it was trained on is not known here, so no input was left out for that")
        return inputs, Path(data).name
    trained = _trained_on(opened, notes)
    left = without(inputs, trained)
    if len(left) < len(inputs):
        notes.append(f"{len(inputs) - len(left)} of {len(inputs)} inputs are left out: the run trained on them")
    if not left:
        raise InputError(
            f"--data {displayed(data)}: the run trained on every one of its {len(inputs)} inputs; give data that it "
            "has not seen"
        )
    return left, Path(data).name


def _refuse_without_test_part(path: Path, client: str | None) -> None:
    if kind_of(path, client) != "run":
        raise InputError(f"{displayed(path)}: is an exported directory, which has no data of its own; give --data FILE")
    run = RunConfig.load(RunDirectory.open(path).config)
    if all(one.data is not None for one in run.clients):
        raise InputError(
            f"{displayed(path)}: has no test part, as all of the run's data is the clients' own; give --data FILE"
        )
    if run.job.data.test == 0:
        raise InputError(
            f"{displayed(path)}: the run kept no test part of its data (job.data.test is 0); give --data FILE, or"
            " launch another with --set job.data.test=0.1"
        )


def _test_part(opened: Target) -> tuple[list[TestInput], str]:
    from hsplit.run.inputs import read_shared, shared_sha256

    assert opened.run is not None and opened.source is not None
    data = opened.run.job.data
    _same_data(opened, shared_sha256(opened.run))
    _, test, _ = read_shared(opened.run, opened.source, opened.tokenizer)
    return grouped(test), f"the test part ({data.test:g}) of {', '.join(Path(source).name for source in data.sources)}"


def _same_data(opened: Target, data_sha256: str) -> None:
    """Refuse data that has changed since the run began: it does not show what was trained on."""
    assert opened.run is not None and opened.state is not None
    if data_sha256 != opened.state.data_sha256:
        raise InputError(
            f"{', '.join(opened.run.job.data.sources)}: is not the data that the run was started with; put those back,"
            " or give --data FILE"
        )


def _trained_on(opened: Target, notes: list[str]) -> set[str]:
    """The inputs of the shared data that some client trained on, by their ``input_key``."""
    from hsplit.run.inputs import read_inputs

    run, source = opened.run, opened.source
    assert run is not None and source is not None
    if any(client.data is not None for client in run.clients):
        notes.append("what clients with data of their own trained on is not known here")
    try:
        inputs = read_inputs(run, source, opened.tokenizer)
        _same_data(opened, inputs.data_sha256)
    except InputError as error:
        notes.append(f"the run's data cannot be read, so no input was left out for having been trained on ({error})")
        return set()
    validation = run.job.validation
    keys: set[str] = set()
    for name, share in inputs.shares.items():
        if share is not None:
            # The same held-out part as on the client.
            train, _ = hold_out(share, validation.share, validation.max_examples, hash_seed(run.job.seed, name))
            keys.update(example.input_key for example in train)
    return keys


def _context(model: Any) -> int:
    """Number of tokens that the model has positions for."""
    return int(getattr(model.config, "max_position_embeddings", None) or 10**9)


def _fitting(
    opened: Target, inputs: Sequence[TestInput], described: str, notes: list[str]
) -> tuple[list[TestInput], list[list[TokenizedExample]]]:
    """The inputs whose examples all fit the model's context, and the examples of each.

    Raises:
        InputError: no input fits, or a token has no embedding.
    """
    context = _context(opened.model)
    every = iter(tokenize([example for one in inputs for example in one.examples], opened.tokenizer, sys.maxsize)[0])
    tokenized = [(one, list(islice(every, len(one.responses)))) for one in inputs]
    fitting = [(one, own) for one, own in tokenized if all(len(example.ids) <= context for example in own)]
    if not fitting:
        raise InputError(
            f"{described}: no input fits the model's context of {context} tokens; give shorter ones: --data"
        )
    if len(fitting) < len(inputs):
        notes.append(f"{len(inputs) - len(fitting)} inputs are left out: over the model's context of {context} tokens")
    for _, own in fitting:
        check_ids(own, opened.tokenizer, int(opened.model.config.vocab_size), described)
    return [one for one, _ in fitting], [own for _, own in fitting]


def _room(opened: Target, prompts: Sequence[Sequence[int]], max_new_tokens: int, notes: list[str]) -> int:
    """Tokens that an answer to the longest prompt has room for, at most ``max_new_tokens``."""
    context = _context(opened.model)
    room = min(max_new_tokens, context - max(map(len, prompts)))
    if room < max_new_tokens:
        notes.append(f"answers have {room} tokens at most: the model's context is {context}")
    return room
