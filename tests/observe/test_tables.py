from __future__ import annotations

import csv
import math
from dataclasses import fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hsplit.errors import InputError
from hsplit.observe import tables
from hsplit.observe.tables import MetricsRow, MetricsTable, PlanRow, plan_rows, read_metrics, read_plan, read_rows
from hsplit.planning.plan import Plan
from tests.observe.conftest import metrics_row

FLOATS = st.floats(allow_nan=False)


def test_columns_are_the_documented_ones() -> None:
    assert ",".join(field.name for field in fields(MetricsRow)) == (
        "round,step,train_loss,val_loss,val_ppl,tokens,wall_time_s,virtual_time_s,bytes_up,bytes_down,"
        "captured_importance,available_clients,train_wall_time_s,train_virtual_time_s,worst_ppl"
    )
    assert ",".join(field.name for field in fields(PlanRow)) == (
        "round,name,kind,available,split,rank_total,declared_bytes,predicted_bytes,measured_bytes,"
        "predicted_time_s,measured_time_s,rows,every,stored,wire,val_ppl"
    )


@settings(max_examples=60, deadline=None)
@given(FLOATS, st.none() | FLOATS, st.integers(0, 2**62))
def test_every_float_comes_back_to_its_last_digit(loss: float, train: float | None, size: int) -> None:
    row = metrics_row(1, val_loss=loss, train_loss=train, bytes_up=size)  # type: ignore[arg-type]
    with TemporaryDirectory() as folder:
        path = Path(folder) / "metrics.csv"
        MetricsTable(path, MetricsRow).append(row)
        assert read_rows(path, MetricsRow) == [row]


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(["nan", "None", "1", "a,b", 'q"', "l\nine", "server"]), st.none() | st.integers(0, 99))
def test_plan_rows_come_back(name: str, split: int | None) -> None:
    row = PlanRow(
        3, name, "client", split is not None, split, 7, 10, 9, None, 0.1, None, split, split, name, "int8", 0.1
    )
    with TemporaryDirectory() as folder:
        path = Path(folder) / "plan.csv"
        MetricsTable(path, PlanRow).append(row)
        assert read_rows(path, PlanRow) == [row]
        assert read_plan(path)["name"].tolist() == [name]


def test_numbers_of_numpy_are_written_as_numbers(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    MetricsTable(path, MetricsRow).append(metrics_row(1, val_loss=np.float32(0.1), val_ppl=np.float64(0.3)))
    (row,) = read_rows(path, MetricsRow)
    assert (row.val_loss, row.val_ppl) == (float(np.float32(0.1)), 0.3)


def test_infinite_and_undefined_losses_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    MetricsTable(path, MetricsRow).append(metrics_row(1, val_loss=math.nan, val_ppl=math.inf))
    (row,) = read_rows(path, MetricsRow)
    assert math.isnan(row.val_loss)
    assert row.val_ppl == math.inf


def test_frame_has_usable_types_and_an_empty_first_train_loss(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    MetricsTable(path, MetricsRow).append(metrics_row(0), metrics_row(1))
    assert next(csv.DictReader(path.read_text().splitlines()))["train_loss"] == ""
    frame = read_metrics(path)
    assert frame["train_loss"].isna().tolist() == [True, False]
    assert frame["tokens"].tolist() == [0, 1234]
    assert str(frame["tokens"].dtype) == "int64"
    assert str(frame["val_ppl"].dtype) == "float64"


def test_plan_frame_keeps_whole_numbers_beside_missing_ones(tmp_path: Path, plan: Plan) -> None:
    path = tmp_path / "plan.csv"
    MetricsTable(path, PlanRow).append(*plan_rows(2, plan, {"laptop": 5}, {"laptop": 0.5}))
    frame = read_plan(path).set_index("name")
    assert list(frame.index) == ["server", "phone-0", "laptop", "watch"]
    assert frame["split"].isna().tolist() == [False, False, False, True]
    assert frame["measured_bytes"]["laptop"] == 5
    assert frame["rank_total"].to_dict() == {"server": 96, "phone-0": 22, "laptop": 36, "watch": 0}
    assert frame["available"].tolist() == [True, True, True, False]


def test_a_table_is_cut_to_the_rounds_of_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    table = MetricsTable(path, MetricsRow)
    for round in range(3):
        table.append(metrics_row(round))
    resumed = MetricsTable(path, MetricsRow)
    resumed.cut(1)
    assert read_rows(path, MetricsRow) == [metrics_row(0), metrics_row(1)]
    resumed.append(metrics_row(2, tokens=7))
    assert [row.tokens for row in read_rows(path, MetricsRow)] == [0, 1234, 7]
    resumed.cut(0)
    assert read_rows(path, MetricsRow) == [metrics_row(0)]


def test_a_table_of_an_older_version_has_fewer_columns(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    MetricsTable(path, MetricsRow).append(metrics_row(0), metrics_row(1))
    lines = path.read_text().splitlines()
    newer = [metrics_row(0), metrics_row(1)]
    for missing in (["worst_ppl"], ["worst_ppl", "train_virtual_time_s", "train_wall_time_s"]):
        path.write_text("".join(f"{line.rsplit(',', len(missing))[0]}\n" for line in lines))
        assert read_rows(path, MetricsRow) == [replace(row, **dict.fromkeys(missing)) for row in newer]
        assert read_metrics(path)["worst_ppl"].isna().all()
    path.write_text("".join(f"{line.rsplit(',', 4)[0]}\n" for line in lines))
    with pytest.raises(InputError, match="the columns must be"):
        read_rows(path, MetricsRow)


def test_failed_append_leaves_file_and_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.csv"
    table = MetricsTable(path, MetricsRow)
    table.append(metrics_row(0))

    def disk_full(path: Path, text: str) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patched:
        patched.setattr(tables, "write_text_atomically", disk_full)
        with pytest.raises(OSError, match="no space"):
            table.append(metrics_row(1))
    assert table.rows == (metrics_row(0),)
    assert read_rows(path, MetricsRow) == [metrics_row(0)]


@pytest.mark.parametrize(("content", "place"), [("", ":1:"), ("a,b\n1,2\n", ":1:"), ("{good}1,2\n", ":2:")])
def test_what_is_no_table_is_refused_with_its_line(tmp_path: Path, content: str, place: str) -> None:
    path = tmp_path / "metrics.csv"
    header = ",".join(field.name for field in fields(MetricsRow)) + "\n"
    path.write_text(content.replace("{good}", header))
    with pytest.raises(InputError, match=rf"metrics\.csv{place}"):
        read_metrics(path)


def test_missing_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no such file"):
        read_metrics(tmp_path / "metrics.csv")
