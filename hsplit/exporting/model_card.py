"""Model card of an exported directory: origin, training, quality, and loading."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hsplit import __version__
from hsplit.config import Partition, RunConfig
from hsplit.config.reading import read_json
from hsplit.config.section import STRICT
from hsplit.errors import InputError
from hsplit.models.hub import is_hub_id
from hsplit.models.lookup import ModelSource
from hsplit.observe.events import read_events
from hsplit.observe.tables import CUT, LAG, MetricsRow, cut_text, lag_text, perplexities, read_rows, residual_cuts
from hsplit.planning.plan import HolderPlan
from hsplit.planning.wire import WIRES
from hsplit.run.state import RunState
from hsplit.run_directory import RunDirectory

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

METADATA = "hsplit"
"""Key of the front matter with the facts of the run that ``hsplit eval`` needs."""


@dataclass(frozen=True)
class _Evaluation:
    """The part of ``eval.json`` that a card quotes."""

    round: int | None
    data: str
    inputs: int
    references: int
    model: str
    beams: int
    scores: dict[str, float]
    __pydantic_config__ = STRICT


_METRIC_NAMES = {
    "ppl": "Perplexity",
    "bleu": "BLEU",
    "nist": "NIST",
    "meteor": "METEOR",
    "rouge_l": "ROUGE-L",
    "cider": "CIDEr",
}


def model_card(
    directory: RunDirectory,
    run: RunConfig,
    source: ModelSource,
    state: RunState,
    format_: str,
    dtype: str,
    lines: Sequence[str],
) -> str:
    """``README.md`` of an export, with front matter for the hub.

    Args:
        directory: the run's; its ``eval.json`` is quoted if it exists.
        run: its configuration.
        source: of its base model.
        state: of the exported checkpoint.
        format_: ``peft`` or ``merged``.
        dtype: of a merged model's files.
        lines: further remarks: errors of truncation, base and rounding.
    """
    from huggingface_hub import ModelCard, ModelCardData

    job = run.job
    evaluation = _evaluation(directory, state.round)
    data = ModelCardData(
        base_model=job.model if is_hub_id(job.model) else None,
        library_name="peft" if format_ == "peft" else "transformers",
        pipeline_tag="text-generation",
        tags=_tags(run),
        model_name=directory.name,
        eval_results=_eval_results(evaluation, ", ".join(job.data.sources)),
    )
    # A key of hsplit's own, for `hsplit eval`.
    setattr(data, METADATA, {"version": __version__, "base": job.base, "separator": job.data.separator})
    events = read_events(directory.events)
    sections = [
        f"# {directory.name}",
        _introduction(run, source, format_),
        "## How to load it",
        _snippet(run, source, format_, dtype),
        *(["## What to know", "\n".join(f"- {line}" for line in lines)] if lines else []),
        "## Training",
        _training(run, source, state, *(residual_cuts(events, state.round, field) for field in (CUT, LAG))),
        "## Plan",
        _plan(state),
        "## Results",
        _results(directory, state, evaluation),
    ]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"))


def _tags(run: RunConfig) -> list[str]:
    policy = run.policy
    tags = {
        METADATA: True,
        "lora": policy.train == "adapters",
        "split-learning": policy.placement == "split",
        "federated-learning": policy.placement != "single",
    }
    return [tag for tag, holds in tags.items() if holds]


def _named(model: str) -> str:
    """Name of a model or file for the card, without a path of the run's machine."""
    return Path(model).name if Path(model).is_absolute() else model


def _introduction(run: RunConfig, source: ModelSource, format_: str) -> str:
    what = "A LoRA adapter (PEFT) for" if format_ == "peft" else "A model fine-tuned from"
    return (
        f"{what} `{_named(run.job.model)}`, trained with hsplit {__version__}: split and federated fine-tuning of "
        f"language models on unequal devices.\n\nThe base was read from {_origin(source)}."
    )


def _origin(source: ModelSource) -> str:
    path = str(source.directory)
    text = source.origin.replace(f", converted to {path}", ", converted to safetensors").replace(f" in {path}", "")
    return text.replace(path, f"`{source.directory.name}`")


def _snippet(run: RunConfig, source: ModelSource, format_: str, dtype: str) -> str:
    if format_ != "peft":
        return (
            "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'model = AutoModelForCausalLM.from_pretrained("DIRECTORY")  # {dtype}\n'
            'tokenizer = AutoTokenizer.from_pretrained("DIRECTORY")\n```'
        )
    base = run.job.model if is_hub_id(run.job.model) else _named(run.job.model)
    settings = {
        "fp32": ", dtype=torch.float32",
        "bf16": ", dtype=torch.bfloat16",
        "int8": ", quantization_config=BitsAndBytesConfig(load_in_8bit=True)",
        "nf4": ', quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")',
    }[run.job.base]
    imports = "AutoModelForCausalLM, AutoTokenizer" + (", BitsAndBytesConfig" if "BitsAnd" in settings else "")
    snippet = (
        f"```python\nimport torch\nfrom peft import PeftModel\nfrom transformers import {imports}\n\n"
        f'base = "{base}"\nmodel = AutoModelForCausalLM.from_pretrained(base{settings})\n'
        'model = PeftModel.from_pretrained(model, "DIRECTORY")\n'
        "tokenizer = AutoTokenizer.from_pretrained(base)\n```"
    )
    remark = f"The adapter was trained on base weights with the values of `{run.job.base}` (`job.base`)"
    if run.job.base == "int8":
        remark += "; LLM.int8(), as transformers loads it, rounds activations too, so its outputs differ a little"
    if source.origin.startswith("the package "):
        remark += (
            f".\nThey were read from {_origin(source)}, whose values are near those that the hub has under that name, "
            "not equal to them"
        )
    return f"{snippet}\n\n{remark}."


def _training(
    run: RunConfig, source: ModelSource, state: RunState, cuts: Mapping[int, float], lags: Mapping[int, float]
) -> str:
    job, data, policy = run.job, run.job.data, run.policy
    spec = data.partition
    partition = spec.model_dump(exclude_none=True) if isinstance(spec, Partition) else spec
    where = policy.split if policy.placement == "split" else "none"
    ranks = policy.ranks if policy.train == "adapters" else "none: every weight trained"
    scaled = " times the root of the number of holders that train a layer" if run.scales_lr else ""
    own = {part.wire or job.wire for part in state.plan.available} if state.plan is not None else set()
    wires = sorted(own or {job.wire}, key=WIRES.index)
    sources = ", ".join(map(_named, data.sources))
    rows = [
        ("base model", f"`{_named(job.model)}`"),
        ("base values (`job.base`)", f"{job.base}, computed in {job.dtype}"),
        (
            "data",
            f"{sources}, partition {_plain(partition)}, separator {_plain(data.separator)}",
        ),
        (
            "test part",
            f"{data.test:g} of the distinct prompts, left out of training and validation" if data.test else "none",
        ),
        ("policy", f"{policy.name}" + (f": {policy.description}" if policy.description else "")),
        (
            "placement, split, ranks, aggregation",
            f"{policy.placement}, {where}, {ranks}, {policy.aggregation} (reinit {policy.reinit})",
        ),
        ("cut", cut_text(cuts, policy.aggregation) or "not recorded"),
        *([("lag", text)] if (text := lag_text(lags)) else []),
        ("clients", f"{len(run.clients)}, labels at the {job.privacy.labels}, wire {' and '.join(wires)}"),
        ("rounds done", f"{state.round} of {job.rounds}, {job.local_steps} local steps each"),
        ("batch size", f"{job.batch_size} a client, {job.grad_accumulation} accumulated"),
        (
            "optimizer",
            f"{job.optimizer}, lr {job.lr:g}{scaled}, {job.schedule}, warm-up {job.warmup} steps, clip {job.clip}",
        ),
        ("LoRA alpha, dropout", f"{job.alpha:g}, {job.dropout:g}"),
        ("seed", str(job.seed)),
        ("supervised tokens", f"{state.tokens:,}"),
        ("wall time", f"{state.wall_time_s:,.1f} s"),
        (
            "virtual time, at the declared budgets",
            f"{state.virtual_time_s:,.4g} s (virtual: computed, not measured)",
        ),
    ]
    return _table(("", ""), rows)


def _plain(value: Any) -> str:
    return "the source's own" if value is None else f"`{json.dumps(value)}`"


def _plan(state: RunState) -> str:
    if state.plan is None:
        return "No plan was made."
    plan = state.plan

    def row(holder: HolderPlan) -> tuple[str, ...]:
        split = "–" if holder.split is None else str(holder.split)
        return holder.name, holder.kind, split, str(holder.rank_total), "yes" if holder.available else "no"

    table = _table(
        ("holder", "kind", "split", "sum of ranks", "available"), [row(h) for h in (plan.server, *plan.clients)]
    )
    return (
        f"Of {plan.layers} layers, a client holds those before its split, the server those from its own on.\n\n{table}"
    )


def _results(directory: RunDirectory, state: RunState, evaluation: _Evaluation | None) -> str:
    parts = []
    with suppress(InputError):
        # A table that is missing or was changed is not quoted.
        table = read_rows(directory.metrics, MetricsRow)
        found = perplexities(row for row in table if row.round <= state.round)
        if found:
            (_, before), (round_, after) = found[0], found[-1]
            parts.append(
                f"Validation perplexity {after:.4g} after round {round_} ({before:.4g} before training), on examples"
                " that the clients held out."
            )
    if evaluation is not None:
        scores = [(_METRIC_NAMES.get(n, n), f"{value:.4g}") for n, value in evaluation.scores.items()]
        parts.append(
            f"`hsplit eval`, on {evaluation.data}: {evaluation.inputs} inputs, {evaluation.references} "
            f"references, {evaluation.model}, "
            f"{'greedy' if evaluation.beams == 1 else str(evaluation.beams) + ' beams'}.\n\n"
            + _table(("score", "value"), scores)
        )
    return "\n\n".join(parts) or "Nothing was measured."


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _evaluation(directory: RunDirectory, round_: int) -> _Evaluation | None:
    """Result of ``hsplit eval`` in the run's directory, if it is of this round."""
    file = directory.path / "eval.json"
    if not file.is_file():
        return None
    try:
        found = read_json(file, _Evaluation)
    except InputError as error:
        raise InputError(f"{error}: not what `hsplit eval` writes; remove the file, or evaluate again") from None
    return found if found.round == round_ else None


def _eval_results(evaluation: _Evaluation | None, source: str) -> list[EvalResult] | None:
    from huggingface_hub import EvalResult

    if evaluation is None:
        return None
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=Path(source).stem,
            dataset_name=evaluation.data,
            metric_type=name,
            metric_name=_METRIC_NAMES.get(name, name),
            metric_value=value,
        )
        for name, value in evaluation.scores.items()
    ]
