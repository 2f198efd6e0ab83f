"""Targets of an evaluation: a run, by its split model, or an exported directory, by transformers and PEFT alone."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from hsplit.actors.executor import one_line
from hsplit.config import RunConfig
from hsplit.config.reading import displayed, read_json
from hsplit.config.section import STRICT
from hsplit.errors import InputError
from hsplit.evaluation.split_model import Cut, split_model
from hsplit.exporting.model_card import METADATA
from hsplit.lora.aggregation import find_aggregation
from hsplit.lora.learned import learned_parts, trained_weights
from hsplit.models.dtype import DTYPES, resolve_dtype
from hsplit.models.lookup import ModelSource, check_directory, find_model
from hsplit.models.segment import BaseModel
from hsplit.models.spec import ModelSpec
from hsplit.models.tokenizer import load_tokenizer
from hsplit.models.weights import freeze
from hsplit.run.checkpoint import latest_checkpoint, read_checkpoint
from hsplit.run.state import RunState
from hsplit.run_directory import RunDirectory
from hsplit.streams import quieten_bitsandbytes


@dataclass(frozen=True)
class _AdapterConfig:
    base_model_name_or_path: str | None = None
    __pydantic_config__ = STRICT


@dataclass(frozen=True)
class Target:
    """A model ready to be evaluated.

    Attributes:
        model: a causal LM in eval mode.
        tokenizer: its tokenizer.
        how: its computation in words.
        separator: ``job.data.separator`` of its run, if that is known.
        seed: the run's; 0 for an exported directory.
        run, source, state: the run's configuration, base and last checkpoint; ``None`` for an exported directory.
        notes: further remarks.
    """

    model: Any
    tokenizer: Any
    how: str
    separator: str | None = None
    seed: int = 0
    run: RunConfig | None = None
    source: ModelSource | None = None
    state: RunState | None = None
    notes: list[str] = field(default_factory=list)


def kind_of(path: Path, client: str | None = None) -> Literal["run", "adapter", "model"]:
    """Kind of the target in ``path``, by the names of its files; nothing is loaded.

    Raises:
        InputError: it is no target, or ``client`` is given for one that is not split.
    """
    if not path.is_dir():
        raise InputError(f"{displayed(path)}: there is no such directory; give a run, as runs/NAME, or an export")
    if (path / "config.yaml").is_file():
        return "run"
    if client is not None:
        raise InputError(f"--client {client}: {displayed(path)} is not a run's directory, so nothing is split there")
    if (path / "adapter_config.json").is_file():
        return "adapter"
    if (path / "config.json").is_file():
        return "model"
    raise InputError(
        f"{displayed(path)}: is no run (config.yaml), no PEFT adapter (adapter_config.json) and no model (config.json)"
    )


def open_target(path: Path, client: str | None = None) -> Target:
    """Load the model in ``path``: a run's directory, a PEFT adapter, or a merged model.

    Args:
        path: the directory.
        client: of a run with a split model: the client whose split to cut at; by default the deepest split.

    Raises:
        InputError: it is none of these, cannot be read, or has no such client.
    """
    kind = kind_of(path, client)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "run":
        return _run(RunDirectory.open(path), client, device)
    return _adapter(path, device) if kind == "adapter" else _merged(path, device)


# -- a run --------------------------------------------------------------------------------------------------------


def _run(directory: RunDirectory, client: str | None, device: str) -> Target:
    run = RunConfig.load(directory.config)
    checkpoint, notes = latest_checkpoint(directory.checkpoints)
    state, tensors = read_checkpoint(checkpoint)
    source = find_model(run.job.model, accepted=run.job.accept_licence)
    trained = trained_weights(tensors)
    where = f"checkpoint {checkpoint.name}, base {run.job.base}, computed in {'fp32' if trained else run.job.dtype}"
    if trained:
        _refuse_client(client, "every weight was trained on one node")
        model, how = _trained_model(run, source, trained, device), f"as one model, every weight trained; {where}"
    else:
        cut, how = _cut(run, state, client, displayed(checkpoint))
        learned = learned_parts({key: tensor for own in tensors.values() for key, tensor in own.items()})
        model, how = split_model(BaseModel.of_job(source.spec, run.job), learned, cut, device), f"{how}; {where}"
    if run.job.privacy.noise:
        notes = [*notes, "the noise that clients add to activations (privacy.noise) is left out"]
    tokenizer = load_tokenizer(source.directory)
    return Target(model, tokenizer, how, run.job.data.separator, run.job.seed, run, source, state, list(notes))


def _global_remark(run: RunConfig) -> str:
    """Remark for aggregations where holders of smaller ranks compute with a part of the model."""
    truncates = find_aggregation(run.policy.aggregation).truncates
    return " (the global one: holders of smaller ranks have its leading directions)" if truncates else ""


def _cut(run: RunConfig, state: RunState, client: str | None, where: str) -> tuple[Cut | None, str]:
    if run.policy.placement != "split":
        _refuse_client(client, f"policy {run.policy.name} splits nothing (placement {run.policy.placement!r})")
        return None, f"as one model, which each holder has whole{_global_remark(run)}"
    if state.plan is None:
        raise InputError(f"{where}: it has no plan to cut the model by")
    plan = state.plan
    if client is None:
        if not plan.available:
            raise InputError(f"{where}: by its plan no client takes part, so there is no split to cut at")
        chosen = max(plan.available, key=lambda holder: holder.split or 0)
    else:
        found = [holder for holder in plan.available if holder.name == client]
        if not found:
            names = ", ".join(holder.name for holder in plan.available)
            raise InputError(f"--client {client}: has no part in the run's last plan; give one of {names}")
        chosen = found[0]
    assert chosen.split is not None
    wire = chosen.wire or run.job.wire
    how = (
        f"through the split model, cut at layer {chosen.split} of {plan.layers} as {chosen.name} is, wire {wire}"
        f"{_global_remark(run)}"
    )
    return Cut(chosen.split, wire, run.job.privacy.labels), how


def _refuse_client(client: str | None, reason: str) -> None:
    if client is not None:
        raise InputError(f"--client {client}: {reason}, so there is no client to cut at; leave it out")


def _trained_model(run: RunConfig, source: ModelSource, trained: Mapping[str, Tensor], device: str) -> Any:
    model = _loaded(source.directory, torch.float32)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, values in trained.items():
            if name not in parameters:
                raise InputError(
                    f"{run.job.model}: the model has no parameter {name}, which the checkpoint has trained"
                )
            parameters[name].copy_(values)
    return model.to(device).eval()


# -- exported directories -----------------------------------------------------------------------------------------


def _adapter(path: Path, device: str) -> Target:
    """Load the adapter on its base, with linears of ``job.base``'s values (METHOD 1)."""
    quieten_bitsandbytes()
    from peft import PeftModel

    named = read_json(path / "adapter_config.json", _AdapterConfig).base_model_name_or_path
    if named is None:
        raise InputError(
            f"{displayed(path / 'adapter_config.json')}: names no base_model_name_or_path; an adapter needs its base"
        )
    source = find_model(named)
    directory = source.directory
    if not (path / "adapter_model.safetensors").is_file():
        # PEFT would load a pickled one, or ask the hub for a missing one.
        raise InputError(f"{displayed(path)}: has no adapter_model.safetensors, and only safetensors are read")
    known = _metadata(path)
    model = _loaded(directory, torch.float32)
    base = known.get("base")
    if base is not None and base != "fp32":
        _give_base_values(model, source.spec, base)
    notes = (
        [] if base is not None else ["its card does not say which base values it was trained on; the base's own are"]
    )
    with warnings.catch_warnings():
        # PEFT uses a deprecated name of transformers, which is no concern of users.
        warnings.simplefilter("ignore", FutureWarning)
        try:
            model = PeftModel.from_pretrained(model, path).to(device).eval()
        except Exception as error:  # PEFT raises anything on files that do not fit one another
            raise InputError(f"{displayed(path)}: cannot be loaded as an adapter: {one_line(error)}") from error
    how = f"as one model, by transformers and PEFT, in fp32 on base values of {base or 'the base itself'}"
    return Target(model, load_tokenizer(directory), how, known.get("separator"), notes=notes)


def _give_base_values(model: Any, spec: ModelSpec, base: str) -> None:
    transposed, reader = spec.family.transposed, spec.open_checkpoint()
    for shape in spec.linears:
        read = partial(reader.read, f"{shape.name}.weight", transposed=transposed)
        values = freeze(read, base, torch.float32, quantized=False).dense(torch.float32)
        with torch.no_grad():
            model.get_submodule(shape.name).weight.copy_(values.T if transposed else values)


def _merged(path: Path, device: str) -> Target:
    check_directory(path)
    known = _metadata(path)
    # In the files' type if the device supports it; with the files' values in any case.
    config = read_json(path / "config.json", dict[str, Any])
    stored = config.get("dtype", config.get("torch_dtype"))
    own = "bf16" if stored == "bfloat16" else "fp32"
    dtype = resolve_dtype("auto", device) if own == "bf16" else DTYPES["fp32"]
    model = _loaded(path, dtype).to(device).eval()
    how = f"as one model, by transformers, in {str(dtype).removeprefix('torch.')}"
    return Target(model, load_tokenizer(path), how, known.get("separator"))


def _loaded(directory: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:  # transformers raises anything on files that do not fit one another
        raise InputError(f"{displayed(directory)}: cannot be loaded: {one_line(error)}") from error
    finally:
        if bars:
            logging.enable_progress_bar()
    if missing := sorted(found["missing_keys"]):
        # transformers would initialize it at random.
        raise InputError(f"{displayed(directory)}: cannot be loaded: the checkpoint has no tensor {missing[0]}")
    return model


def _metadata(path: Path) -> dict[str, Any]:
    """Facts of the run in an export's card; empty for a directory that hsplit did not write."""
    from huggingface_hub import ModelCard

    card = path / "README.md"
    if not card.is_file():
        return {}
    try:
        known = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict().get(METADATA)
    except Exception as error:  # of the hub's library, its YAML reader or neither
        raise InputError(f"{displayed(card)}: cannot be read: {one_line(error)}") from error
    known = known if isinstance(known, dict) else {}
    return {key: value for key in ("base", "separator") if isinstance(value := known.get(key), str)}
