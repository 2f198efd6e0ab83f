"""Plain training loops in place of hsplit, for comparison in ``throughput.py``.

Each trains LoRA on the same model, tokenized examples, rank and dtype, with transformers and PEFT: AdamW over the
adapters' parameters, and, but for the tuned loops, all as it comes, the model's own loss included. Each is one process;
the threads are torch's default. None clips gradients, which hsplit does by default (``job.clip``): that spares them a
pass over the adapters' gradients each step.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from hsplit.config import Job
from hsplit.data import Batch, Example, TokenizedExample, collate
from hsplit.data.batches import IGNORED
from hsplit.data.local_data import LocalData
from hsplit.models.tokenizer import load_tokenizer


class Rival(ABC):
    """Data, model and one loop.

    Args:
        model: directory.
        dtype: of the base; PEFT keeps adapters in fp32.
        shares: examples by client.
        job: batch size, longest example, learning rate and seed.
        rank, alpha: of every adapter.
        split: layers on a client.
        threads: to compute with.
        device: where it computes.
    """

    def __init__(
        self,
        model: Path,
        dtype: torch.dtype,
        shares: dict[str, list[Example]],
        job: Job,
        rank: int,
        split: int,
        threads: int,
        device: str = "cpu",
    ) -> None:
        import logging

        import transformers

        torch.set_num_threads(threads)
        transformers.logging.set_verbosity_error()
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        self.model_directory, self.dtype, self.job, self.rank, self.split = model, dtype, job, rank, split
        self.device = torch.device(device)
        tokenizer = load_tokenizer(model)
        self.data = [LocalData(name, share, tokenizer, job) for name, share in shares.items()]
        torch.manual_seed(job.seed)
        self.set_up()

    @abstractmethod
    def set_up(self) -> None:
        """Make model and optimizers."""

    @abstractmethod
    def step(self, step: int) -> float:
        """One local step of every client; returns a mean loss."""

    def run(self, first: int, steps: int) -> tuple[float, float]:
        """Steps ``[first, first + steps)``: seconds of the wall, and the last loss."""
        begun, loss = time.perf_counter(), 0.0
        for step in range(first, first + steps):
            loss = self.step(step)
        return time.perf_counter() - begun, loss

    def load(self) -> Any:
        from transformers import AutoModelForCausalLM

        made = AutoModelForCausalLM.from_pretrained(self.model_directory, dtype=self.dtype, trust_remote_code=False)
        return made.to(self.device)

    def lora(self) -> LoraConfig:
        return LoraConfig(r=self.rank, lora_alpha=self.job.alpha, target_modules="all-linear", task_type="CAUSAL_LM")

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=self.job.lr, weight_decay=0.0)

    def _drawn(self, step: int) -> list[list[TokenizedExample]]:
        rows = self.job.batch_size
        return [data.draw(step * rows, rows) for data in self.data]

    def batches(self, step: int, width: int | None = None) -> list[dict[str, Tensor]]:
        """Each client's batch as a causal LM takes it, padded to its longest or to ``width``."""
        return [self.arguments(drawn, width) for drawn in self._drawn(step)]

    def arguments(self, drawn: Sequence[TokenizedExample], width: int | None = None) -> dict[str, Tensor]:
        """One batch as :meth:`batches` gives each client's."""
        return {name: tensor.to(self.device) for name, tensor in _arguments(collate(drawn), width).items()}


def _arguments(batch: Batch, width: int | None = None) -> dict[str, Tensor]:
    labels = nn.functional.pad(batch.targets[:, :-1], (1, 0), value=IGNORED)
    lengths = torch.tensor(batch.lengths)
    given = {
        "input_ids": batch.ids,
        "attention_mask": (torch.arange(batch.ids.shape[1]) < lengths[:, None]).long(),
        "labels": labels,
    }
    if width is None:
        return given
    fill = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED}
    return {k: nn.functional.pad(v, (0, width - v.shape[1]), value=fill[k]) for k, v in given.items()}


class Unsplit(Rival):
    """One model, all clients' examples in one batch padded to its longest."""

    def set_up(self) -> None:
        self.model = get_peft_model(self.load(), self.lora()).train()
        self.adam = self.optimizer(self.model)

    def step(self, step: int) -> float:
        batch = self.arguments([example for drawn in self._drawn(step) for example in drawn])
        loss = self.model(**batch).loss
        loss.backward()
        self.adam.step()
        self.adam.zero_grad()
        return float(loss.detach())


class Tuned(Rival):
    """One model, all clients' examples packed end to end without padding, the loss at supervised positions only.

    Adapters have the base's dtype, so that nothing is cast on the way, and AdamW is fused. Sequences are kept apart by
    their positions, as transformers does it.
    """

    compiled = False

    def set_up(self) -> None:
        self.model = get_peft_model(self.load(), self.lora(), autocast_adapter_dtype=False).train()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.adam = torch.optim.AdamW(trained, lr=self.job.lr, weight_decay=0.0, fused=True)
        if self.compiled:
            # Layers have one graph in common; lengths differ from batch to batch.
            for layer in self.model.get_base_model().base_model.layers:
                layer.compile(dynamic=True)

    def step(self, step: int) -> float:
        batch = collate([example for drawn in self._drawn(step) for example in drawn])
        lengths = torch.tensor(batch.lengths)
        kept = torch.arange(batch.ids.shape[1]) < lengths[:, None]
        positions = torch.cat([torch.arange(length) for length in batch.lengths])
        ids, targets = (t[kept].to(self.device) for t in (batch.ids, batch.targets))
        causal = self.model.get_base_model()
        hidden = causal.base_model(
            input_ids=ids[None], position_ids=positions[None].to(self.device), use_cache=False
        ).last_hidden_state[0]
        at = targets != IGNORED
        loss = nn.functional.cross_entropy(causal.get_output_embeddings()(hidden[at]).float(), targets[at])
        loss.backward()
        self.adam.step()
        self.adam.zero_grad()
        return float(loss.detach())


class TunedCompiled(Tuned):
    """The tuned loop with every decoder layer compiled by ``torch.compile``."""

    compiled = True


class PublicSplitLora(Rival):
    """In the manner of the public SplitLoRA code: one process, clients one after another, padded to the longest
    example that is allowed.
    """

    def set_up(self) -> None:
        self.fronts, self.adams = [], []
        for _ in self.data:
            front = self.load()
            front.model.layers = front.model.layers[: self.split]
            front.model.norm = nn.Identity()
            self.fronts.append(get_peft_model(front, self.lora()).train())
            self.adams.append(self.optimizer(self.fronts[-1]))
        deep = self.load()
        deep.model.layers = deep.model.layers[self.split :]
        self.server = get_peft_model(deep, self.lora()).train()
        self.server_adam = self.optimizer(self.server)

    def step(self, step: int) -> float:
        total = 0.0
        for front, adam, batch in zip(self.fronts, self.adams, self.batches(step, self.job.max_length), strict=True):
            mask = batch["attention_mask"]
            activations = front.base_model.model.model(batch["input_ids"], attention_mask=mask, use_cache=False)[0]
            received = activations.detach().requires_grad_()
            loss = self.server(inputs_embeds=received, attention_mask=mask, labels=batch["labels"]).loss
            loss.backward()
            self.server_adam.step()
            self.server_adam.zero_grad()
            activations.backward(received.grad)
            adam.step()
            adam.zero_grad()
            total += float(loss.detach())
        return total / len(self.data)


class Federated(Rival):
    """Federated LoRA: the full model for each client, one after another, and FedAvg of the factors every 8 steps."""

    def set_up(self) -> None:
        self.models = [get_peft_model(self.load(), self.lora()).train() for _ in self.data]
        self.adams = [self.optimizer(model) for model in self.models]

    def step(self, step: int) -> float:
        total = 0.0
        for model, adam, batch in zip(self.models, self.adams, self.batches(step), strict=True):
            loss = model(**batch).loss
            loss.backward()
            adam.step()
            adam.zero_grad()
            total += float(loss.detach())
        if (step + 1) % self.job.local_steps == 0:
            self.average()
        return total / len(self.data)

    def average(self) -> None:
        states = [get_peft_model_state_dict(model) for model in self.models]
        mean = {key: sum(state[key] for state in states) / len(states) for key in states[0]}
        for model in self.models:
            set_peft_model_state_dict(model, mean)


RIVALS: dict[str, type[Rival]] = {
    "unsplit": Unsplit,
    "tuned": Tuned,
    "compiled": TunedCompiled,
    "splitlora": PublicSplitLora,
    "federated": Federated,
}


def meanings(rivals: Sequence[str]) -> dict[str, str]:
    """Return the first line of each rival's docstring."""
    return {name: " ".join((RIVALS[name].__doc__ or "").split("\n\n")[0].split()) for name in rivals}
