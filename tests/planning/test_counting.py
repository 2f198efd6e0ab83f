"""What is counted without memory equals what really happens."""

from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, PreTrainedConfig, Qwen2Config

from hsplit.config import Job
from hsplit.lora.adapters import AdapterSet
from hsplit.models.loading import load_segment
from hsplit.models.packing import Packing
from hsplit.models.segment import BaseModel, SegmentSpec
from hsplit.models.spec import ModelSpec
from hsplit.models.tail import Tail
from hsplit.planning.cost.counting import LayerCounter, LayerRun, LiveBytes, saved_storages
from hsplit.planning.cost.fake_layer import LayerKind, LayerSetting
from hsplit.planning.cost.model import CostModel
from tests.tiny import spec_of

pytestmark = pytest.mark.usefixtures("own_cache")


def tiny_llama() -> PreTrainedConfig:
    return LlamaConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=64,
    )


def tiny_gpt2() -> PreTrainedConfig:
    return GPT2Config(n_embd=48, n_layer=2, n_head=4, vocab_size=64, n_positions=64)


TINY = {"llama": tiny_llama, "gpt2": tiny_gpt2}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from transformers import AutoModelForCausalLM

    directories = {}
    for name, config in TINY.items():
        directories[name] = tmp_path_factory.mktemp(name)
        AutoModelForCausalLM.from_config(config()).save_pretrained(directories[name])
    return directories


def really_run(directory: Path, dtype: torch.dtype, rows: int, length: int, rank: int) -> tuple[int, int]:
    """Bytes saved for backward by layer 1, and the peak over both passes, on real tensors."""
    base = BaseModel(ModelSpec.read(directory), "fp32", dtype)
    segment = load_segment(base, SegmentSpec(1, 2))
    shapes = [s for s in base.spec.linears if s.layer == 1]
    master = torch.promote_types(dtype, torch.float32)
    adapters = AdapterSet(shapes, {s.name: rank for s in shapes}, 16.0, master)
    adapters.attach(segment)
    assert adapters.flat.grad is not None
    held = [*segment.parameters(), *segment.buffers(), adapters.flat, adapters.flat.grad]
    packing = Packing.of((length,) * rows)
    with LiveBytes(held) as live:
        hidden = torch.zeros(rows * length, segment.config.hidden_size, dtype=dtype, requires_grad=True)
        tables = []
        if segment.rotary is not None:
            tables = list(segment.rotary(hidden[None], position_ids=packing.positions[None]))
            segment.rotary.forward = lambda *_, **__: tuple(tables)
        with saved_storages([*held, *tables]) as saved:
            output = segment.run(hidden, packing, 1, 2)
        kept = sum(saved.values())
        output.backward(torch.zeros_like(output))
    return kept, live.peak - sum(t.nbytes for t in tables)


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("rows", "length", "rank"), [(1, 16, 1), (2, 8, 3), (3, 40, 8)])
def test_counted_bytes_are_the_real_ones(
    checkpoints: dict[str, Path], family: str, dtype: torch.dtype, rows: int, length: int, rank: int
) -> None:
    model = spec_of(TINY[family]())
    counter = LayerCounter(model, {s.name for s in model.linears}, length)
    counted = counter.run(1, LayerSetting(rows, length, dtype, rank))
    saved, peak = really_run(checkpoints[family], dtype, rows, length, rank)
    assert counted.saved_bytes == saved
    assert counted.peak_bytes == peak


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("rank", [1, 8])
def test_flops_follow_the_formula(family: str, rank: int) -> None:
    rows, length = 2, 32
    config = TINY[family]()
    model = spec_of(config)
    shapes = [s for s in model.linears if s.layer == 0]
    run = LayerCounter(model, {s.name for s in shapes}, length).run(0, LayerSetting(rows, length, torch.float32, rank))
    tokens = rows * length
    base = 2 * tokens * sum(s.parameters for s in shapes)
    thin = 2 * tokens * rank * sum(s.d_in + s.d_out for s in shapes)
    attention = 4 * tokens * length * config.hidden_size
    assert run.forward_flops == pytest.approx(base + thin + attention, rel=0.01)
    assert run.backward_flops == pytest.approx(base + 2 * thin + 2.5 * attention, rel=0.01)


def test_smollm2_layer_as_measured_with_a_reference_implementation() -> None:
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=1,
        num_attention_heads=9,
        num_key_value_heads=3,
    )
    model = spec_of(config)
    counter = LayerCounter(model, {s.name for s in model.linears}, 64)
    run = counter.run(0, LayerSetting(2, 64, torch.float32, 8))
    # The reference's fused attention keeps a logarithm for each query and head; short attention does not.
    assert run.saved_bytes == 5_146_112 - 2 * 64 * 9 * 4
    assert run.forward_flops == 945_684_480
    assert run.backward_flops == 994_836_480


LARGE = {
    "llama-2-7b": LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        vocab_size=32000,
    ),
    "llama-3-8b": LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    ),
    "gpt2-large": GPT2Config(n_embd=1280, n_layer=36, n_head=20),
    "qwen2.5-0.5b": Qwen2Config(
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        vocab_size=151936,
        tie_word_embeddings=True,
    ),
}


@pytest.mark.parametrize("name", LARGE)
def test_large_models_are_counted_from_their_configuration_alone(name: str) -> None:
    model = spec_of(LARGE[name])
    shapes = model.linears
    counter = LayerCounter(model, {s.name for s in shapes}, 128)
    assert len(set(counter.kinds)) == 1
    low, high = (counter.run(0, LayerSetting(2, 128, torch.bfloat16, rank)) for rank in (1, 9))
    adapted = sum(s.layer == 0 for s in shapes)
    # Every weight keeps x A^T beside x: one entry a token and unit of rank.
    assert high.saved_bytes - low.saved_bytes == 8 * adapted * 2 * 128 * 2
    assert counter.run(5, LayerSetting(2, 128, torch.bfloat16, 1)) is low


PARAMETERS = {
    "llama-2-7b": 6_738_415_616,
    "llama-3-8b": 8_030_261_248,
    "gpt2-large": 774_030_080,
    "qwen2.5-0.5b": 494_032_768,
}


@pytest.mark.parametrize("name", LARGE)
def test_large_models_cost_bytes_and_seconds_from_their_configuration_alone(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = []
    really_run_layer = LayerCounter._run

    def watched(self: LayerCounter, index: int, kind: LayerKind, setting: LayerSetting) -> LayerRun:
        counted.append((kind, setting))
        return really_run_layer(self, index, kind, setting)

    monkeypatch.setattr(LayerCounter, "_run", watched)
    config = LARGE[name]
    costs = CostModel(spec_of(config), Job(dtype="bf16", base="bf16", max_length=512))
    model = costs.model
    # Front, deep and tail together have each parameter once, and a tied head has none of its own.
    parts = model.embedding_bytes + model.dense_bytes.sum() + model.tail_bytes(head=not config.tie_word_embeddings)
    assert parts == 2 * PARAMETERS[name]
    layers = model.layers
    ranks = {k: {w.name: 8 for w in model.weights if w.layer < k} for k in (1, layers // 2, layers)}
    client = [costs.client_bytes(split, own) for split, own in ranks.items()]
    assert client == sorted(client)
    deep = costs.server_bytes([1, layers // 2, layers], ranks[layers])
    assert deep > costs.server_bytes([layers, layers, layers], {})
    # All layers are of one kind, so each setting is counted once: two ranks, and the rows of one client and of three.
    assert len(counted) == len(set(counted)) == 4


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("chunk_rows", [8, 16])
def test_a_tail_takes_little_less_than_counted(checkpoints: dict[str, Path], family: str, chunk_rows: int) -> None:
    tokens = 8 * chunk_rows + 3
    base = BaseModel(ModelSpec.read(checkpoints[family]), "fp32", torch.float32)
    tail = load_segment(base, SegmentSpec(2, 2, tail=True)).tail
    assert tail is not None
    tail = Tail(tail.norm, tail.head, chunk_rows)
    hidden = torch.randn(tokens, 48, requires_grad=True)
    with LiveBytes([*tail.parameters(), *tail.buffers(), hidden]) as live:
        at = torch.arange(tokens)
        tail.token_losses(hidden[at], at % 64).sum().backward()
    counted = LayerCounter(spec_of(TINY[family]()), set(), 16).tail(torch.float32, chunk_rows).peak_bytes(tokens)
    assert live.peak <= counted <= 1.1 * live.peak + 4 * 64 * chunk_rows


def test_a_probe_adds_its_working_bytes_at_most() -> None:
    model = spec_of(tiny_llama())
    counter = LayerCounter(model, {s.name for s in model.linears}, 32)
    plain = counter.run(0, LayerSetting(2, 32, torch.float32, 4))
    probed = counter.run(0, LayerSetting(2, 32, torch.float32, 4, probed=True))
    assert probed.saved_bytes == plain.saved_bytes
    assert (probed.forward_flops, probed.backward_flops) == (plain.forward_flops, plain.backward_flops)
    assert plain.peak_bytes <= probed.peak_bytes <= plain.peak_bytes + 4 * 4 * 48 * 96


@pytest.mark.parametrize("codes", ["nf4", "int8"])
def test_quantized_storage_costs_a_dequantized_weight_in_passing(codes: str) -> None:
    model = spec_of(LARGE["llama-2-7b"])
    counter = LayerCounter(model, {s.name for s in model.linears}, 32)
    dense = counter.run(0, LayerSetting(1, 32, torch.bfloat16, 8))
    coded = counter.run(0, LayerSetting(1, 32, torch.bfloat16, 8, codes=codes))
    assert coded.saved_bytes == dense.saved_bytes
    assert coded.peak_bytes >= dense.peak_bytes + 2 * 4096 * 11008 / 2


def test_a_window_that_does_not_bite_makes_no_kind_of_its_own() -> None:
    from transformers import MistralConfig

    config = MistralConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        sliding_window=16,
    )
    model = spec_of(config)
    assert LayerCounter(model, set(), 16).kinds[0].window is None
    biting = LayerCounter(model, {s.name for s in model.linears}, 32)
    assert biting.kinds[0].window == 16
    assert biting.run(0, LayerSetting(1, 32, torch.float32)).saved_bytes > 0
