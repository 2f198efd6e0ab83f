"""Examples: their sources, their partition over the clients, and batches of their tokens."""

from hsplit.data.batches import Batch, ExampleSampler, collate, validation_batches
from hsplit.data.chat import ChatTemplate
from hsplit.data.examples import Example
from hsplit.data.holdout import hold_out, split_off_test
from hsplit.data.partition import partition
from hsplit.data.restaurants import restaurants
from hsplit.data.sources import read_examples
from hsplit.data.text_files import file_sha256
from hsplit.data.tokens import TokenizedExample, check_ids, check_special_tokens, largest_id, padding_id, tokenize

__all__ = [
    "Batch",
    "ChatTemplate",
    "Example",
    "ExampleSampler",
    "TokenizedExample",
    "check_ids",
    "check_special_tokens",
    "collate",
    "file_sha256",
    "hold_out",
    "largest_id",
    "padding_id",
    "partition",
    "read_examples",
    "restaurants",
    "split_off_test",
    "tokenize",
    "validation_batches",
]
