"""Models that no family is written for: exact at every split by their own forward, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hsplit.errors import InputError
from hsplit.models import proof
from hsplit.models.loading import load_segment
from hsplit.models.outer_model import OuterModel
from hsplit.models.packing import Packing
from hsplit.models.recorded_family import RecordedFamily
from hsplit.models.recorded_segment import RecordedSegment
from hsplit.models.segment import BaseModel, SegmentSpec
from hsplit.models.spec import ModelSpec
from hsplit.models.twin import small_twin


def _default(kind: str, **changes: Any) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(kind, **changes)


# One of each kind: what is left out of a forward that is written down again.
KINDS = {
    "soft-caps": "gemma2",
    "two rotary tables": "gemma3_text",
    "parallel attention, scaled logits": "cohere",
    "ALiBi": "bloom",
    "learned positions": "opt",
    "recurrent": "mamba",
    "sinks, mixture": "gpt_oss",
    "mixture, merged weights": "mixtral",
    "head of another name, renamed weights": "gpt_neox",
    "scaled embedding and residuals": "granite",
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_every_split_equals_the_unsplit_model(kind: str) -> None:
    found = proof.prove(_default(kind))
    assert found.loss <= 1e-5 and found.gradient <= 1e-5
    assert found.layers >= 2


@pytest.mark.parametrize("kind", ["gemma2", "gpt_oss"])
@pytest.mark.parametrize("packed", [True, False])
def test_rows_packed_or_padded_give_the_same(kind: str, packed: bool) -> None:
    found = proof.prove(_default(kind), (2, 9, 6, 1), packed=packed)
    assert found.packed == packed and found.gradient <= 1e-5


def test_layers_that_mix_tokens_by_more_than_attention_are_never_packed() -> None:
    twin = small_twin(_default("lfm2", layer_types=["conv", "full_attention"] * 16))
    assert not ModelSpec(Path(), twin, packed=True).family.packed  # type: ignore[attr-defined]
    assert not proof.prove(_default("bloom"), packed=False).packed
    with pytest.raises(InputError, match="is not served"):
        proof.prove(_default("bloom"), packed=True)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("t5", "it is an encoder-decoder"),
        ("clip", "transformers has no causal LM of it"),
        ("bert", "its tokens see later tokens"),
        ("gemma4_unified_text", "its layers are called with a KVSharingDict"),
        ("deepseek_v4", "its layers need the token ids"),
        ("zamba2", "its layers need values of the tokens, or of weights outside of them"),
        ("hy_v4", "its layers pass on more than one hidden state a token"),
        ("zaya", "its layers hand on more than hidden states"),
    ],
)
def test_what_cannot_be_split_is_refused_by_name(kind: str, why: str) -> None:
    with pytest.raises(InputError, match=rf"^job\.model: model type '?{kind}'? is not served: .*{why}") as refused:
        proof.prove(_default(kind))
    assert "\n" not in str(refused.value)


def test_a_proof_finds_a_layer_that_is_called_in_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    found = OuterModel.layer_calls

    def without_masks(self: OuterModel, *given: Any) -> Any:
        calls = found(self, *given)
        for call in calls:
            call.kwargs["attention_mask"] = None
        return calls

    monkeypatch.setattr(OuterModel, "layer_calls", without_masks)
    with pytest.raises(InputError, match=r"split after \d of \d layers of a small random twin, the loss differs"):
        proof.prove(_default("gemma3_text"))


def test_a_proof_finds_a_gradient_that_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    run = RecordedSegment.run

    def halved(self: Any, hidden: Tensor, packing: Packing, start: int, stop: int) -> Tensor:
        output = run(self, hidden, packing, start, stop)
        return output.detach() + 0.5 * (output - output.detach())

    monkeypatch.setattr(RecordedSegment, "run", halved)
    with pytest.raises(InputError, match="the gradient of the adapters differs"):
        proof.prove(_default("bloom"))


def _saved(kind: str, to: Path, **changes: Any) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(small_twin(_default(kind, **changes)))
    model.save_pretrained(to)
    return model.eval()


def test_a_holder_has_no_more_than_its_part(tmp_path: Path) -> None:
    _saved("gemma2", tmp_path)
    base = BaseModel(ModelSpec.read(tmp_path), "fp32", torch.float32)
    front = load_segment(base, SegmentSpec(0, 1, embedding=True))
    deep = load_segment(base, SegmentSpec(1, 3, tail=True))
    names = [{name for name, _ in segment.named_parameters()} for segment in (front, deep)]
    assert {name for name in names[0] if name.startswith("outer.")} == {"outer.model.model.embed_tokens.weight"}
    assert {name for name in names[1] if "norm" in name and name.startswith("outer.")} == {
        "outer.model.model.norm.weight"
    }
    assert set(front.layers) == {"0"} and set(deep.layers) == {"1", "2"}


def test_own_rows_of_a_scaled_embedding_are_those_of_the_whole(tmp_path: Path) -> None:
    _saved("gemma3_text", tmp_path)
    base = BaseModel(ModelSpec.read(tmp_path), "fp32", torch.float32)
    ids, packing = torch.tensor([7, 9, 7, 30, 12]), Packing.of((3, 2))
    whole = load_segment(base, SegmentSpec(0, 0, embedding=True))
    own = load_segment(base, SegmentSpec(0, 0, embedding=True), vocabulary=torch.tensor([7, 9, 12, 30]))
    assert torch.equal(own.embed(ids, packing), whole.embed(ids, packing))
    assert sum(p.numel() for p in own.parameters()) == 4 * 64
    with pytest.raises(IndexError):
        own.embed(ids + 1, packing)
    # Layers and logits need no row of a token that the texts do not have, not that of id 0 either.
    whole = load_segment(base, SegmentSpec(0, 2, embedding=True))
    own = load_segment(base, SegmentSpec(0, 2, embedding=True), vocabulary=torch.tensor([7, 9, 12, 30]))
    runs = [segment.run(segment.embed(ids, packing), packing, 0, 2) for segment in (own, whole)]
    assert torch.equal(*runs)


def test_texts_of_a_batch_keep_their_own_rotary_tables(tmp_path: Path) -> None:
    scaled = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0}
    model = _saved("olmo2", tmp_path, rope_parameters=scaled, max_position_embeddings=8)
    spec = ModelSpec.read(tmp_path)
    assert spec.config.max_position_embeddings == 8
    segment = load_segment(BaseModel(spec, "fp32", torch.float32), SegmentSpec(0, 3, embedding=True, tail=True))
    lengths = (12, 5, 9)
    ids = torch.randint(3, 90, (sum(lengths),))
    with torch.no_grad():
        packing = Packing.of(lengths)
        hidden = segment.run(segment.embed(ids, packing), packing, 0, 3)
        for text, rows in zip(ids.split(lengths), hidden.split(lengths), strict=True):
            fresh = _reloaded(tmp_path, model)
            expected = fresh.model(input_ids=text[None]).last_hidden_state[0]
            assert torch.allclose(fresh.model.norm(rows), expected, atol=1e-5)


def _reloaded(directory: Path, model: Any) -> Any:
    # A rotary embedding remembers the longest text that it has seen.
    return type(model).from_pretrained(directory).eval()


def test_a_missing_head_is_no_tied_one(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    _saved("gpt_neox", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {name: value for name, value in load_file(file).items() if "embed_out" not in name}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"tie_word_embeddings: false\) the embedding is no head"):
        ModelSpec.read(tmp_path).check_weights()


def test_the_share_of_a_mixture_s_experts_is_known() -> None:
    spec = ModelSpec(Path(), small_twin(_default("mixtral")))
    share, names = spec.unadaptable
    layer = spec.skeleton.get_submodule("model.layers.0")
    matrices = {name: p.numel() for name, p in layer.named_parameters() if p.dim() > 1}
    frozen = sum(size for name, size in matrices.items() if "self_attn" not in name)
    assert share == pytest.approx(frozen / sum(matrices.values()))
    assert names == ("experts.gate_up_proj", "experts.down_proj", "mlp.gate")
    assert ModelSpec(Path(), small_twin(_default("gemma2"))).unadaptable == (0, ())


def test_pickled_weights_are_refused_with_the_way_to_convert_them(tmp_path: Path) -> None:
    _saved("gpt_neox", tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(
        InputError, match=r"has pickled weights alone \(pytorch_model\.bin\).*save_pretrained"
    ) as refused:
        ModelSpec.read(tmp_path).check_weights()
    assert "\n" not in str(refused.value)


def test_a_module_that_is_no_linear_stays_frozen() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.called, self.read, self.scaled = nn.Linear(4, 4), nn.Linear(4, 4), Scaled(4, 4)
            self.experts = nn.ModuleList([nn.Linear(4, 4)])

        def forward(self, x: Tensor) -> Tensor:
            return self.called(x) @ self.read.weight

    family = ModelSpec(Path(), small_twin(_default("olmo2"))).family
    assert isinstance(family, RecordedFamily)
    assert [path for path, _ in family.linears(Layer())] == ["called"]
