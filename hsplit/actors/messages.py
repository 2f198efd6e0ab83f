"""What travels between client and server in a step or a probe, at the wire dtype, with its size counted."""

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

    ``int8`` is one code an entry and one fp32 scale a token (a row of the last dimension): ``code * scale`` with
    ``scale = max |row| / 127``, so that no entry errs by more than half a scale. A row with an entry that is not finite
    arrives as NaN throughout.

    Attributes:
        data: uint8 array of the tensor's bytes, row-major; for ``int8`` the scales, then the codes. A tensor, on the
            device where it was made, where Ray's object store is gone round (``job.transport``).
        wire: ``fp32``, ``bf16``, ``int8`` or ``fp64``.
        shape: the tensor's shape.
    """

    data: np.ndarray | Tensor
    wire: str
    shape: tuple[int, ...]

    @staticmethod
    def pack(tensor: Tensor, wire: str, transport: str = "store") -> WireTensor:
        """``tensor`` in the type ``wire``, as ``job.transport`` wants it."""
        detached, shape = tensor.detach(), tuple(tensor.shape)
        if wire == "int8":
            flat = _quantized(detached)
        else:
            flat = detached.to(WIRE_DTYPES[wire]).contiguous().view(-1).view(torch.uint8)
        return WireTensor(flat.cpu().numpy() if transport == "store" else flat, wire, shape)

    def unpack(self, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        """A writable tensor of its own in ``dtype`` on ``device``."""
        # Allocated by torch, so that measurements see it, and not shared: what Ray gives may be read-only.
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
    """Scales and codes of a tensor ``(..., d)``, uint8 ``(n (d + 4),)`` for its ``n`` rows."""
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
    """The tensor that :func:`_quantized` was given, to half a scale."""
    rows, width = _rows_of(shape)
    scales, codes = _scales_and_codes(data, rows, width)
    values = torch.empty(rows, width, dtype=dtype, device=data.device)
    for part in _parts(rows, width):
        values[part] = codes[part].float().mul_(scales[part, None])
    return values.view(shape)


def _rows_of(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and their width; an empty tensor has no rows, a tensor without a dimension one entry."""
    size = math.prod(shape)
    return (size // shape[-1], shape[-1]) if size and shape else (size, 1)


def _scales_and_codes(data: Tensor, rows: int, width: int) -> tuple[Tensor, Tensor]:
    """Views of ``data``: fp32 ``(rows,)`` and int8 ``(rows, width)``."""
    return data[: 4 * rows].view(torch.float32), data[4 * rows :].view(torch.int8).view(rows, width)


def _parts(rows: int, width: int) -> list[slice]:
    at_once = max(1, _AT_ONCE // width)
    return [slice(start, min(start + at_once, rows)) for start in range(0, rows, at_once)]


def not_finite(tensor: Tensor) -> bool:
    """Whether a tensor has an entry that is no number or infinite."""
    return tensor.numel() > 0 and not bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())


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
        trains: whether it has adapters to train, so that in a step it needs the gradient at its split point.
    """

    client: str
    split: int
    hidden: WireTensor
    lengths: tuple[int, ...]
    supervised: int
    step_supervised: int
    targets: np.ndarray | None
    trains: bool = True

    @property
    def nbytes(self) -> int:
        """Bytes on the wire: tensors as they are, 4 a length, and 8 for the counts."""
        return self.hidden.nbytes + 4 * len(self.lengths) + 8 + (0 if self.targets is None else self.targets.nbytes)

    def flaw(self, width: int, vocabulary: int) -> str | None:
        """What cannot be right about the message, its values apart; ``None``: nothing.

        Args:
            width: of the model's hidden states.
            vocabulary: token ids are below it.
        """
        rows = sum(self.lengths)
        if self.hidden.shape != (rows, width):
            return f"activations of shape {self.hidden.shape} where ({rows}, {width}) is right"
        if not 0 <= self.supervised <= min(rows, self.step_supervised):
            return f"{self.supervised} supervised tokens of {rows}, {self.step_supervised} in the step"
        if self.targets is not None:
            if self.targets.shape != (rows,):
                return f"targets of shape {self.targets.shape} where ({rows},) is right"
            given = self.targets[self.targets != IGNORED]
            if len(given) != self.supervised:
                return f"{len(given)} targets where {self.supervised} tokens are supervised"
            if len(given) and not 0 <= given.min() <= given.max() < vocabulary:
                return f"a target that is no token (there are {vocabulary})"
        return None


@dataclass(frozen=True)
class ForwardReport:
    """Small companion of a client's activations: what the driver needs to know of them.

    Attributes:
        client: who sent.
        nbytes: size of the activations on the wire.
        seconds: of the wall by phase.
    """

    client: str
    nbytes: int
    seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class LossReport:
    """Loss of one client's rows.

    Attributes:
        client: whose rows.
        loss_sum: cross-entropy summed over supervised tokens, nats.
        tokens: supervised tokens.
        nbytes: bytes of the gradient that a client's tail sends up with it.
        seconds: of the wall by phase, where a client computed it in a step.
    """

    client: str
    loss_sum: float
    tokens: int
    nbytes: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ServerReport:
    """Small companion of what the server sends back in a step.

    Attributes:
        losses: one a client where the labels are here, otherwise empty.
        nbytes: bytes sent to the clients.
        seconds: of the wall by phase.
        refused: what cannot be right about what a client sent, by its name; it is left out.
    """

    losses: tuple[LossReport, ...]
    nbytes: int
    seconds: Mapping[str, float] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ProbeReport:
    """Small companion of what the server sends back in a probe.

    Attributes:
        importance: one a client, over the layers that its tokens passed through here.
        nbytes: bytes sent to the clients.
    """

    importance: tuple[ImportanceReport, ...]
    nbytes: int
