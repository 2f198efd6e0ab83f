"""Messages between client and server in a step or a probe, in their wire formats, with their sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from hsplit.actors.wire_codes import dequantized, quantized
from hsplit.data.batches import IGNORED
from hsplit.models.dtype import DTYPES
from hsplit.planning.importance import ImportanceReport
from hsplit.seeds import hash_seed


@dataclass(frozen=True)
class WireTensor:
    """A tensor as it travels: raw bytes (which Ray moves without a copy) with format and shape.

    Attributes:
        data: uint8 array of the tensor's bytes, row-major; for ``int8`` and ``int4`` the scales, then the codes (see
            :mod:`hsplit.actors.wire_codes`). A tensor on the CPU where ``job.transport`` bypasses Ray's object store.
        wire: ``fp64``, ``fp32``, ``bf16``, ``int8`` or ``int4``.
        shape: the tensor's shape.
        seed: of the random numbers that ``int4`` rounds by; of its answers' seeds too.
    """

    data: np.ndarray | Tensor
    wire: str
    shape: tuple[int, ...]
    seed: int = 0

    @staticmethod
    def pack(tensor: Tensor, wire: str, transport: str = "store", seed: int = 0) -> WireTensor:
        """Pack ``tensor`` in the format ``wire`` for ``job.transport``; the same ``seed`` gives the same bytes."""
        detached, shape = tensor.detach(), tuple(tensor.shape)
        if wire in DTYPES:
            flat = detached.to(DTYPES[wire]).contiguous().view(-1).view(torch.uint8)
        else:
            flat = quantized(detached, wire, seed)
        # Both ways to travel are between hosts' memories.
        host = flat.cpu()
        return WireTensor(host.numpy() if transport == "store" else host, wire, shape, seed)

    def answer(self, tensor: Tensor, what: str, transport: str) -> WireTensor:
        """Pack ``tensor`` as an answer to this message: in its format, by a seed that follows from its own.

        Args:
            tensor: the values.
            what: name of the answer: two answers to one message are rounded by different random numbers.
            transport: ``job.transport``.
        """
        return WireTensor.pack(tensor, self.wire, transport, hash_seed(self.seed, what))

    def unpack(self, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        """Return a new, writable tensor in ``dtype`` on ``device``."""
        # Allocated by torch, so that measurements see it, and not shared: an array from Ray may be read-only.
        if isinstance(self.data, Tensor):
            own = self.data.clone()
        else:
            own = torch.empty(self.nbytes, dtype=torch.uint8)
            own.numpy()[...] = self.data
        if self.wire in DTYPES:
            # Moved first: torch would widen on the CPU, and move more bytes.
            return own.view(DTYPES[self.wire]).view(self.shape).to(device).to(dtype)
        return dequantized(own.to(device), self.wire, self.shape, dtype)

    @property
    def nbytes(self) -> int:
        """Bytes on the wire, scales included."""
        return int(self.data.nbytes)


def not_finite(tensor: Tensor) -> bool:
    """Test for entries that are NaN or infinite."""
    return tensor.numel() > 0 and not bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())


@dataclass(frozen=True)
class Activations:
    """A client's rows at its split point (METHOD 2, step 1).

    Tokens travel packed, without padding; mask and positions follow from the lengths.

    Attributes:
        client: the sender.
        split: the client's split point.
        hidden: ``(n, d)``, the sequences' tokens end to end.
        lengths: tokens of each sequence; they sum to ``n``.
        supervised: ``n_i`` of these rows: supervised positions, counted after the label shift.
        step_supervised: ``n_i`` of the whole local step (all its accumulated batches): the divisor of the mean loss.
        targets: ``(n,)`` int32, the id each position must predict or -100; ``None`` when labels stay at the client.
        trains: whether it needs the gradient at its split point in a step: to train adapters, or to score weights.
        scored: tokens at the beginning of ``hidden`` that weights are scored on in this step's backward, and the
            supervised ones among them; none by default.
        weight: of its loss in a step, beside its number of tokens (``pace.weights``); the plan's, so that it does not
            count as sent.
    """

    client: str
    split: int
    hidden: WireTensor
    lengths: tuple[int, ...]
    supervised: int
    step_supervised: int
    targets: np.ndarray | None
    trains: bool = True
    weight: float = 1.0
    scored: tuple[int, int] = (0, 0)

    @property
    def nbytes(self) -> int:
        """Bytes on the wire: the tensors, 4 for each length, and 8 for the counts."""
        return self.hidden.nbytes + 4 * len(self.lengths) + 8 + (0 if self.targets is None else self.targets.nbytes)

    def flaw(self, width: int, vocabulary: int) -> str | None:
        """Describe an inconsistency of the message, its hidden values apart; ``None`` if there is none.

        Args:
            width: of the model's hidden states.
            vocabulary: number of token ids.
        """
        rows = sum(self.lengths)
        if self.hidden.shape != (rows, width):
            return f"activations of shape {self.hidden.shape} where ({rows}, {width}) is right"
        if not 0 <= self.supervised <= min(rows, self.step_supervised):
            return f"{self.supervised} supervised tokens of {rows}, {self.step_supervised} in the step"
        if not (0 <= self.scored[0] <= rows and 0 <= self.scored[1] <= min(self.scored[0], self.supervised)):
            return f"{self.scored[1]} tokens of {self.scored[0]} to score on, where {self.supervised} are supervised"
        if self.targets is not None:
            if self.targets.shape != (rows,):
                return f"targets of shape {self.targets.shape} where ({rows},) is right"
            ids = self.targets[self.targets != IGNORED]
            if len(ids) != self.supervised:
                return f"{len(ids)} targets where {self.supervised} tokens are supervised"
            if len(ids) and not 0 <= ids.min() <= ids.max() < vocabulary:
                return f"a target that is no token (there are {vocabulary})"
        return None


@dataclass(frozen=True)
class ForwardReport:
    """Small companion of a client's activations, for the driver.

    Attributes:
        client: the sender.
        nbytes: size of the activations on the wire.
        seconds: wall time by phase.
    """

    client: str
    nbytes: int
    seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class LossReport:
    """Loss of one client's rows.

    Attributes:
        client: its name.
        loss_sum: cross-entropy summed over supervised tokens, nats.
        tokens: supervised tokens.
        nbytes: bytes of the gradient that a client's tail sends with it.
        seconds: wall time by phase, where a client computed it in a step.
    """

    client: str
    loss_sum: float
    tokens: int
    nbytes: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ServerReport:
    """Small companion of the server's messages in a step.

    Attributes:
        losses: one for each client where the server has the labels, otherwise empty.
        nbytes: bytes sent to the clients.
        seconds: wall time by phase.
        refused: by client name the reason for which its message was left out.
    """

    losses: tuple[LossReport, ...]
    nbytes: int
    seconds: Mapping[str, float] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ProbeReport:
    """Small companion of the server's messages in a probe.

    Attributes:
        importance: one for each client, over the layers that its tokens passed through here.
        nbytes: bytes sent to the clients.
    """

    importance: tuple[ImportanceReport, ...]
    nbytes: int
