"""A holder that trains every weight of the model instead of adapters: full fine-tuning, FT (METHOD 7)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from hsplit.config import Job
from hsplit.lora.holder import HeldAdapters, RoundUpdate, TokenCounts
from hsplit.lora.learned import OPTIMIZER, WEIGHT, of_kind, with_kind
from hsplit.lora.optimizer import NOT_SCALED, learning_rate, new_optimizer
from hsplit.lora.residual import ResidualUpdate
from hsplit.models.recorded_segment import RecordedSegment
from hsplit.models.segment import Segment
from hsplit.models.tail import Tail
from hsplit.models.weights import DenseWeight


class WeightHolder:
    """Trains embedding, layers, norms and head of a whole model, starting from the values of ``job.base``.

    Weights are kept in the segment's dtype (fp32); bf16 runs compute under autocast. Gradients are clipped by their
    joint norm, as in full fine-tuning: the model is whole here, so nothing depends on a split.

    Args:
        name: the actor's.
        segment: the whole model, dense, with embedding and tail.
        job: the run's settings.
    """

    def __init__(self, name: str, segment: Segment, job: Job) -> None:
        self.name, self.segment, self._job = name, segment, job
        self.weights: dict[str, nn.Parameter] = dict(_made_trainable(segment))
        self.tokens = TokenCounts()
        self._optimizer = new_optimizer(job, list(self.weights.values()))

    def begin_phase(self, step: int, training: bool) -> None:
        """Do nothing: there are no adapters with dropout."""

    def step(self, step: int, lr_scales: Mapping[int, float] = NOT_SCALED) -> None:
        """Make one optimizer step from the gradients accumulated since the last one.

        Args:
            step: counts from 0 over the run.
            lr_scales: as for a holder of adapters; a single node averages with no other, and has none.
        """
        job = self._job
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(step, job.total_steps, job.lr, job.schedule, job.warmup)
        if job.clip is not None:
            torch.nn.utils.clip_grad_norm_(list(self.weights.values()), job.clip)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def held(self) -> HeldAdapters:
        """Return no adapters: there is nothing to aggregate."""
        return HeldAdapters(self.name, {}, self.tokens.by_layer(), {})

    def restart(self, update: RoundUpdate) -> None:
        """Begin a round: training continues where it is."""
        self.tokens.clear()

    def follow_residual(self, residuals: Mapping[str, ResidualUpdate]) -> None:
        """Do nothing: the weights themselves change, and there is no residual."""

    def state(self) -> dict[str, Tensor]:
        """Return every weight in the layout of the model's files, moments and token counts, for a checkpoint."""
        weights, moments = {}, {}
        for name, weight in self.weights.items():
            values = weight.detach().T if name in self._transposed else weight.detach()
            weights[name] = values.cpu().clone(memory_format=torch.contiguous_format)
            for key, value in self._optimizer.state.get(weight, {}).items():
                moments[f"{key}.{name}"] = torch.as_tensor(value).detach().cpu().clone()
        return {"tokens": self.tokens.state(), **with_kind(WEIGHT, weights), **with_kind(OPTIMIZER, moments)}

    def fits(self, tensors: Mapping[str, Tensor]) -> bool:
        """Check whether ``tensors`` are a state of this model."""
        return self.weights.keys() <= of_kind(WEIGHT, tensors).keys()

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Load the result of :meth:`state`."""
        self.tokens.load_state(tensors["tokens"])
        self._optimizer = new_optimizer(self._job, list(self.weights.values()))
        weights = of_kind(WEIGHT, tensors)
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(weights[name].T if name in self._transposed else weights[name])
        for key, value in of_kind(OPTIMIZER, tensors).items():
            moment, _, name = key.partition(".")
            weight = self.weights[name]
            self._optimizer.state.setdefault(weight, {})[moment] = value.to(weight.device).clone()

    @property
    def _transposed(self) -> set[str]:
        """Names of the linear weights that the family stores as ``(d_in, d_out)``."""
        if not self.segment.family.transposed:
            return set()
        return {f"{name}.weight" for name in self.segment.linears}


def _made_trainable(segment: Segment) -> Iterator[tuple[str, nn.Parameter]]:
    """Make every value of ``segment`` a trainable parameter; yields each once, with its name in the causal LM."""
    family, tail = segment.family, segment.tail
    if isinstance(segment, RecordedSegment):
        yield from segment.train_outer()
    for path in family.embeddings:
        yield from _named(path, segment.embeddings[path.rpartition(".")[2]])
    for linear in segment.linears.values():
        assert isinstance(linear.weight, DenseWeight)
        yield f"{linear.name}.weight", _as_parameter(linear.weight, "values")
        if linear.bias is not None:
            yield f"{linear.name}.bias", _as_parameter(linear, "bias")
    for index, layer in segment.layers.items():
        linears = tuple(name for name, module in layer.named_modules() if hasattr(module, "append_residual"))
        for name, parameter in layer.named_parameters():
            if not name.startswith(linears):
                parameter.requires_grad_(True)
                yield f"{family.layer_name(int(index))}.{name}", parameter
    if not isinstance(tail, Tail) or isinstance(segment, RecordedSegment):
        return
    yield from _named(family.norm, tail.norm)
    first = cast(nn.Parameter, segment.embeddings[family.embeddings[0].rpartition(".")[2]].weight)
    if tail.head.data_ptr() == first.data_ptr():
        # Tied: one parameter serves as embedding and as head.
        tail.train_head(first)
    else:
        head = nn.Parameter(tail.head)
        tail.train_head(head)
        yield family.head_weight, head


def _named(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(True)
        yield f"{path}.{name}", parameter


def _as_parameter(module: nn.Module, buffer: str) -> nn.Parameter:
    """Turn a module's buffer into a parameter of the same name."""
    values = cast(Tensor, getattr(module, buffer))
    delattr(module, buffer)
    parameter = nn.Parameter(values)
    module.register_parameter(buffer, parameter)
    return parameter
