"""What travels between client and server in a step or a probe, at the wire dtype, with its size counted."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hsplit.scheduling.importance import ImportanceReport

WIRE_DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class WireTensor:
    """A tensor as it travels: raw bytes (which Ray moves without a copy) with dtype and shape.

    Attributes:
        data: uint8 array of the tensor's bytes, row-major.
        wire: ``fp32``, ``bf16`` or ``fp64``.
        shape: the tensor's shape.
    """

    data: np.ndarray
    wire: str
    shape: tuple[int, ...]

    @staticmethod
    def pack(tensor: Tensor, wire: str) -> WireTensor:
        flat = tensor.detach().to("cpu", WIRE_DTYPES[wire]).contiguous().view(-1)
        return WireTensor(flat.view(torch.uint8).numpy(), wire, tuple(tensor.shape))

    def unpack(self, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        """A writable tensor of its own in ``dtype`` on ``device``."""
        # Allocated by torch, so that measurements see it; copied by numpy, as what Ray gives may be read-only.
        own = torch.empty(self.nbytes, dtype=torch.uint8)
        own.numpy()[...] = self.data
        return own.view(WIRE_DTYPES[self.wire]).view(self.shape).to(device, dtype)

    @property
    def nbytes(self) -> int:
        return int(self.data.nbytes)


@dataclass(frozen=True)
class Activations:
    """A client's rows at its split point (METHOD 2, step 1).

    Tokens travel packed, without padding, so lengths stand in for mask and positions: both follow from them.

    Attributes:
        client: who sends.
        split: the client's split point.
        hidden: ``(n, d)``, the sequences' tokens end to end.
        lengths: tokens of each sequence; they sum to ``n``.
        supervised: ``n_i`` of these rows: supervised positions, counted after the label shift.
        step_supervised: ``n_i`` of the whole local step (all its accumulated batches): the divisor of the mean loss.
        targets: ``(n,)`` int32, the id each position must predict or -100; ``None`` when labels stay at home.
    """

    client: str
    split: int
    hidden: WireTensor
    lengths: tuple[int, ...]
    supervised: int
    step_supervised: int
    targets: np.ndarray | None

    @property
    def nbytes(self) -> int:
        return self.hidden.nbytes + 4 * len(self.lengths) + 8 + (0 if self.targets is None else self.targets.nbytes)


@dataclass(frozen=True)
class ForwardReport:
    """Small companion of a client's activations: what the driver needs to know of them.

    Attributes:
        client: who sent.
        nbytes: size of the activations on the wire.
        time_s: seconds of the wall that the front took.
    """

    client: str
    nbytes: int
    time_s: float


@dataclass(frozen=True)
class LossReport:
    """Loss of one client's rows.

    Attributes:
        client: whose rows.
        loss_sum: cross-entropy summed over supervised tokens, nats.
        tokens: supervised tokens.
        nbytes: bytes of the gradient that a client's tail sends up with it.
    """

    client: str
    loss_sum: float
    tokens: int
    nbytes: int = 0


@dataclass(frozen=True)
class ServerReport:
    """Small companion of what the server sends back in a step.

    Attributes:
        losses: one a client where the labels are here, otherwise empty.
        nbytes: bytes sent to the clients.
        time_s: seconds of the wall that the server phase took.
    """

    losses: tuple[LossReport, ...]
    nbytes: int
    time_s: float


@dataclass(frozen=True)
class ProbeReport:
    """Small companion of what the server sends back in a probe.

    Attributes:
        importance: one a client, over the layers that its tokens passed through here.
        nbytes: bytes sent to the clients.
        time_s: seconds of the wall that the server phase took.
    """

    importance: tuple[ImportanceReport, ...]
    nbytes: int
    time_s: float
