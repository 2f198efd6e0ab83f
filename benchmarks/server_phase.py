"""The server's phase of a step with an NF4 base, in this process: joined by depth, and beside a residual.

A part of ``throughput.py``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median

import torch

from benchmarks import footprint
from benchmarks.common import Table
from hsplit.actors.messages import Activations
from hsplit.actors.server import Server
from hsplit.models.factors import LowRank

# Most repeats with more clients than this: a repeat of many takes long.
MANY, REPEATS_OF_MANY = 16, 3
RESIDUAL_RANK = 128
FORMS = {
    "codes": (0, False),
    "codes, residual beside": (RESIDUAL_RANK, False),
    "working copy": (0, True),
    "working copy, residual": (RESIDUAL_RANK, True),
}
"""Rank of the residual, and whether the server keeps working copies."""


@dataclass(frozen=True)
class Phase:
    """The server's phase with codes in one repeat.

    Attributes:
        clients: how many it serves.
        repeat: counted from 0.
        joined_s, apart_s: seconds of a step, joined by depth and one client after another.
        joined_processor_s, apart_processor_s: the same of the processor.
    """

    clients: int
    repeat: int
    joined_s: float
    apart_s: float
    joined_processor_s: float
    apart_processor_s: float


@dataclass(frozen=True)
class Residual:
    """The server's phase in one stored form and one repeat.

    Attributes:
        dtype: to compute in.
        form: see :data:`FORMS`.
        repeat: counted from 0.
        seconds, processor_s: of a step.
    """

    dtype: str
    form: str
    repeat: int
    seconds: float
    processor_s: float


def _setting(
    options: argparse.Namespace, clients: int, dtype: str, device: str
) -> tuple[footprint.Setting, list[Activations]]:
    """A server that keeps codes alone, and a message of each client."""
    setting = footprint.Setting.of(options, "nf4", clients, dtype=dtype, device=device)
    parts = setting.plan.available
    # One client's layers serve for all clients, which have the same; only messages matter here.
    client = setting.client(parts[0], measure=False)
    messages: list[Activations] = []
    for part in parts:
        client.load_data({part.name: setting.inputs.shares[part.name]}, None)
        messages.append(replace(client.forward(len(messages), 0)[1], client=part.name))
    _store(setting.server, 0, copies=False)
    return setting, messages


def _store(server: Server, rank: int, copies: bool) -> None:
    """Give every linear a residual of ``rank``, or none, and a working copy or none."""
    for linear in server.holder.segment.linears.values():
        d_out, d_in = linear.weight.shape
        kept = min(rank, min(d_out, d_in) // 2)
        drawn = torch.Generator().manual_seed(0)
        up, down = (torch.randn(*shape, generator=drawn) * 1e-3 for shape in ((d_out, kept), (kept, d_in)))
        linear.append_residual(0, LowRank(up, down).on(linear.device))
        linear.keep_working_copy(copies)


def _timed(work: Callable[[], None]) -> tuple[float, float]:
    """Seconds of the wall and of this process's threads."""
    begun, spent = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - begun, time.process_time() - spent


def phases(options: argparse.Namespace, clients: int, dtype: str = "fp32", device: str = "cpu") -> list[Phase]:
    """Time the server's phase with an NF4 base as codes, joined and apart."""
    setting, messages = _setting(options, clients, dtype, device)

    def joined() -> None:
        setting.server.train_step(0, 0, *messages)

    def apart() -> None:
        for message in messages:
            setting.server.train_step(0, 0, message)

    found = []
    joined()
    apart()
    for repeat in range(options.repeat if clients <= MANY else min(options.repeat, REPEATS_OF_MANY)):
        (joined_s, joined_spent), (apart_s, apart_spent) = _timed(joined), _timed(apart)
        found.append(Phase(clients, repeat, joined_s, apart_s, joined_spent, apart_spent))
    return found


def phase_table(found: Sequence[Phase]) -> Table:
    """Columns and cells, a row a number of clients."""
    rows = []
    for clients in dict.fromkeys(p.clients for p in found):
        own = [p for p in found if p.clients == clients]
        ratios = [p.apart_s / p.joined_s for p in own]
        spent = [p.apart_processor_s / p.joined_processor_s for p in own]
        times = [f"{median(p.joined_s for p in own):.3f}", f"{median(p.apart_s for p in own):.3f}"]
        rows.append([f"{clients} clients", *times, _spread(ratios), _spread(spent)])
    return ["server phase, NF4 codes", "joined, s", "apart, s", "joined is faster by", "in processor seconds"], rows


def residuals(options: argparse.Namespace, dtype: str) -> list[Residual]:
    """Time the server's phase in every stored form in turn, with and without a residual."""
    setting, messages = _setting(options, options.clients, dtype, "cpu")
    found = []
    for repeat in range(-1, options.repeat):
        for form, (rank, copies) in FORMS.items():
            _store(setting.server, rank, copies)
            seconds, spent = _timed(lambda: setting.server.train_step(0, 0, *messages) and None)
            if repeat >= 0:
                found.append(Residual(dtype, form, repeat, seconds, spent))
    return found


def residual_table(found: Sequence[Residual]) -> Table:
    """Columns and cells, a row a stored form in a dtype; ratios are within one repeat."""
    rows = []
    for dtype, form in dict.fromkeys((r.dtype, r.form) for r in found):
        spent = {(r.form, r.repeat): r.processor_s for r in found if r.dtype == dtype}
        repeats = sorted({r.repeat for r in found})
        bare = "working copy" if FORMS[form][1] else "codes"
        cells = [_spread([spent[form, i] / spent[other, i] for i in repeats]) for other in ("codes", bare)]
        own = [r for r in found if (r.dtype, r.form) == (dtype, form)]
        times = [f"{min(r.processor_s for r in own):.3f}", f"{median(r.seconds for r in own):.3f}"]
        rows.append([f"{form}, {dtype}", *times, *cells])
    named = f"server phase, NF4, residual of rank {RESIDUAL_RANK} or none"
    return [named, "processor, s (min)", "wall, s", "by codes'", "by that without residual"], rows


def _spread(ratios: Sequence[float]) -> str:
    return f"{median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
