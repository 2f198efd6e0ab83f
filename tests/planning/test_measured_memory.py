"""What a plan predicts is what holders really allocate: never less, and little more (METHOD 4)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.memory import Case, Measured, measured_client, measured_server, random_model
from hsplit.actors.client import Client
from hsplit.actors.profiling import (
    PeakMemory,
    measured,
    measured_in_first_steps,
    measured_once_a_round,
    measured_with_part,
    measured_with_round,
)
from hsplit.config import Job, Policy
from hsplit.lora.holder import RoundUpdate
from hsplit.models.segment import BaseModel
from hsplit.models.spec import ModelSpec
from hsplit.planning.plan import HolderPlan

# Large enough that what a step allocates dwarfs the constants of any program, small enough for seconds.
SIZES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 8, "tie_word_embeddings": True},
    "llama, grouped, own head": {"num_key_value_heads": 2, "tie_word_embeddings": False},
    "gpt2": {"tie_word_embeddings": True},
    "gpt2, own head": {"tie_word_embeddings": False},
}
LLAMA, GROUPED, GPT2, GPT2_OWN = SIZES

CLIENTS = [
    Case(LLAMA, "fp32", (2,)),
    Case(LLAMA, "fp32", (1,), batch_size=4, labels="client"),
    Case(LLAMA, "nf4", (2,), rank=16, grad_accumulation=2),
    Case(LLAMA, "nf4", (4,), rank=4, batch_size=8, length=32, wire="fp32", labels="client"),
    Case(LLAMA, "int8", (3,), batch_size=1, length=128),
    Case(LLAMA, "nf4", (0,), batch_size=8, length=256),
    Case(LLAMA, "nf4", (0,), batch_size=8, length=256, wire="int8"),
    Case(LLAMA, "nf4", (0,), batch_size=8, length=256, wire="int4"),
    Case(LLAMA, "fp32", (1,), batch_size=4, labels="client", wire="int4"),
    Case(LLAMA, "nf4", (2,), noise=0.1),
    Case(LLAMA, "nf4", (2,), dtype="bf16", length=16),
    Case(GROUPED, "int8", (3,), rank=16, batch_size=4, length=48, labels="client"),
    Case(GROUPED, "fp32", (4,), batch_size=2, length=96),
    Case(GROUPED, "fp32", (3,), rank=32, batch_size=1, length=16, cap=128),
    Case(GPT2, "fp32", (3,)),
    Case(GPT2, "nf4", (1,), batch_size=8, labels="client"),
    Case(GPT2, "nf4", (3,), rank=32, batch_size=1, length=16, cap=128),
    Case(GPT2_OWN, "int8", (2,), batch_size=1, length=128),
    Case(GPT2_OWN, "fp32", (0,), labels="client"),
    Case(GROUPED, "fp32", (3,), rank=32, batch_size=1, length=16, cap=128, dtype="bf16", exchange="compute"),
    Case(GROUPED, "bf16", (3,), rank=32, batch_size=1, length=16, cap=128, dtype="bf16", exchange="compute"),
    Case(LLAMA, "nf4", (3,), rank=32, batch_size=1, length=16, cap=128, dtype="bf16"),
    Case(LLAMA, "nf4", (0,), batch_size=8, length=256, vocabulary=300),
    Case(GROUPED, "fp32", (1,), batch_size=3, vocabulary=700),
    Case(GPT2, "nf4", (2,), rank=16, stored="codes", vocabulary=50),
    Case(LLAMA, "nf4", (3,), rank=16, stored="codes"),
    Case(LLAMA, "int8", (4,), rank=4, batch_size=7, length=32, labels="client", stored="codes"),
    Case(GROUPED, "nf4", (2,), batch_size=5, dtype="bf16", length=16, stored="codes"),
    Case(GROUPED, "nf4", (4,), batch_size=3, length=48, stored="codes"),
    Case(GPT2, "int8", (1,), batch_size=8, stored="codes"),
    Case(GPT2_OWN, "nf4", (3,), rank=32, batch_size=1, length=16, cap=128, labels="client", stored="codes"),
    Case(LLAMA, "fp32", (2,), metric="spectral"),
    Case(LLAMA, "nf4", (2,), batch_size=1, length=16, metric="spectral"),
    Case(GPT2, "nf4", (3,), dtype="bf16", batch_size=1, length=128, metric="spectral"),
    # The optimizer's step decides: a large rank, few tokens.
    Case(LLAMA, "fp32", (3,), rank=128, batch_size=1, length=8, cap=16, lr_scaling="sqrt"),
]
SERVERS = [
    Case(LLAMA, "fp32", (1,)),
    Case(LLAMA, "nf4", (1, 3), labels="client"),
    Case(GROUPED, "int8", (1, 2, 3), rank=16),
    Case(GPT2, "nf4", (0, 1, 2, 4)),
    Case(GPT2_OWN, "fp32", (1, 1, 2)),
    Case(LLAMA, "fp32", (4, 4)),
    # The round's end decides: many clients of large ranks, few tokens.
    Case(LLAMA, "fp32", (3,) * 8, rank=32, batch_size=1, length=16, dtype="bf16", exchange="compute"),
    Case(
        LLAMA, "nf4", (3,) * 8, rank=32, batch_size=1, length=16, dtype="bf16", exchange="compute", aggregation="fedavg"
    ),
    Case(GPT2, "nf4", (1, 3), rank=16, dtype="bf16", exchange="compute"),
    Case(GROUPED, "nf4", (1, 3), metric="spectral"),
    Case(LLAMA, "nf4", (1, 3), working_copy=True),
    Case(GROUPED, "int8", (2, 2), rank=16, labels="client", working_copy=True),
]


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from transformers import GPT2Config, LlamaConfig

    made = {}
    for name, sizes in SIZES.items():
        words = {"vocab_size": 2000, "bos_token_id": 0, "eos_token_id": 0}
        if name.startswith("gpt2"):
            config = GPT2Config(n_embd=256, n_layer=4, n_head=8, n_positions=256, **words, **sizes)
        else:
            width = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 8}
            config = LlamaConfig(**width, **words, **sizes)
        made[name] = random_model(tmp_path_factory.mktemp("model"), config)
    return made


def named(case: Case) -> str:
    batch = f"{case.batch_size}x{case.length}"
    held = f"{case.stored} {case.vocabulary or 'all'} {case.exchange} {case.metric} {case.lr_scaling}"
    held += " working copy" * case.working_copy
    return f"{case.model} {case.base} {case.dtype} {case.splits} r{case.rank} {batch} {case.labels} {case.wire} {held}"


@pytest.mark.parametrize("case", CLIENTS, ids=named)
def test_a_client_never_needs_more_than_predicted_and_little_less(directories: dict[str, Path], case: Case) -> None:
    assert_close(measured_client(directories[case.model], case), 0.10)


@pytest.mark.parametrize("case", SERVERS, ids=named)
def test_the_server_never_needs_more_than_predicted_and_little_less(directories: dict[str, Path], case: Case) -> None:
    assert_close(measured_server(directories[case.model], case), 0.15)


def assert_close(found: Measured, most: float) -> None:
    assert found.peak > found.rest > 0
    assert 0 <= found.error <= most, found
    assert 0 <= found.error_at_work <= most, found


class Holder:
    """Allocates what it is told to."""

    def __init__(self, enabled: bool = True) -> None:
        self._memory = PeakMemory(torch.device("cpu"), enabled)
        self.kept: list[Tensor] = []

    @measured
    def run(self, work: Callable[..., Any], *arguments: Any) -> Any:
        return work(*arguments)

    @measured_with_part
    def take(self, size: int) -> None:
        self.kept = [torch.zeros(size)]

    @measured_with_round
    def begin(self) -> None:
        """Nothing that takes memory."""

    @measured_in_first_steps
    def step(self, step: int) -> None:
        torch.zeros(1000)

    @measured_once_a_round
    def validate(self) -> None:
        torch.zeros(1000)

    @property
    def peak(self) -> int:
        return self._memory.peak_bytes()


def test_the_peak_is_the_allocators_and_lasts_over_windows() -> None:
    holder = Holder()
    holder.run(lambda: holder.kept.append(torch.zeros(1000)))
    assert holder.peak == 4000
    # Beside what is kept; gone again afterwards.
    holder.run(lambda: len([torch.zeros(2000), torch.zeros(500)]))
    assert holder.peak == 4000 + 10_000
    assert holder.peak == 4000
    holder.run(holder.kept.clear)
    assert (holder.peak, holder.peak) == (4000, 0)


def test_results_count_until_nobody_keeps_them_and_arguments_while_the_call_lasts() -> None:
    holder = Holder()
    result = holder.run(lambda: torch.zeros(1000))
    assert (holder.peak, holder.peak) == (4000, 4000)
    del result
    assert (holder.peak, holder.peak) == (4000, 0)
    holder.run(lambda given: given.clone(), torch.zeros(250))
    assert (holder.peak, holder.peak) == (2000, 0)
    # An argument that is kept goes on counting.
    holder.run(holder.kept.append, torch.zeros(250))
    assert (holder.peak, holder.peak) == (1000, 1000)
    # An array counts while the call works on it; one over a tensor's own memory counts once.
    holder.run(lambda given: None, torch.zeros(100).numpy())
    assert (holder.peak, holder.peak) == (1400, 1000)


def test_a_backward_pass_is_seen() -> None:
    holder = Holder()
    weight = torch.zeros(100, 100, requires_grad=True)

    def work() -> None:
        (torch.ones(50, 100) @ weight).sum().backward()

    holder.run(work)
    # The gradient stays; input and output were there before it.
    assert weight.grad is not None and weight.grad.nbytes == 40_000
    assert holder.peak >= 60_000
    assert holder.peak == 40_000


def test_only_the_first_two_steps_and_the_first_validation_of_a_round_are_measured() -> None:
    holder = Holder()
    peaks = []
    for step in (4, 4, 5, 6, 7, 4):
        holder.step(step)
        peaks.append(holder.peak)
    assert peaks == [4000, 4000, 4000, 0, 0, 4000]
    holder.validate()
    assert holder.peak == 4000
    holder.validate()
    assert holder.peak == 0
    holder.begin()
    holder.step(7)
    holder.validate()
    assert holder.peak == 4000


def test_later_rounds_with_the_same_part_are_looked_at_now_and_then() -> None:
    holder = Holder()
    holder.take(500)
    assert holder.peak == 2000
    looked_at = []
    for round_ in range(1, 22):
        holder.begin()
        holder.step(round_)
        holder.run(lambda: torch.zeros(100))
        if holder.peak == 6000:
            looked_at.append(round_)
    assert looked_at == [1, 2, 3, 10, 20]
    # What is held is followed in every round.
    holder.take(1000)
    assert holder.peak == 6000
    holder.begin()
    holder.step(0)
    assert holder.peak == 8000


def test_a_failure_inside_a_window_ends_the_window() -> None:
    holder = Holder()

    def fails() -> None:
        torch.zeros(1000)
        raise ValueError("on purpose")

    with pytest.raises(ValueError, match="on purpose"):
        holder.run(fails)
    assert holder.peak == 4000
    holder.run(lambda: None)
    assert holder.peak == 0


def test_measuring_can_be_switched_off(directories: dict[str, Path]) -> None:
    holder = Holder(enabled=False)
    holder.run(lambda: torch.zeros(1000))
    assert holder.peak == 0
    base = BaseModel(ModelSpec.read(directories[LLAMA]), "fp32", torch.float32)
    client = Client("one", Job(dtype="fp32", base="fp32"), Policy(), base, measure=False)
    client.configure(HolderPlan("c", "client", True, 1))
    client.restart(RoundUpdate(1, {}, {}))
    assert client.peak_bytes() == 0
