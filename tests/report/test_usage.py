from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest

from hsplit.errors import InputError
from hsplit.observe.tables import PHASES, MetricsTable, PlanRow, TimingRow, read_rows
from hsplit.report.report import shares_text
from hsplit.report.run_record import load_run
from hsplit.report.usage import StepShares, holder_steps, memory_record, step_shares
from hsplit.run_directory import RunDirectory
from tests.observe.conftest import metrics_row
from tests.report.test_report import assert_self_contained, report_of

MakeRun = Callable[..., Path]
LABEL = "wall time of a local step by holder and phase"


def timing(round: int, wall_s: float, **holders: dict[str, float]) -> list[TimingRow]:
    """Rows of a round; what is left of ``wall_s`` is waiting."""
    rows = []
    for name, seconds in holders.items():
        whole = {**dict.fromkeys(PHASES, 0.0), **seconds, "waiting": wall_s - sum(seconds.values())}
        rows += [TimingRow(round, name, phase, seconds) for phase, seconds in whole.items()]
    return rows


@pytest.fixture
def rows() -> list[TimingRow]:
    """Two rounds of ten steps; the laptop has most arithmetic, the phone, paced, is busy longest."""
    server = {"unpack": 0.5, "forward": 1.0, "tail": 0.5, "backward": 1.0, "optimizer": 0.5, "pack": 0.25}
    laptop = {"data": 0.25, "forward": 1.0, "backward": 1.5, "optimizer": 0.5}
    phone = {"data": 0.5, "forward": 0.5, "backward": 0.5, "pack": 0.25, "paced": 3.0}
    return [
        *timing(1, 10.0, server=server, phone=phone, laptop=laptop),
        *timing(2, 20.0, server=server, laptop=laptop | {"forward": 4.0}, phone=phone | {"paced": 9.0}),
    ]


def test_columns_are_the_documented_ones() -> None:
    assert ",".join(field.name for field in fields(TimingRow)) == "round,name,phase,seconds"


def test_rows_come_back_from_the_file_up_to_a_round(tmp_path: Path, rows: list[TimingRow]) -> None:
    path = tmp_path / "timing.csv"
    table = MetricsTable(path, TimingRow)
    table.append(*rows)
    assert read_rows(path, TimingRow) == rows
    resumed = MetricsTable(path, TimingRow)
    resumed.cut(1)
    assert list(resumed.rows) == read_rows(path, TimingRow) == [row for row in rows if row.round == 1]


def test_unknown_phase_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "timing.csv"
    path.write_text("round,name,phase,seconds\n1,server,data,0.5\n1,server,lunch,0.5\n")
    with pytest.raises(InputError, match=r"timing\.csv:3: .*'lunch' is none of data, unpack"):
        read_rows(path, TimingRow)


def test_mean_step_of_each_holder_is_over_its_own_rounds(rows: list[TimingRow]) -> None:
    metrics = [metrics_row(0), metrics_row(1), metrics_row(2, step=40)]
    phone_left = [row for row in rows if (row.round, row.name) != (2, "phone")]
    phone, laptop, server = holder_steps(phone_left, metrics)
    assert [holder.name for holder in (phone, laptop, server)] == ["phone", "laptop", "server"]
    assert list(phone.seconds) == list(PHASES)
    assert phone.seconds["paced"] == pytest.approx(3.0 / 10)
    assert sum(phone.seconds.values()) == pytest.approx(10.0 / 10)
    assert laptop.seconds["forward"] == pytest.approx((1.0 + 4.0) / (10 + 30))
    assert sum(server.seconds.values()) == pytest.approx((10.0 + 20.0) / (10 + 30))


def test_round_whose_steps_are_not_known_is_left_out(rows: list[TimingRow]) -> None:
    (phone, *_) = holder_steps(rows, [metrics_row(0), metrics_row(1)])
    assert phone.seconds["paced"] == pytest.approx(3.0 / 10)
    assert holder_steps(rows, [metrics_row(0)]) == holder_steps([], [metrics_row(0), metrics_row(1)]) == []


def test_arithmetic_is_the_slowest_clients_and_the_servers_by_round(rows: list[TimingRow]) -> None:
    shares = step_shares(rows)
    assert shares is not None
    assert shares.arithmetic == pytest.approx(((3.0 + 3.0) / 10 + (6.0 + 3.0) / 20) / 2)
    # of the phone, which is busy longest, and of the server; the laptop's data is nobody's loss
    assert shares.overhead == {
        (False, "paced"): pytest.approx((3.0 / 10 + 9.0 / 20) / 2),
        (False, "data"): pytest.approx((0.5 / 10 + 0.5 / 20) / 2),
        (True, "unpack"): pytest.approx((0.5 / 10 + 0.5 / 20) / 2),
        (False, "pack"): pytest.approx((0.25 / 10 + 0.25 / 20) / 2),
        (True, "pack"): pytest.approx((0.25 / 10 + 0.25 / 20) / 2),
    }
    assert next(iter(shares.overhead)) == (False, "paced")
    assert shares.idle == pytest.approx((1 - (4.75 + 3.75) / 10 + 1 - (10.75 + 3.75) / 20) / 2)


def test_shares_of_one_client_and_server_that_take_turns_are_the_whole_step() -> None:
    client = {"data": 0.5, "forward": 2.0, "tail": 1.0, "backward": 1.0, "optimizer": 0.25, "pack": 0.25}
    shares = step_shares(timing(1, 10.0, server={"forward": 2.0, "backward": 1.0, "unpack": 0.5}, client=client))
    assert shares is not None
    assert shares.arithmetic == pytest.approx(0.725)
    assert shares.arithmetic + sum(shares.overhead.values()) + shares.idle == pytest.approx(1)


def test_what_client_and_server_do_at_once_counts_twice() -> None:
    shares = step_shares(timing(1, 4.0, server={"forward": 3.0}, client={"forward": 3.0}))
    assert shares == StepShares(arithmetic=1.5, overhead={}, idle=0.0)


def test_clients_with_the_whole_model_need_no_server() -> None:
    shares = step_shares(timing(1, 4.0, a={"forward": 1.0, "data": 1.0}, b={"forward": 3.0}))
    assert shares == StepShares(arithmetic=0.75, overhead={}, idle=0.25)


def test_no_time_has_no_shares() -> None:
    assert step_shares([]) is None
    assert step_shares(timing(1, 0.0, server={}, client={})) is None


def test_words_name_the_largest_of_the_rest() -> None:
    overhead = {(False, "paced"): 0.25, (True, "unpack"): 0.125, (False, "data"): 0.03}
    words = shares_text(StepShares(arithmetic=0.505, overhead=overhead, idle=0.05))
    assert "50.5% is the model's arithmetic" in words
    assert words.endswith(
        "Largest of the rest: paced at the busiest client 25.0%, unpack at the server 12.5%, neither of them at work"
        " 5.0%."
    )
    assert "rest" not in shares_text(StepShares(arithmetic=1.0, overhead={}, idle=0.0))


def test_report_draws_where_the_time_goes(fake_run: MakeRun, tmp_path: Path, rows: list[TimingRow]) -> None:
    run = RunDirectory.open(fake_run("timed"))
    MetricsTable(run.timing, TimingRow).append(*rows)
    assert list(load_run(run.path).timing) == rows
    html, page = report_of(tmp_path / "report.html", run.path, fake_run("older"))
    assert_self_contained(html, page)
    assert page.labels.count(LABEL) == 1
    assert page.text.count("Where a step's time goes") == 1
    assert "52.5% is the model's arithmetic" in page.text
    assert "paced at the busiest client 37.5%" in page.text
    for label in ("wall time of a local step (s)", "laptop", "phone", *PHASES):
        assert f"\n{label}\n" in page.text


def test_run_without_timing_has_no_such_figure(fake_run: MakeRun, tmp_path: Path) -> None:
    run = fake_run("older")
    assert load_run(run).timing == ()
    _, page = report_of(tmp_path / "report.html", run)
    assert LABEL not in page.labels
    assert "Where a step's time goes" not in page.text


# -- memory --------------------------------------------------------------------------------------------------------


def row(round: int, name: str, declared: int, predicted: int, measured: int | None, available: bool = True) -> PlanRow:
    kind = "server" if name == "server" else "client"
    split = 2 if available else None
    return PlanRow(round, name, kind, available, split, 8, declared, predicted, measured, 0.5, None)


def test_worst_round_is_the_largest_part_of_what_was_declared_then() -> None:
    rows = [
        *(row(0, "server", 900, 300, 290), row(0, "a", 100, 90, 80)),
        *(row(1, "server", 900, 300, 290), row(1, "a", 100, 90, 95)),
        # less memory taken than before, but also less declared
        *(row(2, "server", 900, 300, 310), row(2, "a", 50, 45, 52)),
        *(row(3, "server", 900, 300, 280), row(3, "a", 50, 45, 40)),
    ]
    a, server = memory_record(rows)
    assert (a.name, server.name) == ("a", "server")
    assert (a.last.round, a.worst.round, a.over_predicted, a.over_declared) == (3, 2, (1, 2), (2,))
    assert a.mark == "over declared"
    assert (server.worst.round, server.over_predicted, server.over_declared) == (2, (2,), ())
    assert server.mark == "over predicted"


def test_without_measurements_the_worst_is_what_was_predicted() -> None:
    (a,) = memory_record([row(0, "a", 100, 70, None), row(1, "a", 100, 90, None), row(2, "a", 200, 90, None)])
    assert (a.worst.round, a.mark) == (1, "")


def test_of_equal_rounds_the_last_is_the_worst() -> None:
    (a,) = memory_record([row(n, "a", 100, 70, 60) for n in range(4)])
    assert a.worst.round == 3


def test_a_client_that_takes_no_part_keeps_to_its_budget() -> None:
    rows = [row(0, "a", 100, 70, 60), row(1, "a", 1, 0, None, available=False)]
    (a,) = memory_record(rows)
    assert (a.last.available, a.worst.round, a.mark) == (False, 0, "")


def test_no_rows_are_no_record() -> None:
    assert memory_record([]) == []
