"""The proof that a model split anywhere computes what it computes unsplit, on its small twin, before it trains.

The twin has the model's configuration with few narrow layers and random weights. It is written to a directory as any
model, read back in segments, split after every layer, and held against transformers' model with plain PEFT: the loss of
every text and the gradient of every adapter, over texts of unequal lengths.
"""

from __future__ import annotations

import copy
import hashlib
import json
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from hsplit.config.reading import read_json
from hsplit.config.section import STRICT
from hsplit.errors import InputError, error_text
from hsplit.files import write_text_atomically
from hsplit.home import cache_root
from hsplit.models.loading import load_segment
from hsplit.models.packing import Packing, pack_rows
from hsplit.models.recorded_family import RecordedFamily
from hsplit.models.segment import BaseModel, Segment, SegmentSpec
from hsplit.models.spec import LinearShape, ModelSpec, check_type
from hsplit.models.twin import small_twin

LENGTHS = (11, 3, 7)
# Largest relative error, in fp32.
TOLERANCE = 1e-5
RANK = 2
# Numbers of layers of a twin, as many as it takes.
_LAYERS = (3, 4, 6, 8, 12)


@dataclass(frozen=True)
class Proof:
    """Largest relative errors against the unsplit model, over all splits.

    Attributes:
        loss: of a text's summed loss.
        gradient: of the gradient of the adapters, all together.
        layers: of the twin.
        packed: its layers computed packed rows.
    """

    loss: float
    gradient: float
    layers: int
    packed: bool
    __pydantic_config__ = STRICT


def prove_once(config: Any) -> Proof:
    """Return what :func:`prove` has found for ``config``, kept in the user's cache directory for the same code.

    Raises:
        InputError: as :func:`prove`; a refusal is not kept.
    """
    path = cache_root() / "proofs" / f"{_key(config)}.json"
    try:
        return read_json(path, Proof)
    except InputError:
        found = prove(config)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(path, json.dumps(asdict(found)), durable=False)
    except OSError:
        # Proved again the next time.
        pass
    return found


def _key(config: Any) -> str:
    """Digest over everything that the proof depends on: the configuration and the code."""
    digest = hashlib.sha256(config.to_json_string(use_diff=False).encode())
    for name in ("torch", "transformers", "peft"):
        digest.update(f"{name} {version(name)}\n".encode())
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:32]


def prove(config: Any, lengths: tuple[int, ...] = LENGTHS, packed: bool | None = None) -> Proof:
    """Hold every split of the small twin of ``config`` against the unsplit model.

    Args:
        config: a model's configuration.
        lengths: of the texts, in tokens.
        packed: as of :class:`ModelSpec`.

    Raises:
        InputError: they differ, or the model cannot be split; one line that says what differed.
    """
    check_type(config)
    kind = config.model_type
    with tempfile.TemporaryDirectory(prefix="hsplit-proof-") as directory, _quietly():
        try:
            model = _random_model(_twin(config))
            model.save_pretrained(directory)
            return _compared(model, Path(directory), lengths, packed)
        except InputError:
            raise
        except Exception as error:  # a model's own code raises anything
            raise _not_served(kind, error_text(error)) from error


def _twin(config: Any) -> Any:
    """The smallest twin of ``config`` with a layer of every kind that the model has.

    Raises:
        InputError: there is none, or the model cannot be split.
    """
    wanted = _kinds(config)
    error: Exception | None = None
    for least in _LAYERS:
        try:
            twin = small_twin(config, least)
            if wanted <= _kinds(twin):
                return twin
        except InputError:
            raise
        except Exception as found:  # transformers' own, for sizes that do not go with so few layers
            error = found
    why = "it does not show every kind of layer" if error is None else error_text(error)
    raise _not_served(config.model_type, f"no small twin of it can be made: {why}") from error


def _kinds(config: Any) -> set[frozenset[str]]:
    """Classes of modules in each decoder layer."""
    # A copy: building a model writes into its configuration.
    spec = ModelSpec(Path(), copy.deepcopy(config))
    layers = cast(nn.ModuleList, spec.skeleton.get_submodule(spec.family.layers))
    return {frozenset(type(module).__name__ for module in layer.modules()) for layer in layers}


def _not_served(kind: str, why: str) -> InputError:
    return InputError(f"job.model: model type {kind} is not served: {why}")


def _hands_on(spec: ModelSpec) -> bool:
    return isinstance(spec.family, RecordedFamily) and spec.family.anatomy.hands_on


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep transformers' and PEFT's remarks about the twin from users."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _random_model(config: Any) -> Any:
    """A random model of ``config`` whose every parameter matters."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config, trust_remote_code=False).eval().float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.dim() == 1 else 0.1))
    return model


def _compared(model: Any, directory: Path, lengths: tuple[int, ...], packed: bool | None) -> Proof:
    spec = replace(ModelSpec.read(directory), packed=packed)
    spec.check_weights()
    kind = spec.config.model_type
    ids = torch.randint(3, spec.vocab_size, (len(lengths), max(lengths)))
    real = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    _check_causal(model, ids, kind)
    adapters = _adapters(spec.linears)
    losses, gradients = _unsplit(model, spec, adapters, ids, real)
    size = sum(float(g.square().sum()) for g in gradients.values()) ** 0.5
    worst_loss = worst_gradient = 0.0
    for split in range(spec.layers + 1):
        own, slopes = _split(spec, split, adapters, ids, lengths)
        error = float((own - losses).abs().max() / losses.abs().max())
        difference = sum(float((slopes[n] - gradients[n]).square().sum()) for n in gradients) ** 0.5 / max(size, 1e-30)
        for what, found in (("the loss", error), ("the gradient of the adapters", difference)):
            # Not a number is no agreement either.
            if not found <= TOLERANCE:
                why = "its layers hand on more than hidden states: " if _hands_on(spec) else ""
                raise _not_served(
                    kind,
                    f"{why}split after {split} of {spec.layers} layers of a small random twin, {what} differs from the"
                    f" unsplit model's by {found:.1e}, more than {TOLERANCE:.0e}",
                )
        worst_loss, worst_gradient = max(worst_loss, error), max(worst_gradient, difference)
    family = spec.family
    packed_rows = not isinstance(family, RecordedFamily) or family.packed
    return Proof(worst_loss, worst_gradient, spec.layers, packed_rows)


def _check_causal(model: Any, ids: Tensor, kind: str) -> None:
    """Refuse a model in which a token sees later ones."""
    other = ids.clone()
    other[:, -1] = (other[:, -1] + 1 - 3) % 50 + 3
    with torch.no_grad():
        first, second = (
            model(input_ids=i, attention_mask=torch.ones_like(i), use_cache=False).logits for i in (ids, other)
        )
    if not torch.allclose(first[:, :-1], second[:, :-1], rtol=1e-4, atol=1e-5 * float(first.abs().max())):
        raise _not_served(kind, "its tokens see later tokens")


Factors = dict[str, tuple[Tensor, Tensor]]


def _adapters(linears: tuple[LinearShape, ...]) -> Factors:
    return {
        s.name: (torch.randn(RANK, s.d_in) / s.d_in**0.5, torch.randn(s.d_out, RANK) / s.d_out**0.5) for s in linears
    }


def _unsplit(
    model: Any, spec: ModelSpec, adapters: Factors, ids: Tensor, real: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses of each text, and gradients of their sum by factor, of transformers' model with PEFT's adapters."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        r=RANK, lora_alpha=RANK, target_modules=list(adapters), fan_in_fan_out=spec.family.transposed, bias="none"
    )
    wrapped: Any = get_peft_model(model, lora)
    factors = {}
    for name, (A, B) in adapters.items():
        layer = wrapped.get_submodule(f"base_model.model.{name}")
        for part, value in (("lora_A", A), ("lora_B", B)):
            weight = getattr(layer, part)["default"].weight
            weight.data.copy_(value)
            factors[f"{name} {part[-1]}"] = weight
    logits = wrapped(input_ids=ids, attention_mask=real.long(), use_cache=False).logits.double()
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    sums = (losses.view(len(ids), -1) * real[:, 1:]).sum(dim=1)
    sums.sum().backward()
    absent = [name for name, factor in factors.items() if factor.grad is None]
    if absent:
        raise _not_served(spec.config.model_type, f"PEFT's adapter at {absent[0][:-2]} has no effect")
    return sums.detach(), {name: factor.grad for name, factor in factors.items() if factor.grad is not None}


def _split(
    spec: ModelSpec, split: int, adapters: Factors, ids: Tensor, lengths: tuple[int, ...]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The same of two segments, with the gradient handed over between them."""
    base = BaseModel(spec, "fp32", torch.float32)
    front = load_segment(base, SegmentSpec(0, split, embedding=True))
    deep = load_segment(base, SegmentSpec(split, spec.layers, tail=True))
    factors = _attached((front, deep), adapters)
    packing, tokens = Packing.of(lengths), pack_rows(ids, lengths)
    sent = front.run(front.embed(tokens, packing), packing, 0, split)
    received = sent.detach().requires_grad_()
    hidden = deep.run(received, packing, split, spec.layers)
    targets = torch.full_like(ids, -100)
    targets[:, :-1] = ids[:, 1:]
    for row, length in enumerate(lengths):
        targets[row, length - 1 :] = -100
    assert deep.tail is not None
    losses = deep.tail.supervised_losses(hidden, pack_rows(targets, lengths))
    losses.sum().backward()
    if sent.requires_grad:
        assert received.grad is not None
        sent.backward(received.grad)
    sums = torch.stack([part.sum() for part in losses.detach().double().split([length - 1 for length in lengths])])
    return sums, {n: torch.zeros_like(f) if f.grad is None else f.grad for n, f in factors.items()}


def _attached(segments: tuple[Segment, ...], adapters: Factors) -> dict[str, Tensor]:
    factors: dict[str, Tensor] = {}
    for segment in segments:
        for name, linear in segment.linears.items():
            A, B = (torch.nn.Parameter(factor.clone()) for factor in adapters[name])
            linear.set_adapter(A, B, 1.0)
            factors |= {f"{name} A": A, f"{name} B": B}
    return factors
