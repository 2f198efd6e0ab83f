"""Tables of a run's rounds (metrics.csv, plan.csv, timing.csv), and the counts that their rows are made of."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from hsplit.actors.holder_actor import HolderActor
from hsplit.actors.messages import LossReport
from hsplit.errors import HsplitError
from hsplit.observe.tables import CUT, LAG, MetricsRow, MetricsTable, PlanRow, TimingRow, plan_rows, timing_rows
from hsplit.run.context import RunContext
from hsplit.run.step import StepOutcome, Validation, perplexity


class Records:
    """Counts the results of a round's steps, and writes its rows when it ends.

    Args:
        context: of the run; most counts are in its state.
    """

    def __init__(self, context: RunContext) -> None:
        self._context, directory = context, context.directory
        self._metrics = MetricsTable(directory.metrics, MetricsRow)
        self._plans = MetricsTable(directory.plan, PlanRow)
        self._timing = MetricsTable(directory.timing, TimingRow)
        self._tables: tuple[MetricsTable[Any], ...] = (self._metrics, self._plans, self._timing)
        self._begun = time.monotonic()
        self._losses: dict[str, float] = {}
        self._probe_peaks: dict[str, int] = {}
        # Of the round under way: seconds by holder and phase, seconds of its steps, holders that took longer than
        # declared (clock: emulated), and clients left out of a step.
        self._spent_s: dict[str, dict[str, float]] = {}
        self._steps_s = 0.0
        self._overran: set[str] = set()
        self._left_out: set[str] = set()

    @property
    def rows(self) -> tuple[MetricsRow, ...]:
        """The rows of ``metrics.csv``."""
        return self._metrics.rows

    @property
    def wall_time_s(self) -> float:
        """Seconds since the run's start, over all its launches."""
        return time.monotonic() - self._begun

    def count_wall_time_from(self, wall_time_s: float) -> None:
        """Continue to count from the end of an earlier launch."""
        self._begun = time.monotonic() - wall_time_s

    def restore(self) -> None:
        """Cut the tables to the rounds that the state has completed, and forget the round under way.

        Raises:
            InputError: a table was changed since, so that its rounds so far would be lost.
        """
        for table in self._tables:
            table.cut(self._context.state.round)
        self._clear_round()

    def clear(self) -> None:
        """Empty the tables, and forget the round under way."""
        for table in self._tables:
            table.clear()
        self._clear_round()

    # -- a step -----------------------------------------------------------------------------------------------------

    def step(self, outcome: StepOutcome, wall_s: float, virtual_s: float) -> None:
        """Count one local step.

        Args:
            outcome: of the step.
            wall_s: seconds that it took.
            virtual_s: seconds that it would have taken at the declared speeds.
        """
        state = self._context.state
        self._note_left_out(outcome.left_out)
        self._steps_s += wall_s
        state.bytes_up += outcome.bytes_up
        state.bytes_down += outcome.bytes_down
        for name, phases in outcome.seconds.items():
            spent = self._spent_s.setdefault(name, {})
            for phase, seconds in phases.items():
                spent[phase] = spent.get(phase, 0.0) + seconds
        self._overran |= outcome.overran
        training = self._count_losses(outcome.losses)
        state.step += 1
        state.virtual_time_s += virtual_s
        job = self._context.job
        self._context.display.step(
            state.round + 1,
            job.rounds,
            state.step,
            job.rounds * job.local_steps,
            dict(self._losses),
            {client: "training" if client in training else "waiting" for client in self._context.clients},
        )

    def _note_left_out(self, clients: Collection[str]) -> None:
        """Report clients that were left out of a step: in the log each time, on the terminal once a round."""
        step = self._context.state.step + 1
        for name in sorted(clients):
            text = f"step {step}: {name} is not in time, and the others go on without it in this step"
            self._context.events.write("left_out", text, client=name, step=step)
            if name not in self._left_out:
                self._context.display.note(text)
        self._left_out |= set(clients)

    def _count_losses(self, losses: Sequence[LossReport]) -> list[str]:
        """Count losses and tokens; returns the clients that took part."""
        state = self._context.state
        training = [client for client in self._context.clients if any(loss.client == client for loss in losses)]
        for client in training:
            own = [loss for loss in losses if loss.client == client]
            loss_sum, tokens = sum(loss.loss_sum for loss in own), sum(loss.tokens for loss in own)
            self._losses[client] = loss_sum / max(tokens, 1)
            state.round_loss_sum += loss_sum
            state.round_tokens += tokens
            state.client_tokens[client] = state.client_tokens.get(client, 0) + tokens
        state.tokens += sum(loss.tokens for loss in losses)
        return training

    # -- memory -----------------------------------------------------------------------------------------------------

    def peaks(self, holders: Sequence[str]) -> dict[str, int]:
        """Peak memory of each of ``holders`` since the last call, by name, where it was measured."""
        executor = self._context.executor
        until = time.monotonic() + self._context.job.faults.patience_s
        peaks = executor.wait([executor.call(name, HolderActor.peak_bytes) for name in holders], until)
        # A failure here is found again by the next call that matters.
        found = zip(holders, peaks, strict=True)
        return {name: peak for name, peak in found if peak and not isinstance(peak, HsplitError)}

    def peaks_with_probe(self) -> dict[str, int]:
        """Peak memory of all holders over the last round and the probe after it, which ran by the same plan."""
        self._probe_peaks = self.peaks([*self._context.clients, *self._context.servers])
        return _larger(self._context.state.measured_bytes, self._probe_peaks)

    def forget_peaks(self, holders: Sequence[str]) -> None:
        """Measure ``holders`` from here on by the new plan alone."""
        for name in self.peaks(holders):
            self._probe_peaks.pop(name, None)

    # -- a round's end ----------------------------------------------------------------------------------------------

    def cut(self, relative_norm: float) -> None:
        """Record and report how much a full residual lost, if anything (METHOD 6).

        Args:
            relative_norm: Frobenius norm of the part cut off, relative to the residual; of the weight that lost most.
        """
        if relative_norm:
            state = self._context.state
            state.residual_cut = max(state.residual_cut, relative_norm)
            text = (
                f"round {state.round + 1}: the residual reached residual.max_rank; at most "
                f"{relative_norm:.2e} of a weight's residual (relative Frobenius norm) was cut"
            )
            self._context.note("residual_cut", text, relative_norm=relative_norm)

    @contextmanager
    def validating(self) -> Iterator[None]:
        """Count the wall time inside as a validation's."""
        begun = time.monotonic()
        try:
            yield
        finally:
            self._context.state.validation_wall_s += time.monotonic() - begun

    def close_round(self, validation: Validation | None) -> None:
        """Write the round's rows and reset the counts.

        Args:
            validation: at its end; ``None`` in a round without one.
        """
        context = self._context
        state, plan = context.state, context.plan
        state.wall_time_s = self.wall_time_s
        # A single node's batches join the data of all clients.
        own_ppl = {} if validation is None or context.single else validation.perplexities()
        trained = state.round_tokens > 0
        row = MetricsRow(
            round=state.round,
            step=state.step,
            train_loss=state.round_loss_sum / state.round_tokens if trained else None,
            val_loss=None if validation is None else validation.loss,
            val_ppl=None if validation is None else perplexity(validation.loss),
            tokens=state.tokens,
            wall_time_s=state.wall_time_s,
            virtual_time_s=state.virtual_time_s,
            bytes_up=state.bytes_up,
            bytes_down=state.bytes_down,
            captured_importance=plan.captured_importance,
            available_clients=len(context.clients),
            train_wall_time_s=state.wall_time_s - state.validation_wall_s,
            train_virtual_time_s=state.virtual_time_s - state.validation_virtual_s,
            worst_ppl=max(own_ppl.values(), default=None),
        )
        self._metrics.append(row)
        measured_s = {name: sum(own.values()) / context.job.local_steps for name, own in self._spent_s.items()}
        state.measured_bytes = _larger(self.peaks([*context.clients, *context.servers]), self._probe_peaks)
        self._probe_peaks = {}
        holders = plan_rows(state.round, plan, state.measured_bytes, measured_s, own_ppl)
        timing = timing_rows(state.round, self._spent_s, self._steps_s)
        self._plans.append(*holders)
        self._timing.append(*timing)
        self._note_overran()
        closed = {**asdict(row), CUT: state.residual_cut, LAG: state.residual_lag}
        state.bytes_up = state.bytes_down = state.round_tokens = 0
        state.round_loss_sum = state.residual_cut = state.residual_lag = 0.0
        self._clear_round()
        found = "not validated"
        if row.val_ppl is not None:
            worst = "" if row.worst_ppl is None else f", of the worst client {row.worst_ppl:.3f}"
            found = f"validation perplexity {row.val_ppl:.3f}{worst}"
        text = f"round {row.round}: {found}"
        context.events.write("round", text, **closed, client_tokens=state.client_tokens)
        context.display.round_done(row, holders, timing)

    def _note_overran(self) -> None:
        if self._overran and self._context.job.clock == "emulated":
            text = (
                f"round {self._context.state.round}: {', '.join(sorted(self._overran))} computed longer than declared,"
                " so the emulated clock is late; a smaller job.clock_speedup gives more time"
            )
            self._context.note("late", text, holders=sorted(self._overran))

    def _clear_round(self) -> None:
        """Reset the counts of a round that are not in its state."""
        self._spent_s.clear()
        self._steps_s = 0.0
        self._overran.clear()
        self._left_out.clear()


def _larger(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    """The larger of two numbers, by name."""
    return {name: max(one.get(name, 0), other.get(name, 0)) for name in {**one, **other}}
