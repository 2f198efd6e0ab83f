"""A script: load a run's adapter with PEFT alone and print its loss over the run's validation data.

    python tests/peft_validation.py RUN

The model is transformers' own, unsplit: for an NF4 run quantized by its bitsandbytes loading. Of hsplit only the
batches are taken.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hsplit.actors.client import Client
from hsplit.config import RunConfig
from hsplit.models.lookup import find_model
from hsplit.models.segment import BaseModel
from hsplit.run.inputs import read_inputs


def main(run: Path) -> None:
    config = RunConfig.load(run / "config.yaml")
    base = json.loads((run / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    quantization = None
    if config.job.base == "nf4":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, quantization_config=quantization)
    model = PeftModel.from_pretrained(model, run / "adapter").eval()

    source = find_model(config.job.model)
    shares = read_inputs(config, source).shares
    total, count = 0.0, 0
    for client in config.clients:
        twin = Client(client.name, config.job, config.policy, BaseModel.of_job(source.spec, config.job))
        twin.load_data({client.name: shares[client.name]}, client.data)
        for batch in twin.data.validation:
            mask = (torch.arange(batch.ids.shape[1])[None] < torch.tensor(batch.lengths)[:, None]).long()
            with torch.no_grad():
                logits = model(input_ids=batch.ids, attention_mask=mask).logits
            at = batch.targets != -100
            total += float(torch.nn.functional.cross_entropy(logits[at], batch.targets[at], reduction="sum"))
            count += int(at.sum())
    print(json.dumps({"val_loss": total / count, "tokens": count}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
