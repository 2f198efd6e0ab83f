"""Compute of a holder: a few of the model's layers, timed as a local step runs them.

The cost model's count of the same work is divided by the times, so that its predicted step times are the holder's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from hsplit.config import Job, Policy
from hsplit.lora.holder import Holder
from hsplit.models.factors import LowRank
from hsplit.models.loading import load_segment
from hsplit.models.packing import Packing
from hsplit.models.segment import BaseModel, SegmentSpec
from hsplit.planning.cost.counted_model import CountedModel
from hsplit.planning.cost.fake_layer import LayerSetting
from hsplit.planning.cost.model import CostModel

LAYERS = 2
"""Decoder layers that are timed: enough that the weights of one leave the caches while another computes."""
MOST_JOINED = 16
"""Most clients whose batches a server computes at once: more would not be faster, and take memory."""
# The first step also makes the optimizer's moments and chooses kernels.
_WARM_UP_STEPS = 2

Clock = Callable[[], float]


@dataclass(frozen=True)
class StepSeconds:
    """Seconds of one local step.

    Attributes:
        layers: forward, backward and optimizer of the timed layers.
        tail: norm, head and loss, if the holder has them.
    """

    layers: float
    tail: float


class StepWork:
    """The arithmetic of a local step on a few layers: forward, backward and the optimizer's step.

    Every example has ``max_length`` tokens, all of them supervised; adapters have the largest rank, and a quantized
    base has its residual at the cap, as plans count. The first layers stand for a client's, the last ones for the
    server's.

    Args:
        base: the base model as the holder reads it.
        job, policy: the run's settings.
        setting: ranks, residual and how the base is kept, as they are counted (``CountedModel.setting``).
        device: where it computes.
        at_server: the server's work.
        clients: number of clients whose batches are computed at once.
        clock: seconds.
    """

    def __init__(
        self,
        base: BaseModel,
        job: Job,
        policy: Policy,
        setting: LayerSetting,
        device: torch.device | str = "cpu",
        *,
        at_server: bool = False,
        clients: int = 1,
        clock: Clock = time.perf_counter,
    ) -> None:
        self._job, self._clock, self._device = job, clock, torch.device(device)
        total = base.spec.layers
        count = timed_layers(total)
        self._first, self._last = (total - count, total) if at_server else (0, count)
        tail = (job.privacy.labels == "server") == at_server
        spec = SegmentSpec(self._first, self._last, tail=tail)
        self.segment = load_segment(base, spec, quantized=setting.codes is not None, device=device)
        self._holder = self._holding(base, policy, setting)
        width, words = self.segment.width, self.segment.vocab_size
        generator = torch.Generator().manual_seed(0)
        self._parts = []
        for rows in _part_sizes(job, clients):
            packing = Packing.of((job.max_length,) * rows, self._device)
            shape = (rows * job.max_length, width)
            hidden, slope = (torch.randn(shape, generator=generator).to(device, base.dtype) for _ in range(2))
            targets = torch.randint(words, shape[:1], generator=generator).to(device)
            self._parts.append((packing, hidden, slope, targets))

    def _holding(self, base: BaseModel, policy: Policy, setting: LayerSetting) -> Holder:
        shapes = [shape for shape in base.spec.targeted(self._job.targets) if self._first <= shape.layer < self._last]
        ranks = {shape.name: setting.ranks for shape in shapes}
        # So that the weights hardly change, however many steps are timed.
        still = self._job.model_copy(update={"lr": 1e-9})
        holder = Holder("probe", self.segment, shapes, ranks, still, policy, base.dtype, self._device)
        holder.adapters.restart({shape.name: shape.name for shape in shapes}, {})
        for shape in shapes:
            linear = self.segment.linears[shape.name]
            rank = min(setting.residual_rank, min(shape.d_out, shape.d_in) // 2)
            if rank and not linear.merges:
                sizes = ((shape.d_out, rank), (rank, shape.d_in))
                linear.append_residual(0, LowRank(*(torch.full(size, 1e-3, device=linear.device) for size in sizes)))
        return holder

    def warm_up(self) -> None:
        """Make the first steps, which take longer than later ones."""
        for _ in range(_WARM_UP_STEPS):
            self.step()

    def seconds(self, at_least_s: float) -> StepSeconds:
        """Measure the mean seconds of steps until ``at_least_s`` have passed, at least one."""
        begun, layers, tail, steps = self._clock(), 0.0, 0.0, 0
        while steps == 0 or self._clock() - begun < at_least_s:
            took = self.step()
            layers, tail, steps = layers + took.layers, tail + took.tail, steps + 1
        return StepSeconds(layers / steps, tail / steps)

    def step(self) -> StepSeconds:
        """Make one local step: all its accumulated batches in their parts, then the optimizer's step."""
        layers = tail = 0.0
        self._holder.begin_phase(0, training=True)
        for _ in range(self._job.grad_accumulation):
            for packing, hidden, slope, targets in self._parts:
                begun = self._clock()
                output = self.segment.run(hidden.detach().requires_grad_(), packing, self._first, self._last)
                ran = self._now()
                upstream = slope if self.segment.tail is None else self._tail_slope(output, targets)
                sloped = self._now()
                output.backward(upstream)
                layers += ran - begun + self._now() - sloped
                tail += sloped - ran
        begun = self._clock()
        self._holder.step(0)
        return StepSeconds(layers + self._now() - begun, tail)

    def _tail_slope(self, output: Tensor, targets: Tensor) -> Tensor:
        assert self.segment.tail is not None
        leaf = output.detach().requires_grad_()
        self.segment.tail.supervised_losses(leaf, targets, self._job.fast.loss_rows).sum().backward()
        assert leaf.grad is not None
        return leaf.grad

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return self._clock()


def timed_layers(layers: int) -> int:
    """Return the number of a model's ``layers`` that are timed."""
    return min(LAYERS, layers)


def joined_clients(model: CountedModel, clients: int) -> int:
    """Return the number of clients with which each server is timed: those that it serves in a round, up to a limit."""
    served = model.served(model.clients_at([0] * clients)[None])
    return min(int(served.sum()), MOST_JOINED)


def _part_sizes(job: Job, clients: int) -> list[int]:
    """Count the examples of each part of a batch, of all ``clients`` together."""
    parts = job.pipeline.microbatches
    borders = [job.batch_size * part // parts for part in range(parts + 1)]
    return [clients * (stop - start) for start, stop in pairwise(borders)]


@dataclass(frozen=True)
class _Unit:
    """A holder of 1 FLOP/s with a perfect link: its predicted seconds are the counted FLOPs."""

    name: str = ""
    memory_bytes: int = 0
    flops: float = 1.0
    bandwidth_bps: float = math.inf
    latency_s: float = 0.0


def client_flops(cost: CostModel, took: StepSeconds) -> float:
    """Compute a client's FLOP/s from the seconds of :class:`StepWork`, with its tail in the U-shape."""
    counted = cost.step_time_s(_Unit(), timed_layers(cost.model.layers)).total_s
    return counted / (took.layers + took.tail)


def dequantization_flops(cost: CostModel, dense: StepSeconds, codes: StepSeconds) -> float:
    """Compute the operations in whose time a client dequantizes an entry of its base, once a pass.

    Args:
        cost: counts the work.
        dense, codes: seconds of its :class:`StepWork` on either form of the base.
    """
    model, job = cost.model, cost.model.job
    passes = 2 * job.grad_accumulation * job.pipeline.microbatches
    entries = sum(kind.weight_parameters for kind in model.counter.kinds[: timed_layers(model.layers)])
    return (codes.layers - dense.layers) * client_flops(cost, dense) / (passes * entries)


def server_flops(cost: CostModel, clients: int, took: StepSeconds) -> float:
    """Compute a server's FLOP/s over a whole step: all layers at the speed of the timed ones, and its tail once.

    Args:
        cost: counts the work.
        clients: number of clients whose batches were computed at once.
        took: seconds of that server's :class:`StepWork`.
    """
    model = cost.model
    counted = float(cost.times.serving_times(_Unit(), model.clients_at([0] * clients)[None])[0])
    return counted / (took.layers * model.layers / timed_layers(model.layers) + took.tail)
