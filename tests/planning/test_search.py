"""The search over split points, on instances too large to try everything."""

import numpy as np
import pytest

import hsplit.planning.search as search
from hsplit.config import Policy, ServerConfig
from hsplit.planning.deadlines import TOTAL, DeadlineScan, Worth
from hsplit.planning.moves import Moves, server_prices
from hsplit.planning.plan import Plan
from hsplit.planning.planner import make_plan
from hsplit.planning.problem import Problem
from tests.planning import test_planner
from tests.planning.test_planner import JOB, LARGEST, SMALLEST, client, cost, importance, objective, server

RANKS = np.array(JOB.rank_set)
AMPLE = server(1e12, 1e12)


def many_clients(count: int, seed: int = 0) -> list:
    draw = np.random.default_rng(seed)
    return [
        client(
            f"c{i}",
            SMALLEST * 1.01 * (1.2 * LARGEST / SMALLEST) ** draw.random(),
            10 ** draw.uniform(8, 10),
            10 ** draw.uniform(6, 9),
        )
        for i in range(count)
    ]


def problem_of(clients: list, deep: ServerConfig = AMPLE, labels: str = "server", ranks: str = "importance") -> Problem:
    return test_planner.problem_of(ranks, clients, deep, cost(labels), importance(0), RANKS)


def short_of_memory(clients: list, made: Plan) -> ServerConfig:
    copies = made.server.working_copy * cost().working_copy_bytes(made.server.split or 0)
    return server((made.server.predicted_bytes - copies) * 0.9, 1e12)


@pytest.mark.parametrize("labels", ["server", "client"])
def test_times_of_all_clients_are_those_of_each(labels: str) -> None:
    times = cost(labels).times
    clients = many_clients(5)
    assert (times.all_client_times(clients) == np.stack([times.client_times(c) for c in clients])).all()


def test_the_deepest_splits_by_a_deadline_are_those_that_fit_and_end_by_it() -> None:
    problem = problem_of(many_clients(12))
    totals = problem.times.sum(axis=2)
    expected = []
    for deadline in np.unique(totals[problem.fits]):
        in_time = problem.fits & (totals <= deadline)
        expected.append([max(np.flatnonzero(row), default=1) for row in in_time])
    assert DeadlineScan(problem).deepest(10**6).tolist() == np.unique(expected, axis=0).tolist()


@pytest.mark.parametrize("labels", ["server", "client"])
def test_a_scan_is_no_worse_than_any_deepest_start(labels: str) -> None:
    # With ample server memory and the start's own objective as the price of a second, it cannot be.
    problem = problem_of(many_clients(40), labels=labels)
    scan = DeadlineScan(problem)
    for start in scan.deepest(10**6)[::5]:
        before = problem.state(start[problem.kind])
        reached = float(problem.objective(before)[0])
        levels, discount = np.full(len(problem.worth), len(RANKS) - 1), problem.discounts(before)[0]
        prices = server_prices(problem, before.counts[0], levels, discount)
        worth = Worth(problem.client_gains + prices.captured, 0.0, reached, 0.0, 1e15, problem.fits)
        splits, passed_over = scan.splits(TOTAL, worth, prices)
        assert not passed_over
        assert float(problem.objective(problem.state(splits[problem.kind]))[0]) >= reached * (1 - 1e-9)


@pytest.mark.parametrize("ranks", ["importance", "uniform"])
def test_estimates_are_exact_where_the_server_has_room_for_all_ranks(ranks: str) -> None:
    clients = many_clients(9)
    # Classes of equal clients too.
    clients += [c.model_copy(update={"name": f"{c.name}-twin"}) for c in clients[:4]]
    problem = problem_of(clients, ranks=ranks)
    moves = Moves(problem, np.minimum(2, problem.deepest))
    rows, targets = np.nonzero(np.isfinite(moves.estimate))
    exact = problem.objective(moves.states(rows, targets))
    assert moves.estimate[rows, targets] == pytest.approx(exact)
    for row, target, score in list(zip(rows, targets, exact, strict=True))[::7]:
        together = moves.together(np.array([row]), np.array([target]))
        assert float(problem.objective(problem.state(together))[0]) == pytest.approx(score)


@pytest.mark.parametrize("ranks", ["importance", "uniform"])
def test_no_single_move_improves_a_large_plan(ranks: str) -> None:
    clients = many_clients(150)
    made = make_plan(clients, AMPLE, cost(), importance(0), Policy(ranks=ranks))
    problem = problem_of(clients, ranks=ranks)
    moves = Moves(problem, np.array([c.split for c in made.clients]))
    rows, targets = np.nonzero(np.isfinite(moves.estimate))
    assert len(rows) > search.VERIFIED_MOVES
    assert problem.objective(moves.states(rows, targets)).max() <= objective(made) * (1 + 2 * search.TOLERANCE)


def test_the_most_promising_moves_do_not_improve_a_large_plan_at_a_server_short_of_memory() -> None:
    clients = many_clients(150)
    made = make_plan(clients, AMPLE, cost(), importance(0), Policy())
    deep = short_of_memory(clients, made)
    tight = make_plan(clients, deep, cost(), importance(0), Policy())
    assert 0 < objective(tight) < objective(made)
    assert tight.server.predicted_bytes <= deep.memory_bytes
    problem = problem_of(clients, deep)
    moves = Moves(problem, np.array([c.split for c in tight.clients]))
    best = np.argsort(-moves.estimate, axis=None)[: search.VERIFIED_MOVES]
    rows, targets = np.unravel_index(best, moves.estimate.shape)
    assert problem.objective(moves.states(rows, targets)).max() <= objective(tight) * (1 + 2 * search.TOLERANCE)


def test_large_instances_too_have_one_plan_and_never_lose_by_a_larger_budget() -> None:
    clients = many_clients(200)
    deep = short_of_memory(clients, make_plan(clients, AMPLE, cost(), importance(0), Policy()))
    before = make_plan(clients, deep, cost(), importance(0), Policy())
    assert before == make_plan(clients, deep, cost(), importance(0), Policy())
    grown = [c.model_copy(update={"memory_gb": c.memory_gb * 1.3}) for c in clients]
    after = make_plan(grown, deep, cost(), importance(0), Policy(), before)
    assert objective(after) >= objective(before) * (1 - 1e-9)


def test_with_its_work_used_up_the_search_keeps_the_best_start(monkeypatch: pytest.MonkeyPatch) -> None:
    clients = many_clients(30)
    best = make_plan(clients, AMPLE, cost(), importance(0), Policy())
    monkeypatch.setattr(search, "MAX_PAIRS", 0)
    made = make_plan(clients, AMPLE, cost(), importance(0), Policy())
    problem = problem_of(clients)
    starts = DeadlineScan(problem).deepest(search.MAX_DEADLINES)[:, problem.kind]
    assert objective(made) >= problem.objective(problem.state(starts)).max() * (1 - 1e-9)
    assert objective(make_plan(clients, AMPLE, cost(), importance(0), Policy(), best)) == pytest.approx(objective(best))


def test_equal_holders_share_their_ranks_and_shares_add_up_to_one() -> None:
    clients = [client(f"c{i}", LARGEST / 2) for i in range(4)]
    for policy in (Policy(), Policy(ranks="uniform")):
        made = make_plan(clients, AMPLE, cost(), importance(0), policy)
        assert sum(part.captured_share for part in (made.server, *made.clients)) == pytest.approx(1)
        assert all(part.captured_share > 0 for part in made.clients)
    same = [part.ranks for part in made.clients if part.split == made.clients[0].split]
    assert all(ranks is same[0] for ranks in same)
    assert Plan.from_json(made.to_json()) == made
    old = made.to_json()
    for part in (old["server"], *old["clients"]):
        del part["captured_share"]
    assert Plan.from_json(old).clients[0].captured_share == 0.0
