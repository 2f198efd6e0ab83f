"""The data of a client's actor: its examples, tokenized where it runs, and the batches of its steps. Ray-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from hsplit.config import Job
from hsplit.data import (
    Batch,
    Example,
    Reading,
    TokenizedExample,
    check_ids,
    collate,
    read_source,
    template_of,
    validation_batches,
)
from hsplit.data.batches import probe_batch
from hsplit.data.local_data import LocalData
from hsplit.errors import InputError
from hsplit.models.spec import ModelSpec
from hsplit.models.tokenizer import load_tokenizer
from hsplit.planning.plan import HolderPlan
from hsplit.seeds import hash_seed


@dataclass(frozen=True)
class DataReport:
    """Numbers of a client's data.

    Attributes:
        client: its name.
        train, validation: examples in use.
        too_long: examples over ``job.max_length``, left out whole.
        supervised, validation_supervised: tokens of either that the model is to predict.
        vocabulary: number of distinct token ids in all of them.
        skipped: rows of a file of its own that were left out.
        reading: how that file was read, in a line without data.
    """

    client: str
    train: int
    validation: int
    too_long: int
    supervised: int
    validation_supervised: int
    vocabulary: int
    skipped: int = 0
    reading: str = ""


class TrainingData:
    """Tokenized examples of one client, or of all clients on a single node, and the batches drawn from them.

    Args:
        name: the actor's.
        job: the run's settings.
        model: the base model, whose tokenizer is used.
        cuts: batches are cut into microbatches.

    Attributes:
        clients: each client's examples.
        validation: batches of everything that is held out.
        vocabulary: token ids that any batch may have, increasing, ``(n,)`` int64.
    """

    def __init__(self, name: str, job: Job, model: ModelSpec, cuts: bool) -> None:
        self.clients: list[LocalData] = []
        self.validation: list[Batch] = []
        self.vocabulary = torch.empty(0, dtype=torch.int64)
        self._name, self._job, self._model, self._cuts = name, job, model, cuts
        self._begun: dict[int, dict[int, Batch]] = {}
        self._part: HolderPlan | None = None
        self._rows = job.batch_size
        self._round_step = self._round_examples = 0

    def follow(self, part: HolderPlan) -> None:
        """Bring as many examples to a step, as often, as ``part`` says from now on."""
        self._part, self._rows = part, part.rows or self._job.batch_size
        self._make_validation()

    def begin_round(self, step: int, examples: int) -> None:
        """Set the place in the data that a round begins at; see :meth:`Participant.begin_round`."""
        self._round_step, self._round_examples = step, examples

    def _make_validation(self) -> None:
        # An actor with several clients' data has as many times their rows.
        held_out = [example for data in self.clients for example in data.held_out]
        self.validation = validation_batches(held_out, self._rows * len(self.clients)) if held_out else []

    def load(self, shares: Mapping[str, Sequence[Example] | None], own: str | None) -> DataReport:
        """Tokenize data and hold out a validation share of it, client by client.

        Args:
            shares: examples from the job's shared source by client; ``None`` for a client with a file of its own.
            own: path of that file, read here and nowhere else.

        Raises:
            InputError: the file is unusable, too little of the data fits ``job.max_length``, or it holds tokens that
                the model has no embedding for. Nothing of a client's own file is quoted: the error goes to the driver
                and into the run's log.
        """
        job = self._job
        try:
            tokenizer = load_tokenizer(self._model.directory)
        except InputError as error:
            raise InputError(f"client {self._name}: {error}") from None
        vocab_size = self._model.vocab_size
        self.clients, own_reading = [], None
        for client, share in shares.items():
            try:
                if share is None:
                    assert own is not None
                    try:
                        own_reading = self._read(own, tokenizer)
                        examples = own_reading.examples
                    except InputError as error:
                        where = f"client {client}: data"
                        raise InputError(f"{where}: {error}", f"{where}: {error.discreet}") from None
                else:
                    examples = list(share)
                data = LocalData(client, examples, tokenizer, job, None if share is not None else f"data {own}")
                check_ids([*data.train, *data.held_out], tokenizer, vocab_size, f"client {client}: its data")
            except InputError as error:
                raise InputError(error.discreet if share is None else str(error)) from None
            self.clients.append(data)
        held_out = [example for data in self.clients for example in data.held_out]
        self._make_validation()
        ids = {token for data in self.clients for token in data.token_ids(job)}
        self.vocabulary = torch.tensor(sorted(ids), dtype=torch.int64)
        return DataReport(
            client=self._name,
            train=sum(len(data.train) for data in self.clients),
            validation=len(held_out),
            too_long=sum(data.too_long for data in self.clients),
            supervised=sum(example.supervised for data in self.clients for example in data.train),
            validation_supervised=sum(example.supervised for example in held_out),
            vocabulary=len(ids),
            skipped=0 if own_reading is None else own_reading.left_out,
            reading="" if own_reading is None else str(own_reading),
        )

    def _read(self, own: str, tokenizer: Any) -> Reading:
        return read_source(own, self._job.data, self._job.seed, template_of(tokenizer))

    def step_batches(self, step: int) -> dict[int, Batch]:
        """Draw the batches of local step ``step`` (counted over the run), by microbatch; kept until :meth:`drop`."""
        if step not in self._begun:
            job, batches = self._job, self._job.grad_accumulation
            self._begun[step] = {}
            assert self._part is not None, f"{self._name} has no part in a plan"
            turns = self._part.turns(self._round_step, step)
            begun = self._round_examples + turns * batches * self._rows
            parts = self._part.parts(job) if self._cuts else 1
            for batch in range(batches):
                first = begun + batch * self._rows
                drawn = [example for data in self.clients for example in data.draw(first, self._rows)]
                # As equal a number in each part as can be.
                borders = [len(drawn) * part // parts for part in range(parts + 1)]
                for part, (start, stop) in enumerate(pairwise(borders)):
                    micro = batch * job.pipeline.microbatches + part
                    self._begun[step][micro] = self._batch(drawn[start:stop])
        return self._begun[step]

    def _batch(self, examples: Sequence[TokenizedExample]) -> Batch:
        batch = collate(examples)
        return batch if self._job.fast.packed else batch.padded()

    def drop(self, step: int | None = None) -> None:
        """Forget the batches of ``step``, or of every step."""
        if step is None:
            self._begun.clear()
        else:
            self._begun.pop(step, None)

    def probe_batch(self, data: LocalData, round_: int, tokens: int) -> Batch:
        """Draw a batch for the importance probe of ``round_`` from one client's training examples.

        It depends on run seed, client and round alone, and not on the training batches.

        Args:
            data: one of :attr:`clients`.
            round_: round of the probe.
            tokens: supervised tokens wanted; fewer are used where a batch's examples have fewer.
        """
        seed = hash_seed(self._job.seed, data.client, "probe", round_)
        return probe_batch(data.train, tokens, self._rows, seed)
