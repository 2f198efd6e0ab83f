"""Generation of an answer to each prompt, greedy or by beam search, with transformers' KV cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from hsplit.data import padding_id


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    beams: int,
    max_new_tokens: int,
    batch_size: int,
    progress: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """Generate an answer to each prompt, up to the tokenizer's eos, without special tokens and surrounding blanks.

    Nothing is sampled, and the model's own generation settings are ignored.

    Args:
        model: a causal LM in eval mode.
        tokenizer: its tokenizer.
        prompts: token ids, at least one each: those before a response in training.
        beams: of the search; 1 is greedy.
        max_new_tokens: most tokens of an answer.
        batch_size: prompts at once; each is padded on the left to the longest of its batch.
        progress: called with the number of finished prompts.
    """
    from transformers import GenerationConfig

    padding = padding_id(tokenizer, model.config.vocab_size)
    settings = GenerationConfig(
        do_sample=False,
        num_beams=beams,
        max_new_tokens=max_new_tokens,
        pad_token_id=padding,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    # Replaces the model directory's settings, such as sampling and penalties.
    model.generation_config = settings
    texts: dict[int, str] = {}
    # Prompts of like length share a batch, so that little is padded.
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        longest = max(len(prompts[index]) for index in chosen)
        ids = torch.full((len(chosen), longest), padding, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, index in enumerate(chosen):
            own = torch.tensor(prompts[index], dtype=torch.int64)
            ids[row, longest - len(own) :] = own
            mask[row, longest - len(own) :] = 1
        found = model.generate(
            input_ids=ids.to(model.device), attention_mask=mask.to(model.device), generation_config=settings
        )
        answers = tokenizer.batch_decode(found[:, longest:].cpu(), skip_special_tokens=True)
        texts.update(zip(chosen, (answer.strip() for answer in answers), strict=True))
        progress(len(texts))
    return [texts[index] for index in range(len(prompts))]
