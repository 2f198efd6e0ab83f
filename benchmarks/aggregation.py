"""Aggregation by the sum of products at size against the dense way, and the loss from merging an update (METHOD 6).

    python benchmarks/aggregation.py [--run runs/NAME]       # or: hsplit bench aggregation

First part: holders of unequal ranks share one weight; their adapters are drawn, and go through several rounds. The
residual has no cap, so that nothing is cut; with ``--cap`` it has one, and the rows have its cut. Beside it the
dense way: the sum as one fp32 matrix and, for a cap, an SVD of it all.
Second part (``merging.py``): a real update, merged into bases of four kinds, beside the update that hsplit keeps; and
the noise of averaging A and B apart.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from benchmarks import common, merging
from hsplit.actors.profiling import PeakMemory
from hsplit.lora.aggregation import Contribution, Restart, noise_free
from hsplit.lora.low_rank import LowRankSum
from hsplit.lora.residual import Residual
from hsplit.models.factors import LowRank

RANKS = (1, 32)
# Size of a holder's update of B in a round; with it, alpha / r folded in.
LEARNED = 1e-2


@dataclass(frozen=True)
class Measured:
    """One row of the first table.

    Attributes:
        way: ``concat, mean``, ``concat, random``, ``concat, svd`` (restarts), or ``dense``.
        cap: most directions of the residual; ``None`` for no cut.
        side: the weight is ``side x side``.
        holders, rank_sum: how many, and their ranks together.
        rounds: aggregations; figures are of the worst of them, seconds of the median.
        seconds: wall time of one aggregation.
        factors_bytes: the holders' fp32 factors, and the residual's.
        peak_bytes: most that torch allocated above them.
        peak_over_factors, peak_over_dense: the same, in units of the factors and of one fp32 matrix.
        cut: the largest part of the residual that the cap cut in a round (relative Frobenius norm).
        error: of law E3: the residual's error besides the recorded cut, relative to the update; for the dense way the
            error of its fp32 sum.
    """

    way: str
    cap: int | None
    side: int
    holders: int
    rank_sum: int
    rounds: int
    seconds: float
    factors_bytes: int
    peak_bytes: int
    peak_over_factors: float
    peak_over_dense: float
    cut: float
    error: float


def main(arguments: Sequence[str] | None = None) -> None:
    """Run both parts, print their tables and write them down."""
    options = _options(arguments)
    common.keep_to_one_core()
    about = "wall time on one core, measured"
    header = common.header_of("aggregation", arguments, "torch", "bitsandbytes", seconds=about)
    console = Console(width=150)
    tables = []
    if options.part in ("all", "size"):
        tables.append(_at_size(options, console, header))
    if options.part in ("all", "merging"):
        tables += merging.tables(options, console, header)
    path = options.to / ("aggregation.md" if options.part == "all" else f"{options.part}.md")
    common.write_markdown(path, header, tables)
    console.print(f"written to {options.to}")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    about = "Time, memory and error of aggregation as weights and holders grow; what merging an update loses."
    parser = common.flags_of("aggregation", about)
    parser.add_argument("--sides", type=int, nargs="+", default=[576, 1024, 2048, 4096], metavar="N")
    parser.add_argument("--holders", type=int, nargs="+", default=[5, 20, 100], metavar="N")
    parser.add_argument("--rounds", type=int, default=3, help="aggregations of each (default: 3)")
    parser.add_argument("--cap", type=int, metavar="R", help="cut the residual to R directions (default: no cut)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="of the second part")
    parser.add_argument("--steps", type=int, default=20, help="AdamW steps of the real update (default: 20)")
    parser.add_argument("--lr", type=float, default=1e-3, help="their learning rate (default: 1e-3)")
    parser.add_argument("--layers", type=int, help="merge into the first so many layers only (default: all)")
    parser.add_argument("--run", type=Path, help="merge what this run has learned instead, from its last checkpoint")
    parser.add_argument("--part", choices=["all", "size", "merging"], default="all", help="which part (default: all)")
    parser.add_argument("--quick", action="store_true", help="small sizes and few steps, to see that it works")
    options = parser.parse_args(arguments)
    if options.quick:
        options.sides, options.holders, options.rounds, options.steps, options.layers = [64, 96], [3, 40], 2, 2, 1
    return options


def _at_size(options: argparse.Namespace, console: Console, header: dict[str, Any]) -> str:
    rows: list[Measured] = []
    for side in options.sides:
        for holders in options.holders:
            chance = random.Random(options.seed)
            ranks = [chance.randint(*RANKS) for _ in range(holders)]
            for reinit in ("mean", "random", "svd"):
                rows.append(_summed(side, ranks, reinit, options))
                console.print(_line(rows[-1]), highlight=False)
            rows.append(_dense_way(side, ranks, options))
            console.print(_line(rows[-1]), highlight=False)
    common.write_rows(options.to / "size.csv", rows, header)
    capped = "no cap on the residual" if options.cap is None else f"residual capped at {options.cap}"
    title = f"Aggregating one weight, {capped}, ranks {RANKS[0]} to {RANKS[1]} mixed"
    columns = ["way", "side", "holders", "ranks together", "seconds", "peak / factors", "peak / dense", "cut", "error"]
    cells = [_cells(row) for row in rows]
    common.show_table(console, columns, cells, title=title)
    return common.titled(title, (columns, cells))


def _cells(row: Measured) -> list[str]:
    sizes = [str(row.side), str(row.holders), str(row.rank_sum), f"{row.seconds:.3f}"]
    peaks = [f"{row.peak_over_factors:.2f}", f"{row.peak_over_dense:.2f}"]
    return [row.way, *sizes, *peaks, f"{row.cut:.1%}" if row.cut else "none", f"{row.error:.1e}"]


def _line(row: Measured) -> str:
    return "  ".join(_cells(row))


# -- one weight ---------------------------------------------------------------------------------------------------


def _summed(side: int, ranks: list[int], reinit: str, options: argparse.Namespace) -> Measured:
    """Rounds of the product's own aggregation."""
    residual, restart = Residual(side, side, options.cap), Restart(reinit, tuple(ranks))
    common: LowRank | None = None
    seconds, peaks, errors, cuts, factors = [], [], [], [], 0
    for round_ in range(options.rounds):
        held = _contributions(side, ranks, common, options.seed + round_)
        factors = sum(c.term.nbytes for c in held) + residual.nbytes
        before, started = _held(residual), _dense(common)

        def aggregate(held: list[Contribution] = held) -> tuple[LowRank | None, float]:
            outcome = noise_free(held, restart)
            return outcome.common, 0.0 if outcome.residual is None else residual.add(outcome.residual)

        (common, cut), peak, wall = _metered(aggregate)
        total = _sum(held, side)
        update = float((total - (started if started is not None else 0)).norm())
        # In place, since fp64 matrices of this size are large: first the expected sum, then the difference to it.
        for part, sign in ((before, 1), (_dense(common), -1)):
            if part is not None:
                total.add_(part, alpha=sign)
        joined = float(total.norm())
        missing = float(total.sub_(_held(residual)).norm())
        seconds.append(wall)
        peaks.append(peak)
        cuts.append(cut)
        errors.append(_beside(missing, cut * joined) / update)
    row = seconds, factors, max(peaks), max(cuts), max(errors)
    return _row(f"concat, {reinit}", options.cap, side, ranks, *row)


def _dense_way(side: int, ranks: list[int], options: argparse.Namespace) -> Measured:
    """One round as matrices: the sum in fp32 and, where it has more directions than the cap, an SVD of it."""
    held = _contributions(side, ranks, None, options.seed)

    def aggregate() -> tuple[Tensor, float]:
        total = torch.zeros(side, side)
        for c in held:
            total += c.share * (c.term.B @ c.term.A)
        cap = None if options.cap is None else min(options.cap, side // 2)
        if cap is None or sum(ranks) <= cap:
            return total, 0.0
        U, S, V = torch.linalg.svd(total)
        # The result that a run would keep; the sum itself is returned, since its error is measured.
        _ = (U[:, :cap] * S[:cap]) @ V[:cap]
        return total, float(S[cap:].norm() / S.norm())

    (total, cut), peak, wall = _metered(aggregate)
    exact = _sum(held, side)
    size = float(exact.norm())
    error = float(exact.sub_(total).norm()) / size
    return _row("dense", options.cap, side, ranks, [wall], sum(c.term.nbytes for c in held), peak, cut, error)


def _row(
    way: str,
    cap: int | None,
    side: int,
    ranks: list[int],
    seconds: list[float],
    factors: int,
    peak: int,
    cut: float,
    error: float,
) -> Measured:
    median, over = statistics.median(seconds), peak / (4 * side * side)
    return Measured(
        way, cap, side, len(ranks), sum(ranks), len(seconds), median, factors, peak, peak / factors, over, cut, error
    )


def _metered(work: Callable[[], Any]) -> tuple[Any, int, float]:
    """Return the result of ``work``, torch's peak of allocated bytes meanwhile, and the wall seconds."""
    memory = PeakMemory(torch.device("cpu"))
    with memory.window():
        begun = time.perf_counter()
        result = work()
        wall = time.perf_counter() - begun
    return result, memory.peak_bytes(), wall


def _contributions(side: int, ranks: list[int], common: LowRank | None, seed: int) -> list[Contribution]:
    """Return holders' adapters at a round's end: a restart, and the updates since."""
    draw = torch.Generator().manual_seed(seed)
    made = []
    for rank in ranks:
        B, A = torch.zeros(side, rank), torch.randn(rank, side, generator=draw).mul_(side**-0.5)
        if common is not None:
            shared = min(rank, common.rank)
            B[:, :shared], A[:shared] = common.B[:, :shared], common.A[:shared]
        B.add_(torch.randn(side, rank, generator=draw), alpha=LEARNED)
        made.append(Contribution(LowRank(B, A), 1 / len(ranks)))
    return made


def _sum(held: list[Contribution], side: int) -> Tensor:
    """The exact sum as one fp64 matrix, which only this comparison forms."""
    return LowRankSum(tuple(c.term for c in held), tuple(c.share for c in held)).dense_rows(0, side)


def _beside(missing: float, cut: float) -> float:
    """Return the norm of the error beside a cut, to which it is orthogonal; fp64 resolves 1e-8 of the cut."""
    return abs(missing**2 - cut**2) ** 0.5


def _held(residual: Residual) -> Tensor:
    """The residual in fp64, whichever way it is held."""
    held = residual.factors.to(torch.float64).dense() if residual.matrix is None else residual.matrix
    return held.to(torch.float64)


def _dense(term: LowRank | None) -> Tensor | None:
    return None if term is None else term.to(torch.float64).dense()


if __name__ == "__main__":
    main()
