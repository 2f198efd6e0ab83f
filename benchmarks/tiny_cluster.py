"""What the benchmarks of an orchestrator share: a tiny random model with texts for it, and a Ray of their own.

Computing takes next to nothing there: what is measured is declared time that everybody waits for, and Ray and hsplit.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

WORDS = 96


@contextmanager
def local_ray(cpus: float) -> Iterator[Path]:
    """A Ray with so many CPUs (of which it only keeps count) on this machine, whose workers are forked.

    Yields:
        A folder, gone afterwards, for everything that is written on the way.
    """
    import ray

    from hsplit.actors.fork_server import ForkServer
    from hsplit.actors.ray_connection import connect

    with tempfile.TemporaryDirectory() as name, ForkServer() as fork_server:
        connect(None, cpus, dashboard=False, fork_server=fork_server)
        try:
            yield Path(name)
        finally:
            ray.shutdown()


def tiny_model(to: Path, words: int = WORDS, **changes: int) -> Path:
    """Save a random Llama with a tokenizer of ``words`` words into ``to``; ``changes`` are of its sizes."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 8}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, **changes}
    config = LlamaConfig(vocab_size=words, bos_token_id=0, eos_token_id=0, tie_word_embeddings=True, **sizes)
    LlamaForCausalLM(config).save_pretrained(to)
    vocabulary = {"<eos>": 0, "<unk>": 1, **{f"w{i}": i for i in range(2, words)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>").save_pretrained(to)
    return to


def texts(to: Path, count: int = 200) -> Path:
    """Write ``count`` examples in that tokenizer's words, a CSV."""
    draw = random.Random(0)
    lines = [" ".join(f"w{draw.randrange(2, WORDS)}" for _ in range(12)) for _ in range(count)]
    to.write_text("prompt,response\n" + "\n".join(f"{line[:8]},{line}" for line in lines) + "\n")
    return to
