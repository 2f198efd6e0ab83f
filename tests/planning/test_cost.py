"""The cost model against what segments, adapters and messages really are."""

from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hsplit.actors.messages import Activations, WireTensor
from hsplit.config import Importance, Job, Policy, ResidualConfig, RunConfig
from hsplit.errors import InputError
from hsplit.lora.adapters import AdapterSet
from hsplit.models.loading import load_segment
from hsplit.models.segment import BaseModel, SegmentSpec
from hsplit.models.spec import ModelSpec
from hsplit.models.tail import CLIENT_CHUNK_ROWS
from hsplit.planning.cost.counted_model import DEQUANTIZATION_FLOPS
from hsplit.planning.cost.counting import LayerCounter, LayerRun
from hsplit.planning.cost.fake_layer import LayerKind, LayerSetting
from hsplit.planning.cost.model import CostModel
from tests.planning.test_planner import client, cost, server
from tests.tiny import LAYERS, save_tiny_model, tiny_config, tiny_spec

FAMILIES = ["llama", "gpt2"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("base", ["fp32", "nf4", "int8"])
def test_stored_bytes_are_those_of_a_loaded_segment(
    family: str, base: Literal["fp32", "nf4", "int8"], tmp_path: Path
) -> None:
    directory = save_tiny_model(family, tmp_path)
    job = Job(dtype="fp32", base=base, max_length=16)
    model = CostModel(tiny_spec(family), job, residual=False)
    segment = load_segment(
        BaseModel(ModelSpec.read(directory), base, torch.float32), SegmentSpec(1, LAYERS), quantized=True
    )
    tensors = {t.data_ptr(): t.nbytes for t in (*segment.layers.parameters(), *segment.layers.buffers())}
    assert model.model.stored_bytes[1:].sum() == sum(tensors.values())
    front = load_segment(BaseModel(ModelSpec.read(directory), base, torch.float32), SegmentSpec(0, 2, embedding=True))
    held = [*front.layers.parameters(), *front.layers.buffers(), *front.embeddings.parameters()]
    kept = model.model.embedding_bytes + model.model.dense_bytes[:2].sum()
    assert kept == sum(t.nbytes for t in held)


def test_adapters_cost_sixteen_bytes_a_parameter() -> None:
    model = cost()
    names = [w for w in model.model.weights if w.layer == 0]
    adapters = AdapterSet(names, {w.name: 4 for w in names}, 16.0, torch.float32)
    rows = 2 * 32 * 4
    grown = model.client_bytes(1, {w.name: 4 for w in names}) - model.client_bytes(1, {})
    assert grown == 16 * adapters.flat.numel() + rows * 4 * len(names)


@pytest.mark.parametrize("labels", ["server", "client"])
@pytest.mark.parametrize("split", [0, 2])
def test_wire_bytes_are_those_of_the_messages(labels: str, split: int) -> None:
    rows, length, width = 2, 32, 32
    hidden = WireTensor.pack(torch.zeros(rows, length, width), "bf16")
    targets = None if labels == "client" else np.zeros((rows, length), dtype=np.int32)
    message = Activations("one", split, hidden, (length,) * rows, 5, 5, targets)
    wire = cost(labels).wire_bytes(split)
    assert wire.up == message.nbytes
    assert wire.down == (hidden.nbytes if split else 0)
    assert wire.deep == wire.slope == (hidden.nbytes if labels == "client" else 0)


def test_a_deeper_split_costs_a_client_more() -> None:
    front = [cost().client_bytes(k, {}) for k in range(LAYERS + 1)]
    assert front == sorted(front)


def test_a_shallow_client_costs_the_server_its_rows() -> None:
    # Low ranks, or the copies at a round's end would outweigh a model as small as this.
    job = Job(dtype="fp32", max_length=64, rank_set=(1, 2), residual=ResidualConfig(max_rank=1))
    costs = CostModel(tiny_spec("llama"), job)
    assert costs.server_bytes([1, 1, 2], {}) > costs.server_bytes([1, 2, 2], {})


@pytest.mark.parametrize("labels", ["server", "client"])
def test_step_times_follow_the_declared_budget(labels: str) -> None:
    model, slow, fast = cost(labels), client("slow", 1e9, 1e9), client("fast", 1e9, 2e9)
    wire = model.wire_bytes(2)
    sent_s = 8 * (wire.up + wire.deep + wire.slope + wire.down) / 1e8
    latency_s = (2 if labels == "server" else 4) * 1e-3
    computed = [model.step_time_s(c, 2).total_s - sent_s - latency_s for c in (slow, fast)]
    assert computed[0] == pytest.approx(2 * computed[1])
    flops = model.model.forward_flops[:2].sum() + model.model.backward_flops[:2].sum()
    tail = 4 * 64 * 32 * 96 if labels == "client" else 0
    assert computed[0] == pytest.approx((flops + tail) / 1e9)


def test_the_plan_of_a_client_with_its_labels_at_home_has_the_tail(tmp_path: Path) -> None:
    """Its bytes are those of a loaded tail, its FLOPs those that torch counts."""
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM

    from hsplit.planning.scheduler import Scheduler

    config = tiny_config("llama")
    # A head of its own.
    config.tie_word_embeddings = False
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    plans, costs = {}, {}
    for labels in ("server", "client"):
        settings = {"dtype": "fp32", "base": "fp32", "batch_size": 8, "max_length": 64}
        job = Job.model_validate(settings | {"privacy": {"labels": labels}})
        policy = Policy(name="fixed", split=2, ranks=4, importance=Importance(metric="equal"))
        run = RunConfig(clients=(client("one", 1e9),), server=server(), job=job, policy=policy)
        scheduler = Scheduler(run, ModelSpec.read(tmp_path))
        plans[labels], costs[labels] = scheduler.plan().client("one"), scheduler.cost.model
    rows = 8 * 64
    tail = load_segment(
        BaseModel(ModelSpec.read(tmp_path), "fp32", torch.float32), SegmentSpec(0, 2, embedding=True, tail=True)
    ).tail
    assert tail is not None
    held = sum(tensor.nbytes for tensor in (*tail.parameters(), *tail.buffers()))
    # What it takes at work counts as far as no layer takes more; ``test_measured_memory`` measures it.
    work = costs["client"].tail_run(CLIENT_CHUNK_ROWS).peak_bytes(rows) + 3 * 4 * rows * 32
    more = plans["client"].predicted_bytes - plans["server"].predicted_bytes
    assert held <= more <= held + 1.2 * work
    with FlopCounterMode(display=False) as counter:
        hidden = torch.randn(rows, 32, requires_grad=True)
        tail.supervised_losses(hidden, torch.arange(rows) % 96).sum().backward()
    times = {labels: plan.step_time_s for labels, plan in plans.items()}
    wire = {labels: model.wire_bytes(2) for labels, model in costs.items()}
    sent = {labels: w.up + w.down + w.deep + w.slope for labels, w in wire.items()}
    # Two more messages, each with its latency.
    link_s = 8 * (sent["client"] - sent["server"]) / 1e8 + 2e-3
    assert times["client"] - times["server"] == pytest.approx(counter.get_total_flops() / 1e9 + link_s)


def test_the_scheduler_reads_the_configuration_file_alone(tmp_path: Path) -> None:
    from hsplit.planning.scheduler import Scheduler

    tiny_config("llama").save_pretrained(tmp_path)
    assert [f.name for f in tmp_path.glob("*.safetensors")] == []
    run = RunConfig(clients=(client("one", 1e9),), server=server(), job=Job(dtype="fp32", max_length=32))
    scheduler = Scheduler(run, ModelSpec.read(tmp_path))
    first = scheduler.plan()
    assert scheduler.plan() == first
    assert "equal importance" in first.importance


def test_planning_imports_neither_ray_nor_peft_nor_bitsandbytes() -> None:
    import subprocess
    import sys

    code = (
        "import sys, hsplit.planning.scheduler;print([m for m in ('ray', 'peft', 'bitsandbytes') if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("base", ["fp32", "nf4"])
def test_counts_of_few_rows_give_those_of_any_number(family: str, base: Literal["fp32", "nf4"]) -> None:
    model = CostModel(tiny_spec(family), Job(dtype="fp32", base=base, max_length=24, batch_size=3)).model
    codes = None if base == "fp32" else base
    for rows in (1, 2, 3, 5, 7, 10, 13, 40):
        run = model.counter.run(1, model.setting(model.top_rank, rows, codes))
        at_rows = model.at_rows(rows)
        own = [w.layer == 1 for w in model.weights]
        assert run.saved_bytes == at_rows.saved[1] + model.top_rank * at_rows.saved_per_rank[own].sum()
        flops = at_rows.forward_flops[1], at_rows.backward_flops[1]
        assert flops == (run.forward_flops, run.backward_flops)
        transient = at_rows.transient_bytes(rows, codes)[1]
        assert run.peak_bytes - run.saved_bytes <= transient <= 1.1 * (run.peak_bytes - run.saved_bytes)


def test_tables_of_many_rows_take_few_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = []
    counted = LayerCounter._run

    def watched(self: LayerCounter, index: int, kind: LayerKind, setting: LayerSetting) -> LayerRun:
        settings.append(setting)
        return counted(self, index, kind, setting)

    monkeypatch.setattr(LayerCounter, "_run", watched)
    costs = CostModel(tiny_spec("llama"), Job(dtype="fp32", base="nf4", max_length=20))
    tables = [costs.client_memory(rows) for rows in range(1, 17)]
    assert len(settings) <= 2 + 8
    assert all((few.constant <= many.constant).all() for few, many in pairwise(tables))


def test_codes_take_less_to_keep_and_only_of_a_quantized_base() -> None:
    coded, dense = cost(base="nf4"), cost(base="fp32")
    kept = coded.client_memory(2).constant - coded.client_memory(2, "codes").constant
    assert kept[0] == 0 and (np.diff(coded.model.dense_bytes - coded.model.stored_bytes) == 0).all()
    with pytest.raises(ValueError, match="fp32 has no codes"):
        dense.client_memory(2, "codes")


def test_dequantizing_is_counted_by_entries_whatever_the_rows() -> None:
    coded = cost(base="int8").model
    entries = [sum(w.parameters for w in coded.weights if w.layer == layer) for layer in range(LAYERS)]
    assert list(coded.dequantization_flops) == [DEQUANTIZATION_FLOPS["int8"] * n for n in entries]
    assert list(coded.at_rows(7).dequantization_flops) == list(coded.dequantization_flops)
    assert not cost(base="fp32").model.dequantization_flops.any()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("labels", ["server", "client"])
def test_own_rows_of_the_embedding_cost_themselves_and_their_ids(family: str, labels: str) -> None:
    job = Job.model_validate({"dtype": "fp32", "base": "fp32", "max_length": 16, "privacy": {"labels": labels}})
    costs = CostModel(tiny_spec(family), job)
    whole, own = costs.client_memory(4).constant, costs.client_memory(4, embedding_rows=10).constant
    # Of 96 rows of 32 values; the tail needs them all.
    assert (whole - own == (0 if labels == "client" else 4 * 32 * 86 - 8 * 10)).all()


@settings(max_examples=30, deadline=None)
@given(
    counts=st.lists(st.integers(0, 3), min_size=LAYERS + 1, max_size=LAYERS + 1).filter(any),
    most=st.sampled_from([None, 2]),
    replicas=st.integers(1, 2),
    batch_size=st.integers(1, 3),
)
def test_the_server_needs_what_its_rows_need_whoever_brings_them(
    counts: list[int], most: int | None, replicas: int, batch_size: int
) -> None:
    job = Job(dtype="fp32", base="nf4", max_length=16, batch_size=batch_size, clients_per_round=most)
    costs = CostModel(tiny_spec("llama"), job, servers=replicas)
    clients = np.array([counts])
    rows = batch_size * costs.model.served(clients)
    memory = costs.server
    assert (memory.constant(clients, rows) == memory.constant(clients)).all()
    assert (memory.per_rank(clients, rows) == memory.per_rank(clients)).all()
    # The same rows by other clients take as much; one more row, nowhere less.
    more = rows.copy()
    more[:, 0] += 1
    assert (memory.constant(clients, more) >= memory.constant(clients)).all()
    assert (memory.per_rank(clients, more) >= memory.per_rank(clients)).all()


def test_a_start_is_refused_only_if_no_texts_would_leave_room(tmp_path: Path) -> None:
    from hsplit.planning.scheduler import Scheduler

    config = tiny_config("llama")
    config.vocab_size = 50_000
    config.save_pretrained(tmp_path)
    policy = Policy.model_validate({"pace": {"embedding": "own"}})
    job = Job(dtype="fp32", base="fp32", max_length=16)

    def scheduler(memory_bytes: float) -> Scheduler:
        run = RunConfig(clients=(client("one", memory_bytes),), server=server(), job=job, policy=policy)
        return Scheduler(run, ModelSpec.read(tmp_path))

    whole = scheduler(1e9).cost.model.embedding_bytes
    scheduler(whole).check_start()
    with pytest.raises(InputError, match="none has the memory"):
        scheduler(whole).plan()
    with pytest.raises(InputError, match="none has the memory"):
        scheduler(whole / 100).check_start()
    scheduler(2 * whole).plan()
