"""Messages between client and server in a step or a probe, at the wire dtype, with their sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from hsplit.data.batches import IGNORED
from hsplit.planning.importance import ImportanceReport

WIRE_DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}
_LARGEST_CODE = 127
# Entries quantized at once: the fp32 copies that it takes stay small beside a message.
_AT_ONCE = 1 << 15


@dataclass(frozen=True)
class WireTensor:
    """A tensor as it travels: raw bytes (which Ray moves without a copy) with dtype and shape.

    ``int8`` has one code for each entry and one fp32 scale for each token (a row of the last dimension):
    ``code * scale`` with ``scale = max |row| / 127``, so that no error exceeds half a scale. A row with an entry that
    is not finite arrives as NaN throughout.

    Attributes:
        data: uint8 array of the tensor's bytes, row-major; for ``int8`` the scales, then the codes. A tensor on its
            own device where ``job.transport`` bypasses Ray's object store.
        wire: ``fp32``, ``bf16``, ``int8`` or ``fp64``.
        shape: the tensor's shape.
    """

    data: np.ndarray | Tensor
    wire: str
    shape: tuple[int, ...]

    @staticmethod
    def pack(tensor: Tensor, wire: str, transport: str = "store") -> WireTensor:
        """Pack ``tensor`` in the type ``wire`` for ``job.transport``."""
        detached, shape = tensor.detach(), tuple(tensor.shape)
        if wire == "int8":
            flat = _quantized(detached)
        else:
            flat = detached.to(WIRE_DTYPES[wire]).contiguous().view(-1).view(torch.uint8)
        return WireTensor(flat.cpu().numpy() if transport == "store" else flat, wire, shape)

    def unpack(self, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        """Return a new, writable tensor in ``dtype`` on ``device``."""
        # Allocated by torch, so that measurements see it, and not shared: an array from Ray may be read-only.
        if isinstance(self.data, Tensor):
            own = self.data.clone()
        else:
            own = torch.empty(self.nbytes, dtype=torch.uint8)
            own.numpy()[...] = self.data
        if self.wire == "int8":
            return _dequantized(own.to(device), self.shape, dtype)
        return own.view(WIRE_DTYPES[self.wire]).view(self.shape).to(device, dtype)

    @property
    def nbytes(self) -> int:
        """Bytes on the wire, scales included."""
        return int(self.data.nbytes)


def _quantized(tensor: Tensor) -> Tensor:
    """Quantize a tensor ``(..., d)`` of ``n`` rows to scales and codes, uint8 ``(n (d + 4),)``."""
    rows, width = _rows_of(tuple(tensor.shape))
    values = tensor.reshape(rows, width)
    data = torch.empty(rows * (width + 4), dtype=torch.uint8, device=tensor.device)
    scales, codes = _scales_and_codes(data, rows, width)
    for part in _parts(rows, width):
        exact = values[part].float()
        # A NaN is the largest of its row, and so in the scale; an infinite scale makes NaN of every code.
        scales[part] = exact.abs().amax(dim=1) / _LARGEST_CODE
        # A row of zeros has no scale to divide by.
        scaled = exact / torch.where(scales[part] == 0, 1.0, scales[part])[:, None]
        codes[part] = scaled.nan_to_num_(nan=0.0).round_().clamp_(-_LARGEST_CODE, _LARGEST_CODE)
    return data


def _dequantized(data: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Restore the input of :func:`_quantized`, to half a scale."""
    rows, width = _rows_of(shape)
    scales, codes = _scales_and_codes(data, rows, width)
    values = torch.empty(rows, width, dtype=dtype, device=data.device)
    for part in _parts(rows, width):
        values[part] = codes[part].float().mul_(scales[part, None])
    return values.view(shape)


def _rows_of(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the number of rows and their width; an empty tensor has no rows, a scalar one entry."""
    size = math.prod(shape)
    return (size // shape[-1], shape[-1]) if size and shape else (size, 1)


def _scales_and_codes(data: Tensor, rows: int, width: int) -> tuple[Tensor, Tensor]:
    """Views of ``data``: fp32 ``(rows,)`` and int8 ``(rows, width)``."""
    return data[: 4 * rows].view(torch.float32), data[4 * rows :].view(torch.int8).view(rows, width)


def _parts(rows: int, width: int) -> list[slice]:
    at_once = max(1, _AT_ONCE // width)
    return [slice(start, min(start + at_once, rows)) for start in range(0, rows, at_once)]


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
    """

    client: str
    split: int
    hidden: WireTensor
    lengths: tuple[int, ...]
    supervised: int
    step_supervised: int
    targets: np.ndarray | None
    trains: bool = True
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
