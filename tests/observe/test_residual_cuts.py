"""What ``residual.max_rank`` cut is reported wherever a run is: events, report, last lines, model card."""

from __future__ import annotations

from html import unescape
from pathlib import Path

import pytest

from hsplit.exporting.export import export
from hsplit.observe.events import EventLog, read_events
from hsplit.observe.run_list import results_lines
from hsplit.observe.tables import cut_text, residual_cuts
from hsplit.report.report import write_report
from tests.finished_run import FinishedRun, finished_run

POLICIES = Path(__file__).parents[2] / "policies"
EXACT = "the adapters were summed exactly in every round"


def closing(round_: int, cut: float | None) -> dict[str, object]:
    return {"event": "round", "round": round_, **({} if cut is None else {"residual_cut": cut})}


def test_a_round_counts_as_it_ended_last_and_the_state_before_training_not_at_all() -> None:
    events = [closing(0, 0.0), closing(1, 0.0), closing(2, 0.5), {"event": "repeated", "round": 2}]
    events += [closing(2, 0.25), {"event": "residual_cut", "relative_norm": 0.9}, closing(3, 0.125)]
    assert residual_cuts(events) == {1: 0.0, 2: 0.25, 3: 0.125}
    assert residual_cuts(events, 2) == {1: 0.0, 2: 0.25}


def test_rounds_whose_events_do_not_tell_are_not_said_to_be_exact() -> None:
    assert residual_cuts([closing(1, None), {"event": "round"}]) == {}
    assert cut_text({}, "concat") == ""


@pytest.mark.parametrize(
    ("cuts", "aggregation", "told"),
    [
        ({1: 0.0, 2: 0.0}, "concat", EXACT),
        ({1: 0.0}, "fedavg", ""),
        ({1: 0.0, 2: 0.268, 3: 0.1}, "concat", "cut in 2 of 3 rounds: at most 27 % of a weight's residual"),
        ({1: 0.004}, "concat", "cut in 1 of 1 round: at most 0.4 %"),
        # The rounding of the fp32 factors that are kept is larger.
        ({1: 4e-9}, "concat", EXACT),
    ],
)
def test_only_a_run_that_lost_nothing_is_called_exact(cuts: dict[int, float], aggregation: str, told: str) -> None:
    text = cut_text(cuts, aggregation)
    assert told in text and bool(text) == bool(told)
    assert (EXACT in text) == (told == EXACT)


@pytest.fixture(scope="module")
def cut(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """Two holders of a weight learn more than the two directions that the residual has room for."""
    return finished_run(tmp_path_factory.mktemp("cut"), models["llama"], residual={"max_rank": 2})


@pytest.fixture(scope="module")
def whole(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    return finished_run(tmp_path_factory.mktemp("whole"), models["llama"], residual={"max_rank": "full"})


def everything_said(run: FinishedRun, to: Path) -> dict[str, str]:
    report = write_report([run.path], to / "report.html").read_text()
    card = (export(run.path, to / "adapter") / "README.md").read_text()
    return {"report": report, "card": card, "last lines": "\n".join(results_lines(run.directory))}


def test_a_run_that_was_cut_says_how_much_everywhere_and_is_nowhere_called_noise_free(
    cut: FinishedRun, tmp_path: Path
) -> None:
    cuts = residual_cuts(read_events(cut.directory.events))
    assert list(cuts) == [1, 2] and max(cuts.values()) > 0
    share = f"at most {100 * max(cuts.values()):.2g} % of a weight"
    for place, text in everything_said(cut, tmp_path).items():
        assert share in unescape(text), place
        assert "exactly" not in text and "noise-free" not in text.lower(), place


def test_a_run_that_was_not_cut_says_so(whole: FinishedRun, tmp_path: Path) -> None:
    assert residual_cuts(read_events(whole.directory.events)) == {1: 0.0, 2: 0.0}
    told = everything_said(whole, tmp_path)
    assert EXACT in told["report"] and EXACT in told["card"]
    assert "cut" not in told["last lines"]


def test_a_card_tells_of_the_rounds_that_it_exports(cut: FinishedRun, tmp_path: Path) -> None:
    progress, _ = cut.checkpoint()
    with EventLog(cut.directory.events) as events:
        # Of a round after the checkpoint, which a resumed run repeats.
        events.write("round", "round 3", round=progress.round + 1, residual_cut=0.99)
    assert "99 %" not in (export(cut.path, tmp_path / "out") / "README.md").read_text()


@pytest.mark.parametrize("policy", sorted(POLICIES.glob("*.yaml")), ids=lambda path: path.stem)
def test_no_policy_is_described_as_what_a_cut_would_belie(policy: Path) -> None:
    # Reports and model cards quote it of every run.
    assert "noise-free" not in policy.read_text().lower()
