"""What every participant has: its data, its part of the model with adapters, and what a round asks of it. Ray-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from hsplit.actors.holder_actor import HolderActor
from hsplit.actors.profiling import measured_with_part
from hsplit.config import Job, Policy
from hsplit.data import Batch, Example, TokenizedExample, check_ids, collate, read_examples, validation_batches
from hsplit.data.local_data import LocalData
from hsplit.errors import InputError
from hsplit.lora.carried_moments import CarriedMoments
from hsplit.lora.holder import Holder, RoundUpdate
from hsplit.lora.importance_probe import ImportanceProbe
from hsplit.lora.weight_holder import WeightHolder
from hsplit.models.packing import Packing, pack_rows
from hsplit.models.segment import (
    BaseModel,
    Segment,
    SegmentSpec,
    linear_shapes,
    load_segment,
    load_tokenizer,
    model_config,
    targeted,
)


@dataclass(frozen=True)
class DataReport:
    """What a participant found in its data.

    Attributes:
        client: whose data.
        train, validation: examples in use.
        validation_batches: batches that the validation examples make.
        too_long: examples over ``job.max_length``, left out whole.
        supervised, validation_supervised: tokens of either that the model is to predict.
    """

    client: str
    train: int
    validation: int
    validation_batches: int
    too_long: int
    supervised: int
    validation_supervised: int


class Participant(HolderActor[Holder | WeightHolder]):
    """Holds data and a segment that begins with the embedding.

    Args:
        name: its name.
        job, policy: the run's settings.
        base: the base model as this participant reads it.
        device: where it computes.
        measure: follow the peak of allocated memory, see :meth:`peak_bytes`.
    """

    def __init__(
        self, name: str, job: Job, policy: Policy, base: BaseModel, device: str = "cpu", measure: bool = True
    ) -> None:
        super().__init__(name, job, policy, base, device, measure)
        self._data: list[LocalData] = []
        self._validation: list[Batch] = []
        self._kept: Segment | None = None
        self._carried: CarriedMoments | None = None
        self._split = 0
        self._batches: dict[int, list[Batch]] = {}

    # -- set-up ---------------------------------------------------------------------------------------------------

    def load_data(self, shares: Mapping[str, Sequence[Example] | None], own: str | None) -> DataReport:
        """Tokenize data and hold out a validation share of it, client by client.

        Args:
            shares: parts of the job's shared source by client: this one's alone, or everybody's on a single node;
                ``None`` for a client with a file of its own.
            own: path of that file, read here and nowhere else.

        Raises:
            InputError: the file is unusable, too little of the data fits ``job.max_length``, or it holds tokens that
                the model has no embedding for; without a word of a file of its own, since what is raised here goes to
                the driver, and into the run's log.
        """
        job = self._job
        try:
            tokenizer = load_tokenizer(self._base.directory)
        except InputError as error:
            raise InputError(f"client {self.name}: {error}") from None
        vocab_size = int(model_config(self._base.directory).vocab_size)
        self._data = []
        for client, share in shares.items():
            try:
                if share is None:
                    assert own is not None
                    try:
                        examples = self._read(own, tokenizer)
                    except InputError as error:
                        where = f"client {client}: data"
                        raise InputError(f"{where}: {error}", f"{where}: {error.discreet}") from None
                else:
                    examples = list(share)
                data = LocalData(client, examples, tokenizer, job, None if share is not None else f"data {own}")
                check_ids([*data.train, *data.held_out], tokenizer, vocab_size, f"client {client}: its data")
            except InputError as error:
                raise InputError(error.discreet if share is None else str(error)) from None
            self._data.append(data)
        # Whoever has several clients' data has as many times their batch size.
        held_out = [example for data in self._data for example in data.held_out]
        self._validation = validation_batches(held_out, job.batch_size * len(self._data))
        return DataReport(
            client=self.name,
            train=sum(len(data.train) for data in self._data),
            validation=len(held_out),
            validation_batches=len(self._validation),
            too_long=sum(data.too_long for data in self._data),
            supervised=sum(example.supervised for data in self._data for example in data.train),
            validation_supervised=sum(example.supervised for example in held_out),
        )

    def _read(self, own: str, tokenizer: Any) -> list[Example]:
        data = self._job.data
        return read_examples(
            own,
            examples=data.examples,
            seed=self._job.seed,
            label=data.label,
            separator=data.separator,
            limit=data.limit,
            chat=chat_template(tokenizer),
        )

    @measured_with_part
    def configure(self, split: int, ranks: dict[str, int]) -> None:
        """Read layers ``[0, split)`` and make adapters of ``ranks``; the round is begun by :meth:`restart`.

        Whatever was under way before is forgotten.
        """
        self._forget()
        self._hold(split, ranks, None)

    def _forget(self) -> None:
        """Drop what was held and begun."""
        self._holder = self._kept = self._carried = None
        self._batches.clear()

    @measured_with_part
    def shrink(self, split: int, ranks: Mapping[str, int]) -> None:
        """Drop the adapters, and the layers from ``split`` on, ahead of :meth:`reconfigure` to ``ranks``.

        A step of its own, so that what an old plan held does not count as the new one's memory.
        """
        self._carried = None
        if self._holder is not None:
            if isinstance(self._holder, Holder):
                self._carried = self._holder.carried_moments(ranks)
            held, self._holder = self._holder.segment, None
            held.remove_adapters()
            self._kept = load_segment(self._base, replace(held.spec, last=min(split, held.spec.last)), kept=held)

    @measured_with_part
    def reconfigure(self, split: int, ranks: dict[str, int], update: RoundUpdate) -> None:
        """Follow a change of plan between two rounds: read new layers, change ranks (law E4).

        Call it after :meth:`shrink`. A client that had no part so far may join like this too.
        """
        kept, self._kept = self._kept, None
        carried, self._carried = self._carried, None
        self._hold(split, ranks, kept)
        self.holder.restart(update)
        if carried is not None and isinstance(self.holder, Holder):
            self.holder.go_on_from(carried, update)

    @measured_with_part
    def release(self) -> None:
        """Drop every layer and adapter: the client has no part in the rounds that follow."""
        self._forget()

    def _hold(self, split: int, ranks: dict[str, int], kept: Segment | None) -> None:
        """Hold layers ``[0, split)``; layers of ``kept`` are not read again."""
        raise NotImplementedError

    def _hold_segment(self, spec: SegmentSpec, ranks: dict[str, int], kept: Segment | None, *, quantized: bool) -> None:
        segment = load_segment(self._base, spec, quantized=quantized, device=self._device, kept=kept)
        shapes = targeted(linear_shapes(segment.config), self._job.targets)
        self._split, self._shapes = spec.last, shapes
        self._holder = Holder(
            self.name, segment, shapes, ranks, self._job, self._policy, self._base.dtype, self._device
        )

    # -- rounds ---------------------------------------------------------------------------------------------------

    @measured_with_part
    def rejoin(self, tensors: dict[str, Tensor] | None, update: RoundUpdate) -> None:
        """Begin a round after a failure, with the optimizer's moments as they were last kept.

        Args:
            tensors: what :meth:`state` gave last; it counts where the ranks are still the same.
            update: the whole residual and what the adapters restart with.
        """
        if tensors is not None and self.holder.fits(tensors):
            self.holder.load_state(tensors)
        self.holder.restart(update)

    # -- inside ---------------------------------------------------------------------------------------------------

    def _new_probe(self) -> ImportanceProbe:
        assert isinstance(self.holder, Holder)
        return ImportanceProbe(self.holder.segment, self.holder.adapters, self._shapes)

    def _front(self, batch: Batch, probing: bool = False) -> Tensor:
        segment = self.holder.segment
        packing = Packing.of(batch.lengths, self._device)
        ids = pack_rows(batch.ids, batch.lengths).to(self._device)
        embedded = segment.embed(ids, packing)
        if probing:
            # The embedding is frozen: else no gradient would come to the first layer's first linears.
            embedded.requires_grad_()
        return segment.run(embedded, packing, 0, self._split)

    def _step_batches(self, step: int) -> list[Batch]:
        """Batches of local step ``step`` (counted over the run), kept until it is done."""
        if step not in self._batches:
            self._batches[step] = [self._batch(examples) for examples in self._drawn(step)]
        return self._batches[step]

    def _batch(self, examples: Sequence[TokenizedExample]) -> Batch:
        batch = collate(examples)
        return batch if self._job.fast.packed else batch.padded()

    def _drawn(self, step: int) -> list[list[TokenizedExample]]:
        """The examples of each of the step's ``grad_accumulation`` batches."""
        count = self._job.grad_accumulation
        return [
            [example for data in self._data for example in data.draw(step * count + index)] for index in range(count)
        ]

    def _loss_sum(self, hidden: Tensor, batch: Batch) -> Tensor:
        tail = self.holder.segment.tail
        assert tail is not None
        targets = pack_rows(batch.targets, batch.lengths).to(self._device)
        return tail.supervised_losses(hidden, targets, self._job.fast.loss_rows).sum()


def chat_template(tokenizer: Any) -> Any:
    """The tokenizer's chat template as ``data.read_examples`` wants it, or ``None`` if it has none."""
    if not getattr(tokenizer, "chat_template", None):
        return None

    def render(messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt))

    return render


def base_model(directory: Path, job: Job) -> BaseModel:
    """The base as ``job`` defines it, read from ``directory``; ``job.dtype`` is already resolved."""
    from hsplit.models.dtype import resolve_dtype

    return BaseModel(directory, job.base, resolve_dtype(job.dtype))
