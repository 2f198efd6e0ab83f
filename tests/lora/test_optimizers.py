"""Every ``job.optimizer``: what it keeps, that it can be resumed exactly, and that plans count what it takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from benchmarks.memory import Case, Measured, measured_client, measured_server, random_model
from hsplit.config import Job, Policy
from hsplit.lora import optimizer as module
from hsplit.lora.adapters import AdapterSet
from hsplit.lora.direction_steps import DirectionSteps
from hsplit.lora.holder import Holder, RoundUpdate
from hsplit.lora.optimizer import as_parameters, kept_state, new_optimizer, restore_state, without_moments
from hsplit.models.factors import LowRank
from hsplit.models.loading import load_segment
from hsplit.models.segment import BaseModel, SegmentSpec
from hsplit.models.spec import LinearShape, ModelSpec
from hsplit.planning.cost.counted_model import CountedModel
from hsplit.run.checkpoint import latest_checkpoint, read_checkpoint
from hsplit.run_directory import RunDirectory
from tests.in_process import Recorder, coordinator, fixed_plan, random_examples
from tests.tiny import tiny_spec

# Paged optimizers are refused on CPUs; there bitsandbytes steps as they do but pages nothing, and says so.
pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
OPTIMIZERS = ["adamw", "adamw8bit", "paged_adamw", "paged_adamw8bit", "sgd"]
ENTRIES = 3000


class Buffer:
    """A flat buffer pulled towards random targets by the job's optimizer."""

    def __init__(self, job: Job, start: Tensor | None = None) -> None:
        draw = torch.Generator().manual_seed(0)
        self._targets = torch.randn(20, ENTRIES, generator=draw)
        self.flat = nn.Parameter(torch.zeros(ENTRIES) if start is None else start.clone())
        self.flat.grad = torch.zeros(ENTRIES)
        self.optimizer = new_optimizer(job, as_parameters(job, self.flat))

    def steps(self, first: int, last: int) -> Tensor:
        """Steps ``[first, last)``; returns a copy of the buffer."""
        assert self.flat.grad is not None
        for step in range(first, last):
            self.flat.grad.copy_(self.flat.detach() - self._targets[step])
            self.optimizer.step()
        return self.flat.detach().clone()


def job_of(optimizer: str, **settings: Any) -> Job:
    return Job.model_validate({"optimizer": optimizer, "lr": 0.01, "weight_decay": 0.1, **settings})


@pytest.fixture
def slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """A buffer of :data:`ENTRIES` has six slices, the last of no whole block."""
    monkeypatch.setattr(module, "STEPPED_AT_ONCE", 512)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_restored_optimizer_goes_on_exactly(slices: None, optimizer: str) -> None:
    job = job_of(optimizer)
    first = Buffer(job)
    assert kept_state(first.optimizer) == {}
    half = first.steps(0, 7)
    kept = load(save(kept_state(first.optimizer)))
    again = Buffer(job, half)
    restore_state(again.optimizer, kept)
    assert torch.equal(again.steps(7, 20), first.steps(7, 20))
    # What is kept is a copy, and is taken over as one.
    assert all(torch.equal(kept[name], value) for name, value in load(save(kept)).items())
    assert kept == {} or int(kept["step"]) == 7


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_optimizer_without_its_moments_is_a_new_one(slices: None, optimizer: str) -> None:
    job = job_of(optimizer)
    old = Buffer(job)
    start = old.steps(0, 7)
    before, old.optimizer = old.optimizer, without_moments(job, old.optimizer)
    # bitsandbytes never frees paged memory: none may be allocated in each round.
    assert (old.optimizer is before) == optimizer.startswith("paged")
    assert torch.equal(old.steps(7, 20), Buffer(job, start).steps(7, 20))


@pytest.mark.parametrize("flat", [True, False])
def test_fitted_moments_stay_where_an_adapter_does_and_lose_their_basis_where_it_does_not(flat: bool) -> None:
    job = job_of("adamw", weight_decay=0.0, alpha=6.0)
    shapes = [LinearShape("stays", 0, 5, 7), LinearShape("turns", 0, 6, 4)]
    adapters = AdapterSet(shapes, {"stays": 4, "turns": 3}, job.alpha, torch.float32)
    leaves = [f for n in adapters.names for f in (adapters.A(n), adapters.B(n))]
    optimizer = new_optimizer(job, [adapters.flat] if flat else leaves)
    draw = torch.Generator().manual_seed(0)
    for _ in range(3):
        assert adapters.flat.grad is not None
        adapters.flat.grad.copy_(torch.randn(adapters.flat.shape, generator=draw))
        optimizer.step()
    before = kept_state(optimizer)
    # A scale of 6 / 4 does not divide out exactly.
    turned = LowRank(torch.randn(6, 3, generator=draw), torch.randn(3, 4, generator=draw))
    changed = adapters.restart({n: n for n in adapters.names}, {"stays": adapters.live("stays"), "turns": turned})
    assert changed == ["turns"]
    DirectionSteps(adapters).fit(optimizer, changed)
    after = kept_state(optimizer)
    assert int(after["step"]) == 3
    end = 4 * (5 + 7)
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(after[key][:end], before[key][:end])
    assert not after["exp_avg"][end:].any()
    for start, shape, rank_dim in ((end, (3, 4), 0), (end + 12, (6, 3), 1)):
        was, now = (s["exp_avg_sq"][start : start + shape[0] * shape[1]].view(shape) for s in (before, after))
        assert torch.allclose(now, was.mean(dim=rank_dim, keepdim=True).expand(shape))


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "sgd"])
@pytest.mark.parametrize("moments", ["keep", "fit", "drop"])
def test_a_round_that_restarts_a_direction_forgets_it_and_codes_forget_all(
    models: dict[str, Path], optimizer: str, moments: str
) -> None:
    """Codes of moments share scales by blocks, not by directions: where one direction begins again, all do."""
    job, base = (
        job_of(optimizer, base="fp32", dtype="fp32"),
        BaseModel(ModelSpec.read(models["llama"]), "fp32", torch.float32),
    )
    shapes = ModelSpec.read(models["llama"]).linears
    names = [shape.name for shape in shapes if shape.layer == 0]
    policy = Policy.model_validate({"moments": moments})

    def stepped() -> Holder:
        segment = load_segment(base, SegmentSpec(0, 1))
        holder = Holder("c", segment, shapes, dict.fromkeys(names, 2), job, policy, torch.float32)
        holder.restart(RoundUpdate(1, {}, {}))
        for step in range(2):
            assert holder.adapters.flat.grad is not None
            holder.adapters.flat.grad.fill_(0.5)
            holder.step(step)
        return holder

    def made(holder: Holder) -> int:
        return int(holder.state().get("optimizer.step", 0))

    # All directions continue; one begins again; all do.
    for stay, begins in (({n: 2 for n in names}, 0), ({n: 1 + (n != names[0]) for n in names}, 1), ({}, 2)):
        holder = stepped()
        common = {n: holder.adapters.live(n, rank) for n, rank in stay.items()}
        holder.restart(RoundUpdate(2, {}, common))
        if optimizer == "sgd":
            assert not any(key.startswith("optimizer.") for key in holder.state())
            continue
        forgets_all = begins == 2 or moments == "drop" or (optimizer == "adamw8bit" and (begins or moments == "fit"))
        assert made(holder) == (0 if forgets_all else 2)
        if begins == 1 and not forgets_all:
            state, ((start, shape), _) = holder.state(), holder.adapters.spans(names[0])
            second = state["optimizer.exp_avg_sq"][start : start + shape[0] * shape[1]].view(shape)
            assert second[0].any() and not second[1].any()
            assert state["begun"].tolist() == [0, 2] + [0] * (2 * len(names) - 2)
            # A checkpoint of before there were ages can be resumed: all are as old as the optimizer.
            old = {key: value for key, value in state.items() if key != "begun"}
            holder.load_state(old)
            assert not holder.state()["begun"].any()
            holder.load_state(state)
            assert holder.state()["begun"].tolist() == state["begun"].tolist()


def test_slices_are_stepped_as_the_whole_buffer_would_be(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Buffer(job_of("adamw8bit"))
    monkeypatch.setattr(module, "STEPPED_AT_ONCE", 512)
    sliced = Buffer(job_of("adamw8bit"))
    assert [len(b.optimizer.param_groups[0]["params"]) for b in (whole, sliced)] == [1, 6]
    assert torch.equal(whole.steps(0, 20), sliced.steps(0, 20))
    kept, other = kept_state(whole.optimizer), kept_state(sliced.optimizer)
    assert kept.keys() == other.keys() and all(torch.equal(kept[key], other[key]) for key in kept)
    assert kept["state1"].dtype == torch.uint8 and kept["state1"].shape == (ENTRIES,)
    assert kept["absmax1"].shape == (-(-ENTRIES // module.MOMENT_BLOCK),) and kept["qmap1"].shape == (256,)


def test_bitsandbytes_adamw_is_torchs() -> None:
    exact = Buffer(job_of("adamw")).steps(0, 20)
    assert torch.allclose(Buffer(job_of("paged_adamw")).steps(0, 20), exact, atol=1e-6)
    # Codes round the moments: the way is the same, a few per cent of it apart.
    assert torch.dist(Buffer(job_of("adamw8bit")).steps(0, 20), exact) < 0.05 * exact.norm()


@pytest.mark.parametrize("moments", ["keep", "drop", "fit"])
def test_a_run_with_8_bit_moments_learns_and_a_stopped_one_ends_the_same(
    slices: None, models: dict[str, Path], tmp_path: Path, moments: str
) -> None:
    policy = Policy.model_validate({"moments": moments, "init": "shared", "importance": {"metric": "equal"}})
    job: dict[str, Any] = {"base": "nf4", "rounds": 2, "local_steps": 6, "lr": 0.02, "optimizer": "adamw8bit"}
    plan = fixed_plan(models["llama"], Job.model_validate(job), [1, 3], [2, 4], 4)
    shares = {f"c{i}": random_examples(20, i) for i in range(2)}

    def run(to: str, recorder: Recorder, directory: RunDirectory | None = None) -> Any:
        return coordinator(models["llama"], tmp_path / to, plan, shares, recorder, policy, directory, **job)

    straight = Recorder()
    assert run("straight", straight).run()
    losses = [row.val_loss for row in straight.rows]
    assert max(losses[1:]) < 0.98 * losses[0]

    directory, stopped = RunDirectory.create(tmp_path / "stopped", "run"), Recorder()
    interrupted = run("stopped", stopped, directory)
    stopped.after_step = lambda step: setattr(interrupted, "stopping", len(stopped.losses) == 9)
    assert not interrupted.run()
    checkpoint, _ = latest_checkpoint(directory.checkpoints)
    assert checkpoint.name == "round-0001-step-0009"
    assert read_checkpoint(checkpoint)[1]["server"]["optimizer.state2"].dtype == torch.uint8
    resumed = Recorder()
    again = run("stopped", resumed, directory)
    assert again.run(checkpoint)
    assert resumed.rows[-1].val_loss == straight.rows[-1].val_loss
    finished = latest_checkpoint(directory.checkpoints)[0]
    (expected,) = (tmp_path / "straight").glob(f"*/checkpoints/{finished.name}")
    for holder, tensors in read_checkpoint(expected)[1].items():
        found = read_checkpoint(finished)[1][holder]
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items()), holder


@pytest.mark.parametrize(
    ("optimizer", "moments"), [("adamw", 8), ("sgd", 4), ("adamw8bit", 2), ("paged_adamw", 8), ("paged_adamw8bit", 2)]
)
def test_plans_count_what_an_optimizer_keeps(optimizer: str, moments: int) -> None:
    job = job_of(optimizer, rank_set=[4])
    counted = CountedModel(tiny_spec("llama"), job)
    entries = 4 * counted.sides.sum()
    predicted = 4 * counted.adapter_bytes.sum() + counted.optimizer_bytes
    flat = nn.Parameter(torch.zeros(entries))
    flat.grad = torch.ones(entries)
    optimizer_made = new_optimizer(job, as_parameters(job, flat))
    optimizer_made.step()
    tensors = {id(v): v for state in optimizer_made.state.values() for v in state.values() if isinstance(v, Tensor)}
    real = 2 * flat.nbytes + sum(tensor.nbytes for tensor in tensors.values() if tensor.dim())
    copied = flat.nbytes if optimizer == "sgd" else 0
    assert real + copied <= predicted <= real + copied + 64
    assert (predicted - counted.optimizer_bytes) / entries == pytest.approx(8 + moments, rel=0.01)


CASES = [
    Case("", "nf4", (3,), rank=32, batch_size=1, length=16, optimizer="adamw8bit"),
    Case("", "fp32", (2,), rank=8, optimizer="adamw8bit"),
    Case("", "int8", (4,), labels="client", grad_accumulation=2, optimizer="adamw8bit"),
    Case("", "nf4", (3,), rank=32, batch_size=1, length=16, optimizer="sgd"),
]


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose adapters of rank 32 are several slices."""
    from transformers import LlamaConfig

    sizes = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 8}
    config = LlamaConfig(**sizes, num_key_value_heads=8, vocab_size=2000, bos_token_id=0, eos_token_id=0)
    return random_model(tmp_path_factory.mktemp("model"), config)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.optimizer} {case.base} {case.splits[0]} r{case.rank}")
def test_a_client_never_needs_more_than_predicted(larger: Path, case: Case) -> None:
    assert_close(measured_client(larger, case))


def test_the_server_never_needs_more_than_predicted(larger: Path) -> None:
    assert_close(measured_server(larger, Case("", "nf4", (1, 3), rank=32, length=16, optimizer="adamw8bit")))


def assert_close(found: Measured) -> None:
    assert 0 <= found.error <= 0.15, found
