from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest

from hsplit.planning.plan import HolderPlan, Plan
from hsplit.report.figures import Piece, split_pieces, splits_svg
from hsplit.report.rank_maps import (
    SHADES,
    HeatMap,
    HolderGroup,
    RankMaps,
    Scale,
    Strip,
    heat_maps_svg,
    mean_ranks,
    rounds_shown,
)
from hsplit.report.run_record import PlanHistory
from tests.observe.conftest import KINDS, LAYERS
from tests.report.test_report import Page

SERVER = HolderGroup("server", frozenset({"server"}))
PATH = re.compile(r'<path d="([^"]*)" style="fill: (#\w+); stroke: \2')


def areas(svg: str) -> dict[str, float]:
    """The area that is filled with each colour in a heat map's rectangles, in square points."""
    filled: Counter[str] = Counter()
    for path, colour in PATH.findall(svg):
        for rectangle in path.split("z"):
            numbers = [float(number) for number in re.findall(r"-?[\d.]+", rectangle)]
            if numbers:
                xs, ys = numbers[0::2], numbers[1::2]
                filled[colour] += (max(xs) - min(xs)) * (max(ys) - min(ys))
    return dict(filled)


def texts(svg: str) -> list[str]:
    return Page(svg).text.split("\n")


def test_a_heat_map_fills_every_cell_once_with_its_shade() -> None:
    scale = Scale("amount (m)", "viridis", lambda value: value / 4, [(0.0, "none"), (4.0, "all")])
    cells = {(row, column): float(2 * column) for row in range(10) for column in range(2)}
    del cells[4, 0]
    svg = heat_maps_svg([Strip("things", [HeatMap("first", cells)], scale)], 10, ["left", "right"], "k", "label")
    filled = areas(svg)
    bar = min(filled.values())  # of a shade that only the colour bar has
    cell = (max(filled.values()) - bar) / 10
    assert len(filled) == SHADES
    assert sorted(round((area - bar) / cell, 1) for area in filled.values())[-3:] == [0, 9, 10]
    for shown in ("first", "left", "right", "none", "all", "amount (m)", "things", "layer"):
        assert shown in texts(svg)


def test_ranks_and_importance_are_drawn_for_each_change(plan: Plan, other_plan: Plan) -> None:
    shares = {f"model.layers.{n}.{kind}": 1 / 18 for n in range(LAYERS) for kind in KINDS}
    history = PlanHistory({0: plan, 2: other_plan}, {1: shares, 2: shares})
    clients = HolderGroup("mean of 3 clients", frozenset({"phone-0", "laptop", "watch"}))
    svg = RankMaps(history, [SERVER, clients]).svg([SERVER, clients], "maps", importance=True)
    shown = Counter(texts(svg))
    assert [shown[title] for title in ("at the start", "after round 1", "after round 2")] == [1, 1, 1]
    assert (shown["since the start"], shown["new plan"]) == (2, 2)
    assert shown["equal: no probe yet"] == 1
    assert shown["share of the total (%)"] == 1
    assert shown["5.6"] == 1  # 1 of 18 weights, on the importance's colour bar
    assert (shown["rank"], shown["16"]) == (2, 2)  # the highest rank, on both colour bars
    for kind in ("q", "k", "down"):
        assert shown[kind] == 8  # below each map but the one of no probe
    label = "normalized importance and ranks of server and ranks of mean of 3 clients by layer and weight kind"
    assert Page(svg).labels == [f"{label} over rounds"]


def test_clients_mean_is_over_those_that_train_the_weight(plan: Plan) -> None:
    means = mean_ranks(plan.available)
    assert means["model.layers.0.self_attn.k_proj"] == 3.0  # 2 on the phone, 4 on the laptop
    assert means["model.layers.2.self_attn.k_proj"] == 4.0  # the laptop alone
    assert "model.layers.3.self_attn.k_proj" not in means
    assert mean_ranks([HolderPlan("c", "client", True, 1, {"model.layers.0.q": 0})]) == {}


def test_of_many_rounds_the_first_last_and_spread_ones_are_shown(plan: Plan) -> None:
    few = PlanHistory({0: plan}, {done: {} for done in range(1, 8)})
    assert rounds_shown(few) == tuple(range(8))
    many = PlanHistory({done: plan for done in range(0, 60, 6)}, {done: {} for done in range(1, 60)})
    shown = rounds_shown(many)
    assert (shown[0], shown[-1], len(shown)) == (0, 59, 8)
    assert set(shown[1:-1]) <= set(many.plans)
    gaps = [later - earlier for earlier, later in pairwise(shown)]
    assert max(gaps) <= 12
    assert rounds_shown(PlanHistory({0: plan}, {done: {} for done in range(1, 60)}))[1:3] == (8, 17)


@pytest.mark.parametrize(("layers", "most_bytes"), [(10, 200_000), (80, 900_000)])
def test_maps_of_few_and_of_many_layers_stay_light(plan: Plan, layers: int, most_bytes: int) -> None:
    kinds = [*KINDS, "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj"]
    names = [f"model.layers.{layer}.{kind}" for layer in range(layers) for kind in kinds]
    plans = {
        done: replace(
            plan,
            layers=layers,
            server=replace(plan.server, ranks={w: 2 ** ((i * 7 + done) % 6) for i, w in enumerate(names)}),
        )
        for done in range(12)
    }
    shares = {done: {w: 1.0 + (i * 31 + done) % 50 for i, w in enumerate(names)} for done in range(1, 12)}
    history = PlanHistory(plans, shares)
    svg = RankMaps(history, [SERVER]).svg([SERVER], "maps", importance=True)
    assert len(svg) < most_bytes
    assert texts(svg).count("gate") == 15


def test_one_rank_for_all_and_no_importance(plan: Plan) -> None:
    alike = replace(plan, server=replace(plan.server, ranks=dict.fromkeys(plan.server.ranks, 1)))
    svg = RankMaps(PlanHistory({0: alike}), [SERVER]).svg([SERVER], "maps", importance=True)
    assert "share of the total (%)" not in texts(svg)
    assert texts(svg).count("at the start") == 1


def test_split_points_hold_from_the_round_after_a_plan(plan: Plan, other_plan: Plan) -> None:
    history = PlanHistory({0: plan, 2: other_plan, 4: other_plan})
    assert split_pieces(history, "laptop", 6) == [Piece(1, 2, 3), Piece(3, 6, 5)]
    assert split_pieces(history, "phone-0", 6) == [Piece(1, 2, 2), Piece(3, 6, None)]
    assert split_pieces(history, "watch", 2) == [Piece(1, 2, None)]
    shown = texts(splits_svg(history, ["phone-0", "laptop", "watch"], 6, "splits"))
    assert shown.count("unavailable") == 2
    for label in ("phone-0", "laptop", "watch", "3", "5", "round"):
        assert label in shown


def test_short_pieces_of_long_runs_are_not_written_over_one_another(plan: Plan, other_plan: Plan) -> None:
    history = PlanHistory({done: (plan, other_plan)[done % 2] for done in range(300)})
    shown = texts(splits_svg(history, ["phone-0", "laptop"], 300, "splits"))
    assert "unavailable" not in shown
    assert "×" not in shown
