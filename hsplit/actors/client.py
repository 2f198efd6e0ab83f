"""The client: its data, the embedding, its shallow layers, and the tail where labels stay at home. Ray-free."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hsplit.actors.messages import Activations, ForwardReport, LossReport, WireTensor
from hsplit.actors.peak_memory import PeakMemory, measured, measured_in_first_steps, measured_once_a_round
from hsplit.config import Job, Policy
from hsplit.data import (
    Batch,
    BatchSampler,
    Example,
    TokenizedExample,
    collate,
    hold_out,
    read_examples,
    tokenize,
    validation_batches,
)
from hsplit.data.probe_batch import probe_batch
from hsplit.errors import InputError
from hsplit.lora.holder import HeldAdapters, Holder, RoundUpdate, hash_seed
from hsplit.lora.importance_probe import ImportanceProbe, ProbedRows
from hsplit.models.packing import Packing, pack_rows
from hsplit.models.segment import (
    BaseModel,
    LinearShape,
    Segment,
    SegmentSpec,
    linear_shapes,
    load_segment,
    targeted,
)
from hsplit.scheduling.importance import ImportanceReport

# Steps count from 0 and validation is -1; a probe's noise must repeat neither's.
_PROBE = -2


@dataclass(frozen=True)
class DataReport:
    """What a client found in its data.

    Attributes:
        client: whose data.
        train, validation: examples in use.
        validation_batches: batches that the validation examples make.
        too_long: examples over ``job.max_length``, left out whole.
    """

    client: str
    train: int
    validation: int
    validation_batches: int
    too_long: int


class Client:
    """Holds private data and the front segment; talks in hidden states and adapters only.

    Args:
        name: client name.
        job, policy: the run's settings.
        base: the base model as this client reads it.
        device: where it computes.
        measure: follow the peak of allocated memory, see :meth:`peak_bytes`.
    """

    def __init__(
        self, name: str, job: Job, policy: Policy, base: BaseModel, device: str = "cpu", measure: bool = True
    ) -> None:
        self.name = name
        self._job, self._policy, self._base = job, policy, base
        self._device = torch.device(device)
        self._memory = PeakMemory(self._device, measure)
        self._train: list[TokenizedExample] = []
        self._validation: list[Batch] = []
        self._sampler: BatchSampler | None = None
        self._holder: Holder | None = None
        self._kept: Segment | None = None
        self._split = 0
        self._shapes: list[LinearShape] = []
        self._probed: tuple[ImportanceProbe, Batch, Tensor] | None = None
        self._batches: dict[int, list[Batch]] = {}
        self._sent: dict[tuple[int, int], Tensor] = {}

    # -- set-up ---------------------------------------------------------------------------------------------------

    def load_data(self, shared: list[Example] | None, own: str | None) -> DataReport:
        """Tokenize this client's data and hold out its validation share.

        Args:
            shared: its part of the job's shared source, or ``None``.
            own: path of a file of its own, read here and nowhere else, or ``None``.

        Raises:
            InputError: the file is unusable, or too little of the data fits ``job.max_length``.
        """
        from transformers import AutoTokenizer

        job = self._job
        tokenizer = AutoTokenizer.from_pretrained(self._base.directory)
        if own is not None:
            shared = read_examples(
                own,
                examples=job.data.examples,
                seed=job.seed,
                label=job.data.label,
                separator=job.data.separator,
                limit=job.data.limit,
                chat=chat_template(tokenizer),
            )
        assert shared is not None
        train, held_out = hold_out(
            shared,
            share=job.validation.share,
            max_examples=job.validation.max_examples,
            seed=hash_seed(job.seed, self.name),
        )
        self._train, too_long_train = tokenize(train, tokenizer, job.max_length)
        validation, too_long_validation = tokenize(held_out, tokenizer, job.max_length)
        if not self._train or not validation:
            raise InputError(
                f"client {self.name}: no example for training and validation fits job.max_length = "
                f"{job.max_length} tokens; raise it or shorten the data"
            )
        self._validation = validation_batches(validation, job.batch_size)
        self._sampler = BatchSampler(len(self._train), job.batch_size, job.seed, self.name)
        return DataReport(
            client=self.name,
            train=len(self._train),
            validation=len(validation),
            validation_batches=len(self._validation),
            too_long=too_long_train + too_long_validation,
        )

    @measured
    def configure(self, split: int, ranks: dict[str, int]) -> None:
        """Read layers ``[0, split)`` and make adapters of ``ranks``; the round is begun by :meth:`restart`."""
        self._hold(split, ranks, None)

    @measured
    def give_up(self, split: int) -> None:
        """Drop the adapters, and the layers from ``split`` on, ahead of :meth:`reconfigure`.

        A step of its own, so that what an old plan held does not count as the new one's memory.
        """
        if self._holder is not None:
            held, self._holder = self._holder.segment, None
            self._kept = load_segment(self._base, replace(held.spec, last=min(split, held.spec.last)), kept=held)

    @measured
    def reconfigure(self, split: int, ranks: dict[str, int], update: RoundUpdate) -> None:
        """Follow a change of plan between two rounds: read new layers, change ranks (law E4).

        Call it after :meth:`give_up`. A client that had no part so far may join like this too.
        """
        kept, self._kept = self._kept, None
        self._hold(split, ranks, kept)
        self.holder.restart(update)

    @measured
    def release(self) -> None:
        """Drop every layer and adapter: the client has no part in the rounds that follow."""
        self._holder = None

    def _hold(self, split: int, ranks: dict[str, int], kept: Segment | None) -> None:
        tail = self._job.privacy.labels == "client"
        spec = SegmentSpec(0, split, embedding=True, tail=tail)
        segment = load_segment(self._base, spec, device=self._device, kept=kept)
        shapes = targeted(linear_shapes(segment.config), self._job.targets)
        self._split, self._shapes = split, shapes
        self._holder = Holder(
            self.name, segment, shapes, ranks, self._job, self._policy, self._base.dtype, self._device
        )

    # -- one local step -------------------------------------------------------------------------------------------

    @measured_in_first_steps
    def forward(self, step: int, micro: int) -> tuple[ForwardReport, Activations]:
        """Run the front over batch ``micro`` of local step ``step`` (counted over the run) and keep its graph."""
        begun = time.perf_counter()
        batches = self._step_batches(step)
        batch = batches[micro]
        self.holder.begin_phase(hash_seed(step, micro), training=True)
        hidden = self._noised(self._front(batch), step, micro)
        self._sent[step, micro] = hidden
        self.holder.count_tokens(range(self._split), batch.supervised)
        message = self._message(batch, hidden, sum(b.supervised for b in batches))
        return ForwardReport(self.name, message.nbytes, time.perf_counter() - begun), message

    @measured_in_first_steps
    def backward(self, step: int, micro: int, gradient: WireTensor | None) -> float:
        """Take the gradient of this client's mean loss at the split point; step after the last batch.

        Returns:
            Seconds of the wall spent here.
        """
        begun = time.perf_counter()
        hidden = self._sent.pop((step, micro))
        if gradient is not None and hidden.requires_grad:
            hidden.backward(gradient.unpack(hidden.dtype, hidden.device))
        if micro == self._job.grad_accumulation - 1:
            self.holder.step(step)
            self._batches.pop(step, None)
        return time.perf_counter() - begun

    @measured_in_first_steps
    def tail(self, step: int, micro: int, deep: WireTensor) -> tuple[LossReport, WireTensor]:
        """U-shape: loss and gradient of the token sum at the output of the last layer, labels staying here.

        Args:
            deep: last layer's output for this client's tokens, ``(n, d)``.
        """
        return self._tail(deep, self._step_batches(step)[micro])

    # -- importance probe (METHOD 3) ------------------------------------------------------------------------------

    @measured
    def probe_forward(self, round_: int, tokens: int) -> tuple[ForwardReport, Activations]:
        """Run the front over a probe batch with its adapted weights watched, and keep its graph.

        The batch is drawn anew for each client and round, apart from the training batches, and depends on nothing
        else. What is sent is noised as in a step.

        Args:
            round_: round of the probe.
            tokens: supervised tokens wanted; fewer are used where ``batch_size`` examples have fewer.
        """
        begun = time.perf_counter()
        job = self._job
        seed = hash_seed(job.seed, self.name, "probe", round_)
        batch = probe_batch(self._train, tokens, job.batch_size, seed)
        self.holder.begin_phase(0, training=False)
        probe = ImportanceProbe(self.holder.segment, self.holder.adapters, self._shapes)
        with probe.watching():
            hidden = self._noised(self._front(batch, probing=True), _PROBE, round_)
        self._probed = probe, batch, hidden
        message = self._message(batch, hidden, batch.supervised)
        return ForwardReport(self.name, message.nbytes, time.perf_counter() - begun), message

    @measured
    def probe_tail(self, deep: WireTensor) -> tuple[LossReport, WireTensor]:
        """U-shape: as :meth:`tail`, for the probe's batch."""
        assert self._probed is not None
        return self._tail(deep, self._probed[1])

    @measured
    def probe_backward(self, gradient: WireTensor | None) -> ImportanceReport:
        """Score this client's layers from the gradient of its mean loss at the split point, and forget the probe.

        Args:
            gradient: ``None`` for a client without layers, which has nothing to score.

        Raises:
            RuntimeError: a weight has not reported.
        """
        assert self._probed is not None
        probe, batch, hidden = self._probed
        self._probed = None
        scores: dict[str, float] = {}
        if self._split:
            upstream = None if gradient is None else gradient.unpack(hidden.dtype, hidden.device)
            rows = ProbedRows(self.name, slice(0, hidden.shape[0]), 0, 1)
            scores = probe.scores(hidden, upstream, [rows])[self.name]
        return ImportanceReport(self.name, batch.supervised, scores)

    # -- validation -----------------------------------------------------------------------------------------------

    @measured_once_a_round
    @torch.no_grad()
    def validation_forward(self, index: int) -> tuple[ForwardReport, Activations]:
        """Front over validation batch ``index``, without a graph and without dropout."""
        begun = time.perf_counter()
        batch = self._validation[index]
        self.holder.begin_phase(0, training=False)
        hidden = self._noised(self._front(batch), -1, index)
        message = self._message(batch, hidden, batch.supervised)
        return ForwardReport(self.name, message.nbytes, time.perf_counter() - begun), message

    @measured_once_a_round
    @torch.no_grad()
    def validation_tail(self, index: int, deep: WireTensor) -> LossReport:
        """U-shape: validation loss of batch ``index`` from the last layer's output."""
        batch = self._validation[index]
        hidden = deep.unpack(self._base.dtype, self._device)
        return LossReport(self.name, float(self._loss_sum(hidden, batch)), batch.supervised)

    # -- rounds ---------------------------------------------------------------------------------------------------

    @measured
    def held(self) -> HeldAdapters:
        return self.holder.held()

    @measured
    def restart(self, update: RoundUpdate) -> None:
        self.holder.restart(update)

    @measured
    def state(self) -> dict[str, Tensor]:
        return self.holder.state()

    @measured
    def load_state(self, tensors: dict[str, Tensor], update: RoundUpdate) -> None:
        """Resume: follow the residual in ``update`` and take over factors and moments."""
        self.holder.follow_residual(update.residuals)
        self.holder.load_state(tensors)

    def peak_bytes(self) -> int:
        """Most bytes allocated above the start since the last call, see :class:`PeakMemory`."""
        return self._memory.peak_bytes()

    def parameters_held(self) -> dict[str, int]:
        """Numbers of frozen values held, by module path within the segment (for tests and reports)."""
        return tensors_held(self.holder.segment)

    # -- inside ---------------------------------------------------------------------------------------------------

    @property
    def holder(self) -> Holder:
        if self._holder is None:
            raise RuntimeError(f"client {self.name} has not been configured")
        return self._holder

    def _front(self, batch: Batch, probing: bool = False) -> Tensor:
        segment = self.holder.segment
        packing = Packing.of(batch.lengths, self._device)
        ids = pack_rows(batch.ids, batch.lengths).to(self._device)
        embedded = segment.embed(ids, packing)
        if probing:
            # The embedding is frozen: else no gradient would come to the first layer's first linears.
            embedded.requires_grad_()
        return segment.run(embedded, packing, 0, self._split)

    def _tail(self, deep: WireTensor, batch: Batch) -> tuple[LossReport, WireTensor]:
        hidden = deep.unpack(self._base.dtype, self._device).requires_grad_()
        loss = self._loss_sum(hidden, batch)
        loss.backward()
        assert hidden.grad is not None
        gradient = WireTensor.pack(hidden.grad, self._job.wire)
        return LossReport(self.name, float(loss.detach()), batch.supervised, gradient.nbytes), gradient

    def _noised(self, hidden: Tensor, step: int, index: int) -> Tensor:
        """Clip each position's activations and add Gaussian noise (``privacy.noise``), differentiably in ``hidden``.

        The noise depends on run, client and batch alone, so that a resumed run repeats it.
        """
        privacy = self._job.privacy
        if privacy.noise == 0:
            return hidden
        norm = hidden.norm(dim=-1, keepdim=True)
        clipped = hidden * (privacy.noise_clip / norm.clamp_min(privacy.noise_clip))
        generator = torch.Generator().manual_seed(hash_seed(self._job.seed, self.name, "noise", step, index))
        draw = torch.randn(hidden.shape, generator=generator).to(hidden)
        return clipped + privacy.noise * privacy.noise_clip * draw

    def _step_batches(self, step: int) -> list[Batch]:
        if step not in self._batches:
            assert self._sampler is not None
            count = self._job.grad_accumulation
            draws = [self._sampler.indices(step * count + micro) for micro in range(count)]
            self._batches[step] = [collate([self._train[i] for i in draw]) for draw in draws]
        return self._batches[step]

    def _message(self, batch: Batch, hidden: Tensor, step_supervised: int) -> Activations:
        at_home = self._job.privacy.labels == "client"
        return Activations(
            client=self.name,
            split=self._split,
            hidden=WireTensor.pack(hidden, self._job.wire),
            lengths=batch.lengths,
            supervised=batch.supervised,
            step_supervised=step_supervised,
            targets=None if at_home else pack_rows(batch.targets, batch.lengths).to(torch.int32).numpy(),
        )

    def _loss_sum(self, hidden: Tensor, batch: Batch) -> Tensor:
        tail = self.holder.segment.tail
        assert tail is not None
        targets = pack_rows(batch.targets, batch.lengths).to(self._device)
        at = targets != -100
        return tail.token_losses(hidden[at], targets[at]).sum()


def tensors_held(segment: Segment) -> dict[str, int]:
    """Numbers of values of every parameter and buffer of a segment, by path."""
    named: list[tuple[str, Any]] = [*segment.named_parameters(), *segment.named_buffers()]
    return {name: tensor.numel() for name, tensor in named}


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
